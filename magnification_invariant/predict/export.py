"""ONNX for the CPU: a model with its preprocessing in one file, for ONNX Runtime and OpenVINO, in 32 or 8 bits."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from magnification_invariant import metrics
from magnification_invariant.data.views import tiles
from magnification_invariant.engine import Network
from magnification_invariant.files import whole
from magnification_invariant.predict.classifier import ONNX_FILE, Classifier
from magnification_invariant.predict.inputs import Item
from magnification_invariant.records import POSITIVE

TOLERANCE = 1e-3  # of a logit, as a share of the largest
ALLOWED_CHANGE = 0.02  # of the probability by 8 bits, at the 99th percentile
TILES = 256  # half of them calibrate, half judge
_CARRIED = (
    "config.json",
    "signature.json",
    "signature.safetensors",
    "scope.safetensors",
    "predictions.parquet",
    "results.json",
    "README.md",
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        error: largest difference of a logit to PyTorch's, as a share of the largest logit, of the 32-bit file.
        change: 99th percentile of the change of the probability by 8 bits; None if they were not asked for.
        int8: whether the file computes in 8 bits.
    """

    path: Path
    error: float
    change: float | None = None
    int8: bool = False


def export(
    repo_or_folder: str | Path, out: str | Path | None = None, *, calibration: list[Item] | None = None
) -> Exported:
    """Writes ``model.onnx``: uint8 RGB ``images`` (batch, 3, size, size), any batch, to ``logits`` and ``embedding``.

    Of a model with a scope the statistics that it is of are a third output, ``statistics``; an 8-bit file has none,
    because 8 bits change them: what it predicts has no ``in_scope``.

    Args:
        repo_or_folder: see `Classifier.from_pretrained`.
        out: folder to write to, which becomes a model folder for the backends "onnx" and "openvino"; by default the
            model's own.
        calibration: images for static quantisation to 8 bits; None keeps 32. The 8-bit file is kept only if, on the
            other half of their tiles, the probability changes by at most `ALLOWED_CHANGE`.

    Raises:
        RuntimeError: ONNX Runtime does not give PyTorch's logits within `TOLERANCE`.
        ValueError: there are too few calibration tiles, or the model is on the Hub and `out` is not given.
    """
    classifier = Classifier.from_pretrained(repo_or_folder, device="cpu")
    network = classifier.network
    assert network is not None  # of the backend torch
    if out is None and not Path(repo_or_folder).expanduser().is_dir():
        raise ValueError(f"{repo_or_folder} is a Hub repository: say with --out which folder to write to")
    size = classifier.size
    noise = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8)
    pieces = noise if calibration is None else _tiles(classifier, calibration)
    out = classifier.folder if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        exact, small = Path(folder, "exact.onnx"), Path(folder, "small.onnx")
        _write(network, size, exact)
        logits = np.concatenate([classifier.run(part)[0] for part in _batches(pieces)])
        error = float(np.abs(_logits(exact, pieces) - logits).max() / np.abs(logits).max())
        if error > TOLERANCE:
            raise RuntimeError(f"the exported logits differ from PyTorch's by {error:.2g} of the largest")
        change, keep = None, exact
        if calibration is not None:
            plain = exact
            if network.stage is not None:
                plain = Path(folder, "plain.onnx")
                _write(Network(network.model, network.embedding).eval(), size, plain)
            _quantise(plain, small, pieces[::2])
            before, after = (
                metrics.apply_temperature(each, classifier.temperature)[:, POSITIVE]
                for each in (logits[1::2], _logits(small, pieces[1::2]))
            )
            change = float(np.percentile(np.abs(after - before), 99))
            keep = small if change <= ALLOWED_CHANGE else exact
        for name in _CARRIED:
            if out != classifier.folder and (classifier.folder / name).is_file():
                shutil.copy(classifier.folder / name, out)
        with whole(out / ONNX_FILE) as unfinished:
            shutil.copyfile(keep, unfinished)
    return Exported(out / ONNX_FILE, error, change, keep is small)


def _write(network: Network, size: int, path: Path) -> None:
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    program = torch.onnx.export(
        network,
        (example,),
        input_names=["images"],
        output_names=["logits", "embedding", "statistics"][: 2 if network.stage is None else 3],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo, an ONNXProgram
    program.save(path, external_data=False)


def _logits(path: Path, pieces: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"images": part})[0] for part in _batches(pieces)])


def _batches(pieces: np.ndarray) -> list[np.ndarray]:
    return [pieces[i : i + 32] for i in range(0, len(pieces), 32)]


def _tiles(classifier: Classifier, items: list[Item]) -> np.ndarray:
    """The first `TILES` that the network would see of `items`, as the classifier cuts them."""
    seen: list[np.ndarray] = []
    for item in items:
        loaded = classifier.load(item)
        if loaded.view is None:
            raise ValueError(f"{item.name} cannot calibrate: {loaded.row['error']}")
        seen.extend(tiles(loaded.view.pixels, classifier.size))
        if len(seen) >= TILES:
            break
    if len(seen) < 16:
        raise ValueError(f"the calibration images give {len(seen)} tiles at the model's scale; 16 are the least")
    return np.stack(seen[:TILES])


def _quantise(exact: Path, small: Path, pieces: np.ndarray) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(_batches(pieces))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    prepared = small.with_name("prepared.onnx")
    quant_pre_process(exact, prepared, skip_symbolic_shape=True)  # folds batch norm into the convolutions
    quantize_static(
        prepared,
        small,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Add", "MaxPool", "Gemm"],  # the normalisation stays exact
    )
