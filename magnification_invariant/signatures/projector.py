"""SignatureProjector: the frozen signature that is shared beside a model's weights."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.files import read_json, whole, write_json
from magnification_invariant.hub_files import resolve, upload
from magnification_invariant.model_folder import damage_of

if TYPE_CHECKING:
    import torch

    from magnification_invariant.signatures.sparse_signature import SparseSignature

JSON_FILE, WEIGHTS_FILE = "signature.json", "signature.safetensors"
FORMAT = 1
_ARRAYS = ("indices", "mean", "scale", "weight", "bias")
_WAY_ON = "fetch both files of the signature again (in a git clone: `git lfs pull`), or save it anew"


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Turns log-odds of the second class (n, 1) into class probabilities (n, 2)."""
    from scipy.special import expit

    return np.hstack([expit(-scores), expit(scores)])


def weights_digest(model: "torch.nn.Module") -> str:
    """Sha256 over names and values of a model's weights, the domain head left out: it is not published."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("domain_head."):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SignatureProjector:
    """Maps embeddings of one model to signatures and class probabilities, with numpy alone.

    Attributes:
        indices: (k,) dimensions of the embedding that make the signature, rising; k may be 0.
        mean: (k,) what is subtracted from them.
        scale: (k,) what they are divided by then.
        weight: (1, k) coefficients on the signature, of the log-odds of the second class.
        bias: (1,) intercept.
        width: Dimensions of the whole embedding.
        class_names: Names of the two classes; the second is the positive one.
        embedding: Kind of embedding, "penultimate" or "pyramid".
        source: Id of the model whose embeddings these are; indices mean nothing in another model's.
        revision: Revision of that model, if it is on the Hub.
        weights_sha256: `weights_digest` of that model: `as_module` takes no other.
        mpp_range: Smallest and largest micrometres per pixel at the network's input that it was fitted on.
        stability: Figures of how far refits agree, as `refit_stability` returns them.
    """

    indices: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    width: int
    class_names: tuple[str, ...]
    embedding: str
    source: str
    revision: str | None = None
    weights_sha256: str | None = None
    mpp_range: tuple[float, float] | None = None
    stability: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        k = len(self.indices)
        if len(self.class_names) != 2:
            raise ValueError(f"a signature tells two classes apart, not {len(self.class_names)} classes")
        shapes = {"indices": (k,), "mean": (k,), "scale": (k,), "weight": (1, k), "bias": (1,)}
        wrong = {name: getattr(self, name).shape for name in shapes if getattr(self, name).shape != shapes[name]}
        if wrong:
            raise ValueError(f"a signature of {k} dimensions cannot have {wrong}")
        if not all(np.isfinite(getattr(self, name)).all() for name in _ARRAYS) or (self.scale <= 0).any():
            raise ValueError("means, weights and biases of a signature must be finite and its scales positive")
        if self.indices.dtype.kind not in "iu":
            raise ValueError(f"indices of a signature must be integers, not {self.indices.dtype}")
        if k and not 0 <= self.indices.min() <= self.indices.max() < self.width:
            raise ValueError(f"indices {self.indices.min()} to {self.indices.max()} in an embedding of {self.width}")

    @classmethod
    def from_signature(
        cls, signature: "SparseSignature", *, class_names: list[str] | None = None, **attributes: Any
    ) -> "SignatureProjector":
        """Freezes a fitted `SparseSignature`, given the `attributes` of this class from `embedding` on.

        `class_names` are in the order of its `classes_`, their default.
        """
        names = map(str, signature.classes_) if class_names is None else class_names
        chosen = signature.signature_
        if attributes.get("mpp_range") is not None:
            attributes["mpp_range"] = tuple(map(float, attributes["mpp_range"]))
        return cls(
            indices=chosen.astype(np.int64),
            mean=signature.mean_[chosen],
            scale=signature.scale_[chosen],
            weight=signature.coef_[:, chosen],
            bias=signature.intercept_,
            width=signature.n_features_in_,
            class_names=tuple(names),
            **attributes,
        )

    def transform(
        self, embeddings: ArrayLike, *, embedding: str | None = None, source: str | None = None
    ) -> np.ndarray:
        """Projects embeddings (n, width) to signatures (n, k): standardised values of the chosen dimensions, float64.

        Raises:
            ValueError: On NaN, or embeddings of another width, or of another `embedding` kind or `source` model, where
                these are given.
        """
        embeddings = np.asarray(embeddings)
        for name, given, own in (("kind", embedding, self.embedding), ("model", source, self.source)):
            if given is not None and given != own:
                raise ValueError(f"this signature belongs to embeddings of {name} {own!r}, not {given!r}")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise ValueError(
                f"this signature takes {self.embedding!r} embeddings of {self.source!r}, (rows, {self.width}), "
                f"not {embeddings.shape}"
            )
        chosen = embeddings[:, self.indices].astype(np.float64)
        if not np.isfinite(chosen).all():
            raise ValueError(f"{np.sum(~np.isfinite(chosen).all(axis=1))} embeddings hold NaN or infinity")
        return (chosen - self.mean) / self.scale

    def predict_proba(self, embeddings: ArrayLike, **checked: str) -> np.ndarray:
        """Class probabilities (n, 2), in the order of `class_names`; arguments as in `transform`."""
        return probabilities(self.transform(embeddings, **checked) @ self.weight.T + self.bias)

    def as_module(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Joins the signature to the timm network that it was fitted on: a module that torch and ONNX can export.

        Returns:
            A module in eval mode: normalised images (B, 3, H, W) to signatures (B, k), float32.

        Raises:
            ValueError: If the model's embeddings are of another width, or its weights are not those of `source`.
        """
        import torch

        from magnification_invariant.models import embed

        kind, width = self.embedding, model.num_features
        if kind == "pyramid":
            width = 2 * sum(stage["num_chs"] for stage in model.feature_info[1:])
        if width != self.width:
            raise ValueError(f"this signature takes {kind!r} embeddings of {self.width} dimensions, not {width}")
        if self.weights_sha256 not in (None, weights_digest(model)):
            raise ValueError(
                f"these are not the weights of {self.source!r}, which this signature belongs to: its indices mean "
                "nothing in another network. Load that model as it was saved, and change its type only afterwards"
            )
        projector = self

        class Signature(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model
                self.register_buffer("indices", torch.from_numpy(projector.indices))
                self.register_buffer("mean", torch.from_numpy(projector.mean).float())
                self.register_buffer("scale", torch.from_numpy(projector.scale).float())

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                _, embedding = embed(self.model, images, kind)
                return (embedding.index_select(1, self.indices) - self.mean) / self.scale

        return Signature().eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `signature.json` and `signature.safetensors` into a folder, beside a model's own files."""
        from safetensors.numpy import save_file

        with whole(Path(folder) / WEIGHTS_FILE) as unfinished:
            save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}, unfinished)
        attributes = {name: value for name, value in asdict(self).items() if name not in _ARRAYS}
        write_json(Path(folder) / JSON_FILE, {"format": FORMAT, "size": len(self.indices), **attributes})

    def push_to_hub(self, repo: str, **options) -> str:
        """Commits the two files to the Hub repository of the model, beside what is there; returns the commit's URL.

        `options` are those of `hub_files.upload`: private, revision, create_pr, message.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo, **{"message": f"Signature of {len(self.indices)} dimensions", **options})

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, revision: str | None = None) -> "SignatureProjector":
        """Reads what `save_pretrained` or `push_to_hub` wrote.

        Raises:
            FileNotFoundError: The folder or repository lacks one of the two files, or cannot be reached.
            ValueError: A file is empty, cut or a git-lfs pointer, the two do not fit together, or a later version of
                this package wrote them. All name the file and the way on.
        """
        from safetensors.numpy import load_file

        try:
            file, weights = (resolve(str(repo_or_folder), name, revision) for name in (JSON_FILE, WEIGHTS_FILE))
        except FileNotFoundError as error:
            if not Path(repo_or_folder).expanduser().is_dir():
                raise
            raise FileNotFoundError(f"{error}, and a signature is {JSON_FILE} and {WEIGHTS_FILE}: {_WAY_ON}") from None
        attributes, arrays = _content(file, read_json), _content(weights, load_file)
        if not isinstance(attributes, dict) or attributes.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is not of format {FORMAT}: update magnification_invariant, or {_WAY_ON}")
        try:
            if attributes.pop("size") != len(arrays["indices"]):
                raise ValueError(f"{len(arrays['indices'])} indices")
            attributes["class_names"] = tuple(attributes["class_names"])
            attributes["mpp_range"] = attributes["mpp_range"] and tuple(attributes["mpp_range"])
            return cls(**arrays, **attributes)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} and {weights.name} do not fit together ({error}): {_WAY_ON}") from None


def _content(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file, or a ValueError that says what it is instead."""
    from safetensors import SafetensorError

    try:
        return read(path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} {damage_of(path)} ({error}): {_WAY_ON}") from None
