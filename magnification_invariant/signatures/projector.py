"""SignatureProjector: the frozen signature that is shared beside a model's weights."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.hub_files import resolve, upload

if TYPE_CHECKING:
    import torch

    from magnification_invariant.signatures.sparse_signature import SparseSignature

JSON_FILE, WEIGHTS_FILE = "signature.json", "signature.safetensors"
FORMAT = 1
_ARRAYS = ("indices", "mean", "scale", "weight", "bias")


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Turns decision scores (n, K) into class probabilities.

    One column is the log-odds of the second of two classes; several are one-vs-rest scores, whose probabilities are
    scaled to sum to 1.
    """
    from scipy.special import expit, log_expit, logsumexp

    if scores.shape[1] == 1:
        return np.hstack([expit(-scores), expit(scores)])
    log = log_expit(scores)
    return np.exp(log - logsumexp(log, axis=1, keepdims=True))


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
        indices: (k,) dimensions of the embedding that make the signature, rising.
        mean: (k,) what is subtracted from them.
        scale: (k,) what they are divided by then.
        weight: (K, k) coefficients on the signature; K = 1 for two classes, else one row a class (one-vs-rest).
        bias: (K,) intercepts.
        width: Dimensions of the whole embedding.
        class_names: Names of the classes; the second is the positive one of two.
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
        k, heads = len(self.indices), 1 if len(self.class_names) == 2 else len(self.class_names)
        shapes = {"indices": (k,), "mean": (k,), "scale": (k,), "weight": (heads, k), "bias": (heads,)}
        found = {name: getattr(self, name).shape for name in shapes}
        wrong = {name: shape for name, shape in found.items() if shape != shapes[name]}
        if wrong:
            raise ValueError(f"a signature of {k} dimensions and {len(self.class_names)} classes cannot have {wrong}")
        if not all(np.isfinite(getattr(self, name)).all() for name in _ARRAYS) or (self.scale <= 0).any():
            raise ValueError("means, weights and biases of a signature must be finite and its scales positive")
        if k and not 0 <= self.indices.min() <= self.indices.max() < self.width:
            raise ValueError(f"indices {self.indices.min()} to {self.indices.max()} in an embedding of {self.width}")

    @classmethod
    def from_signature(
        cls,
        signature: "SparseSignature",
        *,
        class_names: list[str] | None = None,
        embedding: str,
        source: str,
        revision: str | None = None,
        weights_sha256: str | None = None,
        mpp_range: tuple[float, float] | None = None,
        stability: dict[str, Any] | None = None,
    ) -> "SignatureProjector":
        """Freezes a fitted `SparseSignature`; `class_names` are in the order of its `classes_`, their default."""
        names = [str(c) for c in signature.classes_] if class_names is None else list(class_names)
        if len(names) != len(signature.classes_):
            raise ValueError(f"{len(names)} class names for {len(signature.classes_)} classes: {names}")
        chosen = signature.signature_
        return cls(
            indices=chosen.astype(np.int64),
            mean=signature.mean_[chosen],
            scale=signature.scale_[chosen],
            weight=signature.coef_[:, chosen],
            bias=signature.intercept_,
            width=signature.n_features_in_,
            class_names=tuple(names),
            embedding=embedding,
            source=source,
            revision=revision,
            weights_sha256=weights_sha256,
            mpp_range=None if mpp_range is None else (float(mpp_range[0]), float(mpp_range[1])),
            stability=stability or {},
        )

    def transform(
        self, embeddings: ArrayLike, *, embedding: str | None = None, source: str | None = None
    ) -> np.ndarray:
        """Projects embeddings to signatures.

        Args:
            embeddings: (n, width).
            embedding: Their kind, checked where it is given.
            source: Id of the model that made them, checked where it is given.

        Returns:
            (n, k) standardised values of the chosen dimensions, float64.

        Raises:
            ValueError: On embeddings of another width, kind or model, or with NaN.
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

    def predict_proba(
        self, embeddings: ArrayLike, *, embedding: str | None = None, source: str | None = None
    ) -> np.ndarray:
        """Class probabilities (n, classes), in the order of `class_names`; arguments as in `transform`."""
        signatures = self.transform(embeddings, embedding=embedding, source=source)
        return probabilities(signatures @ self.weight.T + self.bias)

    def as_module(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Joins the signature to its network: a module from images to signatures, which torch and ONNX can export.

        Args:
            model: The timm ResNet whose embeddings the signature was fitted on.

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
            raise ValueError(
                f"this signature takes {kind!r} embeddings of width {self.width}, the model's have {width}"
            )
        if self.weights_sha256 not in (None, weights_digest(model)):
            raise ValueError(
                f"these are not the weights of {self.source!r}, which this signature belongs to: its indices mean "
                "nothing in another network. Load that model as it was saved, and change its type only afterwards"
            )

        class Signature(torch.nn.Module):
            def __init__(self, arrays: dict[str, np.ndarray]):
                super().__init__()
                self.model = model
                self.register_buffer("indices", torch.from_numpy(arrays["indices"]))
                self.register_buffer("mean", torch.from_numpy(arrays["mean"]).float())
                self.register_buffer("scale", torch.from_numpy(arrays["scale"]).float())

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                _, embedding = embed(self.model, images, kind)
                return (embedding.index_select(1, self.indices) - self.mean) / self.scale

        return Signature({name: getattr(self, name) for name in _ARRAYS}).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `signature.json` and `signature.safetensors` into a folder, beside a model's own files."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in asdict(self).items() if name not in _ARRAYS}
        about = {"format": FORMAT, "size": len(self.indices), **about}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, folder / WEIGHTS_FILE)
        about = json.loads(json.dumps(about), parse_constant=lambda _: None)  # JSON has no NaN
        (folder / JSON_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo: str, **options) -> str:
        """Commits the two files to a Hub model repository, beside what is there; returns the commit's URL.

        Args:
            repo: Repository id, best the one that holds the model itself.
            **options: Of `hub_files.upload`: private, revision, create_pr, message.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo, **{"message": f"Signature of {len(self.indices)} dimensions", **options})

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, revision: str | None = None) -> "SignatureProjector":
        """Reads what `save_pretrained` or `push_to_hub` wrote.

        Raises:
            FileNotFoundError: If the folder or repository holds no signature, or cannot be reached.
            ValueError: If the two files do not fit each other, or a later version of this package wrote them.
        """
        from safetensors.numpy import load_file

        file, weights = (resolve(str(repo_or_folder), name, revision) for name in (JSON_FILE, WEIGHTS_FILE))
        about = json.loads(file.read_text(encoding="utf-8"))
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is not of format {FORMAT}; update magnification_invariant")
        about.pop("size")
        about["class_names"] = tuple(about["class_names"])
        about["mpp_range"] = about["mpp_range"] and tuple(about["mpp_range"])
        return cls(**load_file(weights), **about)
