"""A trained model on images of any size and known scale: calibrated probability, signature, and what to make of them.

What reaches the network is decided by micrometres per pixel (mpp), never by the number of pixels, in the same view that
the model's records were made in: see `data.views`.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from magnification_invariant import metrics
from magnification_invariant.data.apparent_scale import FACTOR, apparent_mpp
from magnification_invariant.data.images import to_rgb
from magnification_invariant.data.pixels import ahead
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import StatedScale
from magnification_invariant.data.views import View, mean_over_tiles, show, tiles, view_mpp
from magnification_invariant.engine import Network
from magnification_invariant.model_folder import load_model, open_model
from magnification_invariant.predict.inputs import Item, items_of, open_item, pillow_warnings, scale_of
from magnification_invariant.records import OUT_OF_FOLD, POSITIVE, Run
from magnification_invariant.scope import FILE as SCOPE_FILE
from magnification_invariant.scope import Scope
from magnification_invariant.signatures import SignatureProjector

BACKENDS = ("torch", "onnx", "openvino")
ONNX_FILE = "model.onnx"
OUT_OF_SCOPE = "it is out of the model's scope: unlike what the model was trained on, whatever the answer says"
COLUMNS = ("filename", "width", "height", "native_mpp", "mpp", "apparent_mpp", "tiles", "filled", "logits")
COLUMNS += ("probability", "prediction", "signature", "embedding", "in_scope", "scope_percentile")
COLUMNS += ("warning", "error")
Runner = Callable[[np.ndarray], Sequence[np.ndarray]]  # uint8 tiles (n, 3, size, size) to logits, embeddings, ...


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    return lambda tiles: [np.asarray(output) for output in session.run(None, {"images": tiles})]


def _run_openvino(path: Path) -> Runner:
    import openvino

    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_PRECISION_HINT"] = "f32"  # else some CPUs compute in bfloat16, and probabilities differ
    compiled = openvino.compile_model(path, "CPU", config)
    return lambda tiles: list(compiled(tiles).values())


@dataclass
class Loaded:
    """An opened image on its way through the network: its row as far as it is known, and no view where that failed."""

    row: dict[str, Any]
    view: View | None = None


class Classifier:
    """A model with its scale, temperature and signature.

    Attributes:
        folder: where its files lie.
        source: what to load it by again, in any process: the folder, or the Hub repository.
        config: its ``config.json``.
        labels: class names; the second is the positive one.
        size: side of the network's square input in pixels.
        base_range: least and largest um/px at which an image of the training filled the network's input; None of a
            model that was trained on images of unknown scale, which shows every image in the protocol view.
        mpp_range: um/px that it was shown in training, zoom included; None as `base_range`.
        temperature: what logits are divided by before the softmax; fitted on validation patients.
        projector: the model's `SignatureProjector`, or None.
        scope: the model's `Scope`, or None of a model that has none.
        network: the `engine.Network` of the backend "torch", else None.
        run: uint8 tiles (n, 3, size, size) to logits, embeddings and, of a model with a scope, the statistics that are
            looked at for it, by the backend.
    """

    def __init__(
        self, folder: Path, config: dict, run: Runner, *, network=None, projector=None, scope=None, batch_size: int = 32
    ):
        self.folder, self.config, self.run, self.network = Path(folder), config, run, network
        self.projector, self.scope, self.batch_size = projector, scope, batch_size
        self.source = str(self.folder.resolve())
        self.labels, self.temperature = config["label_names"], config["temperature"]
        self.size = config["pretrained_cfg"]["input_size"][-1]
        self.base_range, self.mpp_range = config.get("base_range"), config.get("mpp_range")

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
        """Loads a model folder (or the folder of its run), or a Hub repository, that this package wrote.

        Args:
            repo_or_folder: see `hub_files.resolve`.
            revision: of the Hub repository.
            backend: "torch"; or "onnx" or "openvino", which read the ``model.onnx`` that ``magdg export`` writes.
            device: of the backend "torch"; by default a GPU if there is one.
            batch_size: tiles at a time.

        Raises:
            OSError: there is no such folder, repository or file in it.
            ValueError: it is not a model of this package, or a file of it is damaged.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        folder, config = open_model(str(repo_or_folder), revision)
        network, projector, scope = None, None, None
        if any((folder / f"signature.{kind}").is_file() for kind in ("json", "safetensors")):
            projector = SignatureProjector.from_pretrained(folder)
        if (folder / SCOPE_FILE).is_file():
            scope = Scope.from_pretrained(folder)
        if backend == "torch":
            model = load_model(folder, config)
            network = Network(model, projector.embedding if projector else "penultimate", scope and scope.stage)
            run = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).runner()
        elif (folder / ONNX_FILE).is_file():
            run = (_run_onnx if backend == "onnx" else _run_openvino)(folder / ONNX_FILE)
        else:
            raise FileNotFoundError(
                f"{folder} holds no {ONNX_FILE}: `magdg export {repo_or_folder} --out FOLDER` writes one: name FOLDER "
                "as the model"
            )
        parts = {"network": network, "projector": projector, "scope": scope}
        classifier = cls(folder, config, run, batch_size=batch_size, **parts)
        if not Path(repo_or_folder).expanduser().is_dir():
            classifier.source = str(repo_or_folder)
        return classifier

    def predict(
        self,
        images,
        mpp: float | Sequence[float] | None = None,
        *,
        view: str | float = "normalised",
    ) -> list[dict]:
        """Predicts images, see `items_of` for what they can be and `iterate` for the result.

        A damaged image does not stop the others; if there is no other, its error is raised.

        Raises:
            ValueError: no image could be predicted; or see `items_of`.
        """
        rows = list(self.iterate(items_of(images, mpp), view=view))
        failed = [row for row in rows if row["error"]]
        if failed and len(failed) == len(rows):
            raise ValueError(f"no image could be predicted; {failed[0]['filename']}: {failed[0]['error']}")
        doubtful = [row for row in rows if row["warning"]]
        if doubtful:
            warnings.warn(f"{len(doubtful)} of {len(rows)} images, first: {doubtful[0]['warning']}", stacklevel=2)
        return rows

    def iterate(self, items: Iterable[Item], *, view: str | float = "normalised") -> Iterator[dict]:
        """Predicts items one after the other, in order; a few are opened ahead by threads, no more are held.

        Args:
            items: see `items_of`.
            view: see `data.views.view_mpp`: "normalised" for a scale that the model was trained on, "protocol" for the
                whole field as its records were made, or um/px at the network's input.

        Yields:
            A dict an image: ``filename``; ``width``, ``height`` and ``native_mpp`` as stored; ``mpp`` at the network's
            input; ``apparent_mpp`` (see `data.apparent_scale`); ``tiles``; ``filled``, the share of them that continues
            the image by reflection; ``logits`` (mean over tiles); the calibrated ``probability`` of the positive class;
            ``prediction``; ``signature`` and ``embedding``; ``in_scope`` and ``scope_percentile`` (see `scope`);
            ``warning``; ``error``. What does not exist is None.
        """
        loaded: list[Loaded] = []

        def shown(pool: ThreadPoolExecutor) -> Iterator[np.ndarray | list]:
            for image in ahead(pool, lambda item: self.load(item, view), items, 2 * workers):
                loaded.append(image)
                pieces = [] if image.view is None else tiles(image.view.pixels, self.size)
                image.view, image.row["tiles"] = None, len(pieces) or None
                yield pieces

        workers = max(2, torch.get_num_threads())
        with ThreadPoolExecutor(workers) as pool:
            for outputs in mean_over_tiles(self.run, shown(pool), self.batch_size):
                yield self._finished(loaded.pop(0).row, outputs)

    def predict_slide(self, path: str | os.PathLike, out: str | os.PathLike, **options: Any) -> dict[str, Any]:
        """Predicts the tissue of a whole slide into a folder; needs the extra "wsi".

        Args:
            path: of any kind that OpenSlide reads.
            out: folder; what is written there, and `options`: see `predict.slides.predict_slides`.

        Returns:
            The slide's row: its probability, scale, number of tiles, share of tissue, warning.

        Raises:
            ModuleNotFoundError: OpenSlide is not installed.
            ValueError: it cannot be predicted: no slide, no scale, no tissue, damaged.
        """
        from magnification_invariant.predict.slides import predict_slides

        (row,) = predict_slides(self, [path], out, **options)
        if row["error"]:
            raise ValueError(f"{row['slide']}: {row['error']}")
        return row

    def view_of(
        self, image: Image.Image, native: float | None, view: str | float = "normalised", note: str = ""
    ) -> tuple[View, float]:
        """An RGB image as the network is shown it, and its um/px at the network's input.

        Args:
            image: RGB.
            native: Its um/px, None where unknown.
            view: See `data.views.view_mpp`.
            note: Why it is unknown.

        Raises:
            ValueError: Its scale is not known, and the view is chosen by it; it is too small.
        """
        if native is None and ((view == "normalised" and self.base_range) or not isinstance(view, str)):
            why = note or "the file does not state it"
            raise ValueError(f"its scale is not known: {why}; say its micrometres per pixel (mpp)")
        mpp = float(view_mpp(view, native or 1.0, min(image.size), self.size, self.base_range))
        return show(image, native or 1.0, mpp, self.size), mpp if native else float("nan")

    def load(self, item: Item, view: str | float = "normalised") -> Loaded:
        """Opens an item and shows it, see `iterate`; what goes wrong is the row's error."""
        loaded = Loaded(dict.fromkeys(COLUMNS) | {"filename": item.name, "native_mpp": item.mpp})
        row, notes = loaded.row, []
        try:
            with pillow_warnings(notes):
                image = open_item(item.image, notes)
                frames = getattr(image, "n_frames", 1)
                stated = StatedScale(check_mpp(item.mpp)) if item.mpp is not None else scale_of(item.image)
                row["native_mpp"] = native = stated.mpp
                image = to_rgb(image, notes)
            row["width"], row["height"] = image.size
            row["apparent_mpp"] = apparent_mpp(image)
            loaded.view, mpp = self.view_of(image, native, view, stated.note)
            row["mpp"], row["filled"] = (mpp if native else None), loaded.view.filled
            notes = [stated.note] * bool(stated.note) + notes + [*self.doubts(row, native, frames)]
            row["warning"] = "; ".join(notes) or None
        except Exception as error:  # Pillow raises whatever its decoders do; one bad file must not stop the others
            text = str(error) or type(error).__name__
            loaded.view = None
            row["error"] = text.encode("utf-8", "backslashreplace").decode()  # names in it may be odd
        return loaded

    def doubts(self, row: dict, native: float | None, frames: int = 1) -> Iterator[str]:
        """What is doubtful about an image, by `apparent_mpp` and `filled` of its row, its um/px and its frames."""
        low, high = self.mpp_range or (0.0, math.inf)
        if native and native > high * 1.001:  # a scale rounded to three digits is the range's end
            yield (
                f"{native:g} um/px is coarser than the model knows ({low:.3g} to {high:.3g}), and detail that is not "
                "there cannot be made" + (": was a magnification meant?" if native >= 4 else "")
            )
        looks = row["apparent_mpp"]
        if native and looks and not 1 / FACTOR < looks / native < FACTOR:
            yield f"the nuclei look like about {looks:.2g} um/px, the scale is said to be {native:g}: check it"
        if row["filled"] > 1e-6:
            share = f"{row['filled']:.0%} of what it is shown is reflection"
            yield f"it is smaller than the network's input of {self.size} pixels at that scale: {share}"
        if frames > 1:
            yield f"it has {frames} frames, the first was taken"

    def _finished(self, row: dict, outputs: list[np.ndarray]) -> dict:
        if not row["error"]:
            logits, embedding, *statistics = outputs
            probability = metrics.apply_temperature(logits[None], self.temperature)[0]
            row |= {"logits": logits.tolist(), "probability": float(probability[POSITIVE]), "embedding": embedding}
            row["prediction"] = self.labels[int(logits.argmax())]
            if self.projector:
                row["signature"] = self.projector.transform(embedding[None])[0].tolist()
            if self.scope and statistics:  # an older model.onnx has none
                distance = self.scope.distance(statistics[0][None])[0]
                row["in_scope"] = bool(distance <= self.scope.threshold)
                row["scope_percentile"] = float(self.scope.percentile(distance))
                if not row["in_scope"]:
                    row["warning"] = "; ".join(filter(None, (row["warning"], OUT_OF_SCOPE)))
        return row

    def zoom_scales(self, image: Image.Image, native: float, n: int) -> list[float]:
        """Up to `n` scales (um/px) at which one image can be shown, ascending.

        From the finest that invents no detail and that the model knows to the coarsest that it knows and at which the
        image still fills the network's input; one scale if there is no more.
        """
        field = min(image.size) * check_mpp(native) / self.size
        low, high = (max(native, bound) for bound in (self.mpp_range or (field, field)))
        high = max(low, min(high, field))
        return np.geomspace(low, high, n).tolist() if high > low * 1.01 else [low]

    def zoom_curve(self, image: Image.Image, native: float, n: int = 7) -> tuple[np.ndarray, np.ndarray]:
        """Scales (um/px) and the probability of the positive class that this one image gets at each: `zoom_scales`.

        Raises:
            ValueError: the image cannot be predicted.
        """
        image = to_rgb(image)
        shown = [self.view_of(image, native, scale) for scale in self.zoom_scales(image, native, n)]
        pieces = (tiles(view.pixels, self.size) for view, _ in shown)
        logits = np.stack([outputs[0] for outputs in mean_over_tiles(self.run, pieces, self.batch_size)])
        probability = metrics.apply_temperature(logits, self.temperature)[:, POSITIVE]
        return np.array([mpp for _, mpp in shown]), probability

    @cached_property
    def records(self) -> Run:
        """What its run recorded; read once."""
        return Run(self.folder)

    def reliability(self, probability: float) -> str:
        """What became of images that were given about this probability, in a sentence; by the model's own records."""
        virtual = " Trained on virtual slides: it says nothing about patients."
        note = virtual if self.config.get("trained_on") == "virtual" else ""
        run = self.records
        kinds = {"test_normalised": "an unseen magnification, at a seen scale", "test": "an unseen magnification"}
        kinds |= dict.fromkeys((OUT_OF_FOLD, "test_source"), "patients that were never seen")
        kinds["val"] = "validation patients"
        there = run.parts if (run.folder / "predictions.parquet").is_file() else []
        part = next((kind for kind in kinds if kind in there), None)
        if part is None:
            return f"How far its probabilities can be trusted is not recorded with this model.{note}"
        known = run.part(part, self.temperature)
        weight = metrics.patient_weights(known["patient"])
        curve = metrics.reliability_curve(known["label"], known["probability"], weight, n_bins=8)
        i = int(np.abs(curve.predicted - probability).argmin())
        return (
            f"Of images of {kinds[part]} that were given about {curve.predicted[i]:.2f}, {curve.observed[i]:.0%} were "
            f"{self.labels[POSITIVE]} (by some {curve.rows[i]:.0f} images).{note}"
        )

    def __repr__(self) -> str:
        scale = "{:.3g} to {:.3g} um/px".format(*self.mpp_range) if self.mpp_range else "of no stated scale"
        return f"Classifier({self.config['name']}, {self.size} px, {scale})"
