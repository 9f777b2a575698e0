"""A model inside raw2features, which reads whole slides (OME-Zarr) and stores the embeddings of their tiles.

Its plug-in is the class `Embedder` (entry point "magnification_invariant" of the group ``raw2features.embedders``). The
models of raw2features' own command are those of its registry; this one's are handed over in Python::

    from raw2features import RunConfig, embed_slide
    from magnification_invariant.predict.raw2features import embedder

    ours = embedder("REPO_OR_FOLDER")
    embed_slide("slide.ome.zarr", "out", RunConfig(models=[ours.name]), embedders=[ours])

raw2features cuts and resamples the tiles, by a filter of its own: embeddings are those of `Classifier` for the same
pixels.
"""

import hashlib
from pathlib import Path

import torch
from raw2features.embedders import base  # pyright: ignore[reportMissingImports]

from magnification_invariant.models import embed, normalisation
from magnification_invariant.predict.classifier import Classifier
from magnification_invariant.predict.slides import default_scale

FAMILY = "magnification_invariant"


class Embedder(base.Embedder):
    """Embeddings of one model, those that its signature is computed from.

    Args:
        spec: raw2features' ``ModelSpec``, see `spec_of`; its ``source`` is a model folder or a Hub repository.
    """

    def load(self, device: str = "cuda", dtype: torch.dtype | None = None, compile: bool = False) -> "Embedder":
        """Loads the model to a device; `compile` would change nothing but speed, and is left out.

        Args:
            device: as torch names it.
            dtype: half precision for the forward pass; None for float32.

        Raises:
            OSError: there is no such folder or repository.
            ValueError: it is not a model of this package.
        """
        network = Classifier.from_pretrained(self.spec.source, device=device).network
        assert network is not None  # of the backend torch
        self._model, self._kind = network.model, network.embedding
        self._device, self._dtype = device, dtype or torch.float32
        return self

    def embed_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Of normalised tiles (b, 3, size, size), float32 embeddings (b, width) on the CPU."""
        half = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(torch.device(self._device).type, self._dtype, enabled=half):
            return embed(self._model, batch.to(self._device), self._kind)[1].float().cpu()


def spec_of(repo_or_folder: str | Path) -> base.ModelSpec:
    """What raw2features records of a model: its tiles are the network's input at the middle of what was trained on.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: it is not a model of this package, or it knows no scale.
    """
    classifier = Classifier.from_pretrained(repo_or_folder, device="cpu")
    network = classifier.network
    assert network is not None  # of the backend torch
    mean, std = normalisation(network.model)
    (width,) = embed(network.model, torch.zeros(1, 3, classifier.size, classifier.size), network.embedding)[1].shape[1:]
    return base.ModelSpec(
        name=classifier.config["name"],
        family=FAMILY,
        source=classifier.source,
        embedding_dim=width,
        input_size=classifier.size,
        pooling="pooled",
        mean=mean,
        std=std,
        transform_source_url=classifier.source,
        license=classifier.config["pretrained_cfg"]["license"],
        gated=False,
        recommended_mpp=default_scale(classifier),
        weights_filename="model.safetensors",
        weights_sha256=hashlib.sha256((classifier.folder / "model.safetensors").read_bytes()).hexdigest(),
    )


def embedder(repo_or_folder: str | Path, device: str = "cpu") -> Embedder:
    """A model, loaded, as ``raw2features.embed_slide(..., embedders=[...])`` takes it; see `spec_of`."""
    return Embedder(spec_of(repo_or_folder)).load(device)
