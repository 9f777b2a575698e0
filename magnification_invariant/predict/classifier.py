"""A trained model on images of any size and known scale: calibrated probability, signature, and what to make of them.

What reaches the network is decided by micrometres per pixel (mpp), never by the number of pixels. An image whose scale
lies in the model's ``mpp_range`` is left as it is; a finer one is resampled to the range's fine end; a coarser one
cannot be refined and gets a warning. Then it is cut into tiles of the network's input size that cover it evenly, and
logits and embeddings are averaged over the tiles: one view of a small image, two thousand of a large one.
"""

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

from magnification_invariant import metrics
from magnification_invariant.data.apparent_scale import FACTOR, apparent_mpp
from magnification_invariant.data.images import to_rgb
from magnification_invariant.data.scale import read_mpp, rescale
from magnification_invariant.hub_files import snapshot
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.models import embed
from magnification_invariant.predict.inputs import Item, check_mpp, items_of, open_item
from magnification_invariant.records import POSITIVE, last_epoch, part_of
from magnification_invariant.signatures import SignatureProjector

BACKENDS = ("torch", "onnx", "openvino")
ONNX_FILE = "model.onnx"
COLUMNS = ("filename", "width", "height", "native_mpp", "mpp", "apparent_mpp", "tiles", "logits", "probability")
COLUMNS += ("prediction", "signature", "embedding", "warning", "error")


class Network(torch.nn.Module):
    """From pixels as they are stored to logits and embedding: the constants of the eval transform are inside."""

    def __init__(self, model: torch.nn.Module, mean: Sequence[float], std: Sequence[float], embedding: str):
        super().__init__()
        self.model, self.embedding = model, embedding
        for name, value in (("shift", mean), ("scale", std)):
            self.register_buffer(name, 255 * torch.tensor(value, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 RGB (b, 3, size, size) to logits (b, classes) and embedding (b, width)."""
        return embed(self.model, (images.float() - self.shift) / self.scale, self.embedding)


def _run_torch(network: Network, device: torch.device):
    network = network.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(tiles: np.ndarray) -> list[np.ndarray]:
        images = torch.from_numpy(tiles).to(device).contiguous(memory_format=torch.channels_last)
        return [output.float().cpu().numpy() for output in network(images)]

    return run


def _run_onnx(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    return lambda tiles: session.run(None, {"images": tiles})


def _run_openvino(path: Path):
    import openvino

    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_PRECISION_HINT"] = "f32"  # else some CPUs compute in bfloat16, and probabilities differ
    compiled = openvino.compile_model(path, "CPU", config)
    return lambda tiles: list(compiled(tiles).values())


@dataclass
class _Image:
    """An opened image on its way through the network."""

    row: dict
    views: list[np.ndarray] = field(default_factory=list)  # uint8 (height, width, 3), one a scale
    todo: int = 0
    sums: list = field(default_factory=lambda: [0.0, 0.0])  # of logits and embedding


class Classifier:
    """A model with its scale, temperature and signature.

    Attributes:
        folder: where its files lie.
        config: its ``config.json``.
        labels: class names; the second is the positive one.
        size: side of the network's square input in pixels.
        mpp_range: micrometres per pixel at the network's input that it was trained on.
        temperature: what logits are divided by before the softmax; fitted on validation patients.
        projector: the model's `SignatureProjector`, or None.
        network: the `Network` of the backend "torch", else None.
        run: uint8 tiles (n, 3, size, size) to logits and embeddings, by the backend.
    """

    def __init__(self, folder: Path, config: dict, run, *, network=None, projector=None, batch_size: int = 32):
        self.folder, self.config, self.run, self.network = Path(folder), config, run, network
        self.projector, self.batch_size = projector, batch_size
        self.labels, self.temperature = config["label_names"], config["temperature"]
        self.size, self.mpp_range = config["pretrained_cfg"]["input_size"][-1], tuple(config["mpp_range"])

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        backend: str = "torch",
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> "Classifier":
        """Loads a model folder or Hub repository that this package wrote.

        Args:
            repo_or_folder: see `hub_files.resolve`.
            revision: of the Hub repository.
            backend: "torch"; or "onnx" or "openvino", which read the ``model.onnx`` that ``magdg export`` writes.
            device: of the backend "torch"; by default a GPU if there is one.
            batch_size: tiles at a time.

        Raises:
            OSError: there is no such folder, repository or file in it.
            ValueError: it is not a model of this package.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        config = read_model_config(str(repo_or_folder), revision)
        wanted = ("name", "architecture", "num_classes", "label_names", "temperature", "mpp_range", "pretrained_cfg")
        if missing := [key for key in wanted if key not in config]:
            raise ValueError(
                f"{repo_or_folder} is not a model of magnification_invariant: its config.json lacks "
                f"{', '.join(missing)}, and without scale and temperature there is no prediction; load it with timm or "
                "transformers"
            )
        folder, network = snapshot(str(repo_or_folder), revision), None
        projector = SignatureProjector.from_pretrained(folder) if (folder / "signature.json").is_file() else None
        if backend == "torch":
            model = timm.create_model(config["architecture"], num_classes=config["num_classes"]).eval()
            model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
            data = config["pretrained_cfg"]
            network = Network(model, data["mean"], data["std"], projector.embedding if projector else "penultimate")
            run = _run_torch(network.eval(), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        elif (folder / ONNX_FILE).is_file():
            run = (_run_onnx if backend == "onnx" else _run_openvino)(folder / ONNX_FILE)
        else:
            raise FileNotFoundError(
                f"{folder} holds no {ONNX_FILE}: `magdg export {repo_or_folder} --out FOLDER` writes one: name FOLDER "
                "as the model"
            )
        return cls(folder, config, run, network=network, projector=projector, batch_size=batch_size)

    def predict(
        self, images, mpp: float | Sequence[float] | None = None, *, scales: Sequence[float] = (1.0,), strict=False
    ) -> list[dict]:
        """Predicts images, see `items_of` for what they can be and `iterate` for the result.

        A damaged image does not stop the others; if there is no other, its error is raised.

        Raises:
            ValueError: no image could be predicted; or see `items_of`.
        """
        rows = list(self.iterate(items_of(images, mpp), scales=scales, strict=strict))
        failed = [row for row in rows if row["error"]]
        if failed and len(failed) == len(rows):
            raise ValueError(f"no image could be predicted; {failed[0]['filename']}: {failed[0]['error']}")
        doubtful = [row for row in rows if row["warning"]]
        if doubtful:
            warnings.warn(f"{len(doubtful)} of {len(rows)} images, first: {doubtful[0]['warning']}", stacklevel=2)
        return rows

    def iterate(
        self, items: Iterable[Item], *, scales: Sequence[float] = (1.0,), strict: bool = False
    ) -> Iterator[dict]:
        """Predicts items one after the other, in order; a few are opened ahead by threads, no more are held.

        Args:
            items: see `items_of`.
            scales: factors of at least 1, by which the image is also shown coarser; the views are averaged, those that
                would leave the model's range are left out.
            strict: an image coarser than the model's range is an error, not a warning.

        Yields:
            A dict an image: ``filename``; ``width``, ``height`` and ``native_mpp`` as stored; ``mpp`` at the network's
            input; ``apparent_mpp`` (see `data.apparent_scale`); ``tiles``; ``logits`` (mean over tiles); the calibrated
            ``probability`` of the positive class; ``prediction``; ``signature`` and ``embedding``; ``warning``;
            ``error``. What does not exist is None.
        """
        if min(scales) < 1:
            raise ValueError(f"scales show an image coarser, by factors of at least 1, not {min(scales):g}")
        workers = max(2, torch.get_num_threads())
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[_Image] = deque()
            batch: list[tuple[_Image, np.ndarray, float]] = []
            for image in _ahead(pool, lambda item: self._load(item, scales, strict), items, 2 * workers):
                waiting.append(image)
                corners = [self.corners(view) for view in image.views]
                image.todo = image.row["tiles"] = sum(map(len, corners))
                for view, places in zip(image.views, corners, strict=True):
                    for top, left in places:
                        tile = view[top : top + self.size, left : left + self.size]
                        batch.append((image, tile, 1 / (len(corners) * len(places))))
                        if len(batch) == self.batch_size:
                            self._run(batch)
                            batch = []
                while waiting and not waiting[0].todo:
                    yield self._finish(waiting.popleft())
            if batch:
                self._run(batch)
            yield from map(self._finish, waiting)

    def corners(self, view: np.ndarray) -> list[tuple[int, int]]:
        """(top, left) of the fewest tiles that cover a view (height, width, 3), evenly spread."""
        lines, columns = (
            np.linspace(0, side - self.size, math.ceil(side / self.size)).round().astype(int).tolist()
            for side in view.shape[:2]
        )
        return [(top, left) for top in lines for left in columns]

    def padded(self, view: np.ndarray) -> np.ndarray:
        """A view (height, width, 3), continued by reflection to at least the network's input.

        Raises:
            ValueError: it is so small that hardly anything would be tissue.
        """
        height, width = view.shape[:2]
        if min(height, width) < self.size / 4:
            raise ValueError(
                f"{width} x {height} pixels are left at the model's scale, fewer than a quarter of the network's input "
                f"of {self.size}: too small a field"
            )
        extra = [max(0, self.size - side) for side in (height, width)]
        return np.pad(view, [(e // 2, e - e // 2) for e in extra] + [(0, 0)], "symmetric") if any(extra) else view

    def _load(self, item: Item, scales: Sequence[float], strict: bool) -> _Image:
        row = dict.fromkeys(COLUMNS) | {"filename": item.name, "native_mpp": item.mpp}
        loaded = _Image(row)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are what tiles are for
                image = open_item(item.image)
                frames = getattr(image, "n_frames", 1)
                native = item.mpp
                if native is None and isinstance(item.image, str | Path):
                    native = read_mpp(item.image)
                if native is None:
                    raise ValueError("its scale is not known: the file does not state it, so pass mpp")
                row["native_mpp"] = native = check_mpp(native)
                image = to_rgb(image)
            row["width"], row["height"] = image.size
            row["apparent_mpp"] = apparent_mpp(image)
            row["mpp"] = max(native, self.mpp_range[0])
            if strict and native > self._coarsest:
                raise ValueError(self._coarser(native))
            for scale in scales:
                if scale == 1 or row["mpp"] * scale <= self._coarsest:
                    view = np.asarray(_at(image, native, row["mpp"] * scale))
                    loaded.views.append(self.padded(view))
            row["warning"] = "; ".join(self._doubts(row, native, frames)) or None
        except Exception as error:  # Pillow raises whatever its decoders do; one bad file must not stop the others
            row["error"] = str(error) or type(error).__name__
            loaded.views = []
        return loaded

    @property
    def _coarsest(self) -> float:
        return self.mpp_range[1] * 1.001  # a scale rounded to three digits is the range's end

    def _coarser(self, native: float) -> str:
        return (
            f"{native:g} um/px is coarser than the model knows ({self.mpp_range[0]:.3g} to {self.mpp_range[1]:.3g}), "
            "and detail that is not there cannot be made" + (": was a magnification meant?" if native >= 4 else "")
        )

    def _doubts(self, row: dict, native: float, frames: int) -> Iterator[str]:
        if native > self._coarsest:
            yield self._coarser(native)
        looks = row["apparent_mpp"]
        if looks and not 1 / FACTOR < looks / native < FACTOR:
            yield f"the nuclei look like about {looks:.2g} um/px, the scale is said to be {native:g}: check it"
        if min(row["width"], row["height"]) * native < self.size * row["mpp"] * (1 - 1e-6):
            yield f"it is smaller than the network's input of {self.size} pixels and was continued by reflection"
        if frames > 1:
            yield f"it has {frames} frames, the first was taken"

    def _run(self, batch: list[tuple[_Image, np.ndarray, float]]) -> None:
        tiles = np.stack([tile.transpose(2, 0, 1) for _, tile, _ in batch])
        for (image, _, weight), *outputs in zip(batch, *self.run(tiles), strict=True):
            image.todo -= 1
            image.sums = [
                total + weight * output.astype(np.float64) for total, output in zip(image.sums, outputs, strict=True)
            ]

    def _finish(self, image: _Image) -> dict:
        row = image.row
        if not row["error"]:
            logits, embedding = image.sums
            probability = metrics.apply_temperature(logits[None], self.temperature)[0]
            row |= {"logits": logits.tolist(), "probability": float(probability[POSITIVE]), "embedding": embedding}
            row["prediction"] = self.labels[int(logits.argmax())]
            if self.projector:
                row["signature"] = self.projector.transform(embedding[None])[0].tolist()
        return row

    def zoom_views(self, image: Image.Image, mpp: float, n: int) -> list[tuple[float, Image.Image]]:
        """The same image at up to `n` scales (um/px), each with its pixels.

        From the finest that can be shown without inventing detail to the coarsest that the model knows and at which
        the image still fills the network's input; one scale if there is no more.
        """
        low = max(check_mpp(mpp), self.mpp_range[0])
        high = max(low, min(self.mpp_range[1], min(image.size) * mpp / self.size))
        scales = np.geomspace(low, high, n).tolist() if high > low * 1.01 else [low]
        return [(scale, _at(image, mpp, scale)) for scale in scales]

    def zoom_curve(self, image: Image.Image, mpp: float, n: int = 7) -> tuple[np.ndarray, np.ndarray]:
        """Scales (um/px) and the probability of the positive class that this one image gets at each: `zoom_views`.

        Raises:
            ValueError: the image cannot be predicted.
        """
        items = [Item(f"{scale:.3g} um/px", view, scale) for scale, view in self.zoom_views(to_rgb(image), mpp, n)]
        rows = list(self.iterate(items))
        if rows[0]["error"]:
            raise ValueError(rows[0]["error"])
        return np.array([row["mpp"] for row in rows]), np.array([row["probability"] for row in rows], float)

    def reliability(self, probability: float) -> str:
        """What became of images that were given about this probability, in a sentence; by the model's own records."""
        virtual = " Trained on virtual slides: it says nothing about patients."
        note = virtual if self.config.get("trained_on") == "virtual" else ""
        if not (self.folder / "predictions.parquet").is_file():
            return f"How far its probabilities can be trusted is not recorded with this model.{note}"
        test = part_of(last_epoch(self.folder), "test", self.temperature)
        weight = metrics.patient_weights(test["patient"])
        curve = metrics.reliability_curve(test["label"], test["probability"], weight, n_bins=8)
        i = int(np.abs(curve.predicted - probability).argmin())
        return (
            f"Of test images that were given about {curve.predicted[i]:.2f}, {curve.observed[i]:.0%} were "
            f"{self.labels[POSITIVE]} (by some {curve.rows[i]:.0f} images).{note}"
        )

    def __repr__(self) -> str:
        low, high = self.mpp_range
        return f"Classifier({self.config['name']}, {self.size} px, {low:.3g} to {high:.3g} um/px)"


def _at(image: Image.Image, native: float, mpp: float) -> Image.Image:
    return image if math.isclose(native, mpp, rel_tol=1e-3) else rescale(image, mpp, native_mpp=native)


def _ahead(pool: ThreadPoolExecutor, function, items: Iterable, n: int) -> Iterator:
    """`map` by a pool that is at most `n` items ahead."""
    items = iter(items)
    futures = deque(pool.submit(function, item) for item in islice(items, n))
    while futures:
        yield futures.popleft().result()
        futures.extend(pool.submit(function, item) for item in islice(items, 1))
