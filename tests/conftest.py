"""What every test may count on: few threads, no network, own caches, and a small tree that looks like BreaKHis."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before torch, datasets or huggingface_hub are imported: they read these once.
_CACHE = tempfile.mkdtemp(prefix="magdg-tests-")
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HOME=f"{_CACHE}/hf",
    HF_DATASETS_CACHE=f"{_CACHE}/hf/datasets",
    MAGDG_CACHE=f"{_CACHE}/magdg",
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

# The same examples on every machine, however slow it is.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("tests")

# One patient a subtype. The first has two sections, with two magnifications each; one slide is of another year.
SLIDES = {
    "B_A": ("14-1001AB", "14-1001CD"),
    "B_F": ("14-1002",),
    "B_PT": ("14-1003EF",),
    "B_TA": ("14-1004",),
    "M_DC": ("14-2001",),
    "M_LC": ("14-2002AB",),
    "M_MC": ("14-2003",),
    "M_PC": ("15-190EF",),
}


@pytest.fixture(autouse=True)
def one_thread_again():
    """A cell sets the number of torch's threads. A process forked in a later test would wait for those it has not."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def breakhis_tree(tmp_path_factory) -> Path:
    """The layout of BreaKHis with 32 images of 70x46 pixels: 4 benign and 4 malignant patients at 4 magnifications.

    Pixels are made here: pink and purple noise, finer in malignant images. Do not write into it: copy it first.
    """
    from magnification_invariant.data.breakhis import MAGNIFICATIONS, SUBTYPES

    root = tmp_path_factory.mktemp("breakhis")
    rng = np.random.default_rng(0)
    for code, slides in SLIDES.items():
        kind = "benign" if code[0] == "B" else "malignant"
        for i, magnification in enumerate(MAGNIFICATIONS):
            slide = slides[i * len(slides) // len(MAGNIFICATIONS)]
            folder = root / "BreaKHis_v1/histology_slides/breast" / kind / "SOB" / SUBTYPES[code[2:]]
            folder = folder / f"SOB_{code}_{slide}" / f"{magnification}X"
            folder.mkdir(parents=True)
            grain = 10 if kind == "benign" else 4
            noise = np.kron(rng.random((-(-46 // grain), -(-70 // grain), 1)), np.ones((grain, grain, 1)))[:46, :70]
            pixels = noise * (230, 180, 220) + (1 - noise) * (110, 60, 140) + rng.normal(0, 4, (46, 70, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"SOB_{code}-{slide}-{magnification}-001.png")
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder with signature: an untrained tiny network of 64 pixels that knows 0.2 to 0.8 um/px."""
    import timm
    import torch

    from magnification_invariant.model_folder import write_model_folder
    from magnification_invariant.signatures import SignatureProjector

    torch.manual_seed(0)
    model = timm.create_model("test_magdg_resnet", num_classes=2, num_domains=0).eval()
    with torch.no_grad():
        model.fc.weight *= 30  # probabilities that differ
    labels, low, high = ["benign", "malignant"], 0.2, 0.8
    folder = write_model_folder(
        tmp_path_factory.mktemp("model") / "tiny",
        model,
        name="test_magdg_resnet.tiny",
        label_names=labels,
        image_size=64,
        normalisation=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        about={"temperature": 1.5, "mpp_source": [0.5], "base_range": [low, high], "mpp_range": [low, high]},
    )
    SignatureProjector(
        indices=np.array([3, 10, 40]),
        mean=np.zeros(3),
        scale=np.ones(3),
        weight=np.array([[1.0, -2.0, 0.5]]),
        bias=np.array([0.1]),
        width=model.num_features,
        class_names=tuple(labels),
        embedding="penultimate",
        source="test_magdg_resnet.tiny",
        mpp_range=(low, high),
    ).save_pretrained(folder)
    return folder
