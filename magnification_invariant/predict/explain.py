"""What in an image speaks for a class: class-activation maps and integrated gradients, by captum.

Both attribute the *margin*, the positive class's logit minus the log-sum-exp of the others; both are signed, and both
add up over a tile: the class-activation map to the margin minus the classifier's bias, the integrated gradients to the
margin minus that of white glass. A map shows what the network used. It is no
segmentation and no evidence.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from magnification_invariant.data.images import to_rgb
from magnification_invariant.data.views import corners
from magnification_invariant.files import whole
from magnification_invariant.records import POSITIVE

STEPS = 16  # of the integral
_WHITE = 255.0


class _Margin(torch.nn.Module):
    """RGB in [0, 255] as float (b, 3, s, s) to the margin (b,)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)[0]
        others = torch.cat([logits[:, :POSITIVE], logits[:, POSITIVE + 1 :]], 1)
        return logits[:, POSITIVE] - others.logsumexp(1)


def activation_maps(network, tiles: np.ndarray) -> np.ndarray:
    """Class-activation maps (n, cells, cells) of uint8 tiles (n, 3, s, s); see the module for what they sum to."""
    from captum.attr import LayerGradCam

    cam = LayerGradCam(_Margin(network), network.model.layer4)
    return cam.attribute(_floats(network, tiles)).squeeze(1).detach().cpu().numpy()


def integrated_gradients(network, tiles: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Integrated gradients (n, s, s), summed over colours, of uint8 tiles (n, 3, s, s) from white glass."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(_Margin(network))
    images = _floats(network, tiles)
    found = method.attribute(images, baselines=_WHITE, n_steps=steps, internal_batch_size=max(32, len(tiles)))
    return found.sum(1).detach().cpu().numpy()


def _floats(network, tiles: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tiles).to(network.shift.device).float().requires_grad_()


def smooth_activation_maps(network, tiles: np.ndarray) -> np.ndarray:
    """`activation_maps` enlarged to the tiles' pixels (n, s, s)."""
    cells = torch.from_numpy(activation_maps(network, tiles))[:, None]
    size = tiles.shape[2:]
    return torch.nn.functional.interpolate(cells, size=size, mode="bilinear", align_corners=False)[:, 0].numpy()


def map_of_view(classifier, view: np.ndarray, method: Callable = smooth_activation_maps) -> np.ndarray:
    """The map (height, width) of a view at the network's scale, put together from its tiles; mean where they overlap.

    Args:
        classifier: a `Classifier` of the backend "torch".
        view: uint8 (height, width, 3), at least as large as the network's input.
        method: `smooth_activation_maps` or `integrated_gradients`.
    """
    size, places = classifier.size, corners(*view.shape[:2], classifier.size)
    total, count = np.zeros(view.shape[:2]), np.zeros(view.shape[:2])
    for first in range(0, len(places), 8):
        some = places[first : first + 8]
        pieces = np.stack([view[y : y + size, x : x + size].transpose(2, 0, 1) for y, x in some])
        for (y, x), each in zip(some, method(classifier.network, pieces), strict=True):
            total[y : y + size, x : x + size] += each
            count[y : y + size, x : x + size] += 1
    return total / count


def middle(classifier, image: Image.Image, mpp: float) -> Image.Image:
    """The middle square of an image, of at most three network inputs at the finest scale that the model knows."""
    finest = classifier.mpp_range[0] if classifier.mpp_range else mpp
    side = min(*image.size, round(3 * classifier.size * max(mpp, finest) / mpp))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def draw(axis, picture: np.ndarray, heat: np.ndarray | None = None, bound: float | None = None) -> None:
    """A picture, and over its paled grey copy a map: orange for the positive class, purple against it."""
    axis.set(xticks=[], yticks=[])
    if heat is None:
        axis.imshow(picture)
        return
    bound = bound or np.percentile(np.abs(heat), 99) or 1.0
    axis.imshow(0.5 + 0.5 * np.repeat(picture.mean(2, keepdims=True), 3, 2) / 255)
    axis.imshow(heat, cmap="PuOr_r", vmin=-bound, vmax=bound, alpha=0.8 * np.clip(np.abs(heat) / bound, 0, 1))


def page(classifier, image: Image.Image, mpp: float, path: str | Path, *, n: int = 4) -> list[dict]:
    """Draws the middle of an image at `n` scales side by side, with both maps and the probability of each.

    All scales share one colour range, see `draw`; the field is that of `middle`.

    Args:
        classifier: a `Classifier` of the backend "torch".
        mpp: micrometres per pixel of the image.
        path: PNG to write.

    Returns:
        The predictions, one a scale.

    Raises:
        ValueError: the image cannot be predicted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.ndimage import gaussian_filter

    field = middle(classifier, to_rgb(image), mpp)
    scales = classifier.zoom_scales(field, mpp, n)
    rows = [row for scale in scales for row in classifier.predict(field, mpp, view=scale)]
    pictures = [classifier.view_of(field, mpp, scale)[0].pixels for scale in scales]
    cams = [map_of_view(classifier, picture) for picture in pictures]
    gradients = [map_of_view(classifier, picture, integrated_gradients) for picture in pictures]
    gradients = [gaussian_filter(each, classifier.size / 64) for each in gradients]  # single pixels cannot be seen
    lines = {"as the network sees it": [None] * len(rows), "class-activation map": cams}
    lines["integrated gradients"] = gradients
    figure = Figure(figsize=(3.1 * len(rows), 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"orange: for {classifier.labels[POSITIVE]}; purple: against it", fontsize=10)
    axes = figure.subplots(3, len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        axis.set_title(f"{row['mpp']:.3g} um/px\nP({classifier.labels[POSITIVE]}) = {row['probability']:.2f}")
    for line, (title, maps) in zip(axes, lines.items(), strict=True):
        line[0].set_ylabel(title)
        bound = None if maps[0] is None else max(np.percentile(np.abs(each), 99) for each in maps)
        for axis, picture, heat in zip(line, pictures, maps, strict=True):
            draw(axis, picture, heat, bound)
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    return rows
