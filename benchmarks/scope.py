"""Does a model notice what it does not know? False alarms and detection of the packaged weights' scope, kind by kind.

    python benchmarks/scope.py --out benchmarks/results/scope.md            # patients that set nothing
    python benchmarks/scope.py --development                                # what the layer was chosen by
    python benchmarks/scope.py --package                                    # writes scope and figures into the weights

The covariance is that of the images that the weights were trained on, the threshold that of their validation patients,
both drawn anew (virtual slides are deterministic; the recorded logits are asked whether they are the same). False
alarms and what is altered are of patients from 10,000 on, or, with `--development`, of 40 from 6,400 on. Early stages
and the penultimate layer stand side by side. Images are shown as `Classifier` shows them by default.

Photographs are those that come with scikit-image, scikit-learn and matplotlib. Real images, where they lie beside the
repository, are BreaKHis at 100X; none of their pixels is kept.
"""

import argparse
import importlib
import io
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "magnification_invariant" / "weights" / "magdg_resnet18.virtual"
# First patient, patients, images a magnification: as benchmarks/train_virtual.py was run, and of the development.
COHORTS = {"train": (0, 300, 4), "val": (300, 80, 4), "test": (10_000, 120, 4), "dev": (6_400, 150, 3)}
DEVELOPMENT = 40  # patients of these, the first
SIZE = (350, 230)
LAYERS = ("stage 1", "stage 2", "penultimate")
STAGES = (1, 2)
MPP = 0.394  # said of what has no scale

# Optical densities of stains in RGB: Ruifrok & Johnston 2001, and the colour deconvolution of ImageJ.
HE = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
STAINS = {
    "haematoxylin and DAB (brown)": (HE[0], (0.268, 0.570, 0.776)),
    "trichrome (blue and red)": ((0.800, 0.591, 0.105), (0.100, 0.737, 0.668)),
    "methyl green and DAB": ((0.980, 0.144, 0.133), (0.268, 0.570, 0.776)),
    "blue alone": ((0.800, 0.591, 0.105), (0.800, 0.591, 0.105)),
    "grey": ((0.577, 0.577, 0.577), (0.577, 0.577, 0.577)),
}
PHOTOGRAPHS = {
    "photographs": [
        ("skimage.data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
        ("sklearn.datasets.images", ("china.jpg", "flower.jpg")),
        ("matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",)),
    ],
    "grey textures, pages, coins": [
        ("skimage.data", ("brick.png", "grass.png", "gravel.png", "camera.png", "coins.png", "moon.png", "page.png"))
    ],
    "retina and galaxies": [("skimage.data", ("retina.jpg", "hubble_deep_field.jpg"))],
    "real immunohistochemistry (brown)": [("skimage.data", ("ihc.png",))],
}


def recoloured(image: Image.Image, stains: tuple) -> Image.Image:
    """Haematoxylin and eosin of an RGB image in the colours of two other stains; the residual is left out."""
    from_, to = (np.array(each) / np.linalg.norm(each, axis=1, keepdims=True) for each in (HE, stains))
    density = -np.log(np.asarray(image, np.float64).clip(1) / 255)
    amounts = (density @ np.linalg.inv(from_))[..., :2].clip(0)
    return _image(255 * np.exp(-amounts @ to))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def altered(image: Image.Image, mpp: float, rng: np.random.Generator) -> Iterator[tuple[str, Image.Image, float]]:
    """Kind, image and the um/px that is said of it, of one virtual field."""
    for name, stains in STAINS.items():
        yield f"other stain: {name}", recoloured(image, stains), mpp
    pixels = np.asarray(image, np.float64)
    for deviation in (20, 60):
        yield f"noise of {deviation} of 255", _image(pixels + rng.normal(0, deviation, pixels.shape)), mpp
    for radius in (4, 12):
        yield f"blurred, sigma {radius} pixels", image.filter(ImageFilter.GaussianBlur(radius)), mpp
    yield "JPEG, quality 5", _jpeg(image, 5), mpp
    for factor in (1 / 4, 1 / 2, 2, 4):
        yield f"said to be {factor:g} times as coarse", image, mpp * factor
    white = np.full_like(pixels, 243) + rng.normal(0, 2, pixels.shape)
    yield "blank: white", _image(white), mpp
    yield "blank: its mean colour", _image(pixels * 0 + pixels.mean((0, 1)) + rng.normal(0, 2, pixels.shape)), mpp
    yield "noise alone", _image(rng.uniform(0, 255, pixels.shape)), mpp


def photographs() -> Iterator[tuple[str, Image.Image, float]]:
    """Fields of `SIZE` of pictures that come with Python packages, at most six of each, at two sizes."""
    for kind, packages in PHOTOGRAPHS.items():
        for package, names in packages:
            for name in names:
                file = Path(importlib.import_module(package).__file__).parent / name
                with Image.open(file) as opened:
                    image = opened.convert("RGB")
                whole = image.resize(SIZE, Image.Resampling.BILINEAR)
                columns, lines = image.width // SIZE[0], image.height // SIZE[1]
                places = [(x * SIZE[0], y * SIZE[1]) for y in range(lines) for x in range(columns)][:5]
                for field in (whole, *(image.crop((x, y, x + SIZE[0], y + SIZE[1])) for x, y in places)):
                    yield kind, field, MPP


def real_fields(folder: Path, n: int) -> Iterator[tuple[str, Image.Image, float]]:
    """Up to `n` real images, evenly from all."""
    from magnification_invariant import load_breakhis

    ds = load_breakhis(folder)
    for row in np.unique(np.linspace(0, len(ds) - 1, n).round().astype(int)).tolist():
        each = ds[row]
        yield f"real tissue, BreaKHis at {each['magnification']}X", each["image"].convert("RGB"), each["mpp"]


class Layers:
    """Logits and statistics of all layers, from one pass."""

    def __init__(self, folder: Path):
        from magnification_invariant.predict import Classifier

        self.classifier = Classifier.from_pretrained(folder, device="cpu")
        self.network = self.classifier.network.eval()

    @torch.inference_mode()
    def run(self, tiles: np.ndarray) -> list[np.ndarray]:
        from magnification_invariant.models import channel_statistics

        images = torch.from_numpy(tiles).contiguous(memory_format=torch.channels_last)
        model = self.network.model
        x, stages = model.forward_intermediates(
            (images.float() - self.network.shift) / self.network.scale, indices=list(STAGES)
        )
        pooled = model.forward_head(x, pre_logits=True)
        statistics = [channel_statistics(stage) for stage in stages]
        return [each.numpy() for each in (model.get_classifier()(pooled), *statistics, pooled)]

    def of(self, fields: list[tuple[Image.Image, float]]) -> dict[str, np.ndarray]:
        """`LAYERS` and "logits" of fields and their um/px, as `Classifier` shows them; (n, d) each."""
        from magnification_invariant.data.views import mean_over_tiles, tiles

        views = (self.classifier.view_of(*field)[0].pixels for field in fields)
        outputs = mean_over_tiles(self.run, (tiles(view, self.classifier.size) for view in views), 64)
        columns = zip(*outputs, strict=True)
        return {name: np.stack(column) for name, column in zip(("logits", *LAYERS), columns, strict=True)}

    def of_cohort(self, name: str, cache: Path) -> dict[str, np.ndarray]:
        """The same of a cohort in the protocol view, with ``patient`` and ``filename``; kept in `cache`."""
        from magnification_invariant.data.pixels import ViewCache
        from magnification_invariant.data.views import mean_over_tiles

        file = cache / f"{name}.npz"
        if not file.is_file():
            ds = cohort(name)
            views = ViewCache(ds, self.classifier.size).views(np.arange(len(ds)))
            columns = zip(*mean_over_tiles(self.run, views, 64), strict=True)
            arrays = {key: np.stack(column) for key, column in zip(("logits", *LAYERS), columns, strict=True)}
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, **arrays, **{key: np.array(ds[key][:]) for key in ("patient", "filename")})
        with np.load(file) as arrays:
            return dict(arrays)


def cohort(name: str):
    """Table of virtual slides."""
    from magnification_invariant import load_virtual_slides

    first, n, images = COHORTS[name]
    ds = load_virtual_slides(n, first_patient=first, images_per_magnification=images, size=SIZE)
    patient = np.array(ds["patient"][:])
    return ds.select(np.flatnonzero(np.isin(patient, np.unique(patient)[:DEVELOPMENT]))) if name == "dev" else ds


def check_records(folder: Path, val: dict[str, np.ndarray]) -> None:
    """Whether these are the images that the weights were validated by, and these the weights."""
    from magnification_invariant.records import Run

    recorded = Run(folder).part("val")
    order, ours = np.argsort(recorded["filename"]), np.argsort(val["filename"])
    if list(recorded["filename"][order]) != list(val["filename"][ours]):
        raise SystemExit("the recorded validation images are others")
    apart = np.abs(recorded["logits"][order] - val["logits"][ours]).max()
    if apart > 1e-3:
        raise SystemExit(f"the recorded logits differ by {apart:.2g}: the weights or the slides are others")


def scopes(layers: Layers, args) -> dict:
    """A `Scope` a layer, of the training and validation images."""
    from magnification_invariant.scope import Scope
    from magnification_invariant.signatures import weights_digest

    train, val = (layers.of_cohort(name, args.cache) for name in ("train", "val"))
    check_records(args.model, val)
    known = {"weights_sha256": weights_digest(layers.network.model)}
    return {
        layer: Scope.fit(train[layer], val[layer], val["patient"], stage=stage, **known)
        for layer, stage in zip(LAYERS, (*STAGES, -1), strict=True)
    }


def measure(args) -> tuple[dict, dict]:
    """The scopes, and share out of scope and number of images by kind and layer; false alarms first."""
    layers = Layers(args.model)
    fitted = scopes(layers, args)
    name = "dev" if args.development else "test"
    known = layers.of_cohort(name, args.cache)
    alarms = {layer: scope.share_out(known[layer], known["patient"]) for layer, scope in fitted.items()}
    rows = {"virtual slides as they are (false alarms)": alarms | {"images": len(known["patient"])}}
    ds, rng, kinds = cohort(name), np.random.default_rng(0), {}
    chosen = np.random.default_rng(1).choice(len(ds), min(args.fields, len(ds)), replace=False)
    for row in sorted(chosen.tolist()):
        for kind, image, mpp in altered(ds[row]["image"].convert("RGB"), ds[row]["mpp"], rng):
            kinds.setdefault(kind, []).append((image, mpp))
    real = args.real and real_fields(args.real, args.fields) if args.real.is_dir() else ()
    for kind, image, mpp in (*photographs(), *real):
        kinds.setdefault(kind, []).append((image, mpp))
    for kind, fields in kinds.items():
        outputs = layers.of(fields)
        out = {layer: float((s.distance(outputs[layer]) > s.threshold).mean()) for layer, s in fitted.items()}
        rows[kind] = out | {"images": len(fields)}
        print(kind, rows[kind], flush=True)
    return fitted, rows


def package(folder: Path, fitted: dict, rows: dict) -> None:
    """Writes the scope of the layer in use, and the figures for its card."""
    from magnification_invariant.files import read_json, write_json
    from magnification_invariant.models import scope_stage
    from magnification_invariant.predict import Classifier

    stage = scope_stage(Classifier.from_pretrained(folder, device="cpu").network.model)
    layer = f"stage {stage}"
    fitted[layer].save_pretrained(folder)
    alarms, *kinds = rows.items()
    results = read_json(folder / "results.json")
    results["scope"] = {"stage": stage, "threshold": fitted[layer].threshold, "patients": COHORTS["val"][1]}
    results["scope"]["false_alarms"] = {"test_source": alarms[1][layer]}
    results["scope"]["detection"] = {kind: {"images": row["images"], "share": row[layer]} for kind, row in kinds}
    write_json(folder / "results.json", results)


def write(rows: dict, fitted: dict, args) -> str:
    first = COHORTS["dev" if args.development else "test"][0]
    lines = [
        "# What is out of scope, and what of it is noticed",
        "",
        f"`python benchmarks/scope.py{' --development' * args.development} --fields {args.fields}`",
        "",
        f"{platform.machine()}, torch {torch.__version__}; `{args.model.name}`, virtual patients from {first:,} on.",
        "Share of images called out of scope. Thresholds are the patient-balanced 99 % quantile of 80 validation",
        "patients: about 1 % is what is expected of images like theirs, and of a kind that is *not noticed*.",
        "",
        f"| kind | images | {' | '.join(LAYERS)} |",
        "|---|---|" + "---|" * len(LAYERS),
    ]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {row['images']} | {' | '.join(f'{row[layer]:.1%}' for layer in LAYERS)} |")
    lines += ["", "Thresholds: " + ", ".join(f"{layer} {fitted[layer].threshold:.2f}" for layer in LAYERS) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the packaged weights")
    parser.add_argument("--fields", type=int, default=120, help="that are altered, and real ones; default: %(default)s")
    parser.add_argument("--development", action="store_true", help="patients that decisions may be made by")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "breakhis-real", help="skipped if absent")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "scope", help="of outputs; default: %(default)s")
    parser.add_argument("--package", action="store_true", help="write scope and figures into the model's folder")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fitted, rows = measure(args)
    text = write(rows, fitted, args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if args.package:
        if args.development:
            raise SystemExit("the card's figures are of patients that set nothing: leave --development out")
        package(args.model, fitted, rows)


if __name__ == "__main__":
    main()
