"""Classifiers of vectors, such as the embeddings of a foundation model: like timm's, but their input is (b, width)."""

import numpy as np
import timm
import torch
from torch import Tensor, nn

from magnification_invariant.models.domain_head import match_domain_head

VECTOR_MODELS = {"mag_hidden": 128, "mag_linear": 0}
"""Their names, and the units of the hidden layer; the first is the default."""


class VectorClassifier(nn.Module):
    """A backbone that only standardises, with one hidden layer or none, and a linear classifier.

    What methods ask of a timm classifier is there, so that each runs on vectors as it does on images. Without a hidden
    layer the pooled features are the standardised vectors themselves: no gradient of an adversary changes them.

    Args:
        num_classes: Class logits.
        width: Of the vectors.
        hidden: Units of the hidden layer, ReLU; 0 is none.
    """

    global_pool = "avg"  # there is nothing to pool: what the features are, pooled

    def __init__(self, num_classes: int = 2, width: int = 1024, hidden: int = 0):
        super().__init__()
        self.num_classes, self.num_features = num_classes, hidden or width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.head = nn.Linear(self.num_features, num_classes)
        self.register_load_state_dict_pre_hook(match_domain_head)  # weights that hold a domain head load too

    @torch.no_grad()
    def standardise(self, vectors: np.ndarray, weight: np.ndarray) -> None:
        """Take mean and standard deviation from training vectors (n, width), weighted by (n,); dead ones stay as is."""
        vectors, weight = np.asarray(vectors, np.float64), weight / weight.sum()
        mean = weight @ vectors
        std = np.sqrt(weight @ (vectors - mean) ** 2)
        std[std <= 1e-6 * np.abs(vectors).max(0)] = 1.0
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(std))

    def get_classifier(self) -> nn.Module:
        """The layer behind the features, as timm has it."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, as timm does; of 0 classes it is the identity."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (b, num_features) of vectors (b, width)."""
        return self.hidden((x - self.mean) / self.std)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits of features; with `pre_logits` the features."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (b, classes) of vectors (b, width)."""
        return self.forward_head(self.forward_features(x))


def create_network(arch: str, *, num_classes: int, **arguments) -> nn.Module:
    """A new classifier of images, as timm makes it, or of vectors, which are not in timm's registry.

    Args:
        arch: A name of timm's, ``hf-hub:...``, ``local-dir:...``, or one of `VECTOR_MODELS`.
        num_classes: Class logits.
        **arguments: Of `timm.create_model`; of vectors ``width``, theirs, and ``hidden``, in place of the name's units.
    """
    if arch not in VECTOR_MODELS:
        return timm.create_model(arch, num_classes=num_classes, **arguments)
    model = VectorClassifier(num_classes, **{"hidden": VECTOR_MODELS[arch]} | arguments)
    # What timm leaves on its models, and `model_folder` reads.
    model.pretrained_cfg = {"architecture": arch, "first_conv": None, "classifier": "head"}
    model._model_args = arguments
    return model
