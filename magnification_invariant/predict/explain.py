"""What in an image speaks for a class: class-activation maps.

They attribute the *margin*, the positive class's logit minus the log-sum-exp of the others; they are signed, and add up
over a tile to the margin minus the classifier's bias. A map shows what the network used. It is no segmentation and no
evidence.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from magnification_invariant.data.images import to_rgb
from magnification_invariant.data.views import corners
from magnification_invariant.files import whole
from magnification_invariant.records import POSITIVE


def activation_maps(network, tiles: np.ndarray) -> torch.Tensor:
    """Class-activation maps (n, cells, cells) of uint8 tiles (n, 3, s, s); see the module for what they sum to.

    The gradient of the margin by the last feature map, times that map, summed over channels (Selvaraju et al., ICCV
    2017, without the rectifier).
    """
    features = []
    hook = network.model.layer4.register_forward_hook(lambda module, inputs, output: features.append(output))
    with hook, torch.enable_grad():
        logits = network(torch.from_numpy(tiles).to(network.shift.device).float().requires_grad_())[0]
        others = torch.cat([logits[:, :POSITIVE], logits[:, POSITIVE + 1 :]], 1)
        margin = logits[:, POSITIVE] - others.logsumexp(1)
        (gradient,) = torch.autograd.grad(margin.sum(), features)
    return (gradient * features[0]).sum(1).detach().cpu()


def map_of_view(classifier, view: np.ndarray) -> np.ndarray:
    """The map (height, width) of a view at the network's scale, put together from its tiles; mean where they overlap.

    The cells of a tile are enlarged to its pixels.

    Args:
        classifier: a `Classifier` of the backend "torch".
        view: uint8 (height, width, 3), at least as large as the network's input.
    """
    size, places = classifier.size, corners(*view.shape[:2], classifier.size)
    total, count = np.zeros(view.shape[:2]), np.zeros(view.shape[:2])
    for first in range(0, len(places), 8):
        some = places[first : first + 8]
        pieces = np.stack([view[y : y + size, x : x + size].transpose(2, 0, 1) for y, x in some])
        cells = activation_maps(classifier.network, pieces)[:, None]
        maps = torch.nn.functional.interpolate(cells, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for (y, x), each in zip(some, maps.numpy(), strict=True):
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
    bound = float(bound or np.percentile(np.abs(heat), 99)) or 1.0
    axis.imshow(0.5 + 0.5 * np.repeat(picture.mean(2, keepdims=True), 3, 2) / 255)
    axis.imshow(heat, cmap="PuOr_r", vmin=-bound, vmax=bound, alpha=0.8 * np.clip(np.abs(heat) / bound, 0, 1))


def page(classifier, image: Image.Image, mpp: float, path: str | Path, *, n: int = 4) -> list[dict]:
    """Draws the middle of an image at `n` scales side by side, with the map and the probability of each.

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

    field = middle(classifier, to_rgb(image), mpp)
    scales = classifier.zoom_scales(field, mpp, n)
    rows = [row for scale in scales for row in classifier.predict(field, mpp, view=scale)]
    pictures = [classifier.view_of(field, mpp, scale)[0].pixels for scale in scales]
    maps = [map_of_view(classifier, picture) for picture in pictures]
    bound = max(np.percentile(np.abs(each), 99) for each in maps)
    figure = Figure(figsize=(3.1 * len(rows), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"orange: for {classifier.labels[POSITIVE]}; purple: against it", fontsize=10)
    above, below = figure.subplots(2, len(rows), squeeze=False)
    above[0].set_ylabel("as the network sees it")
    below[0].set_ylabel("class-activation map")
    for upper, lower, row, picture, heat in zip(above, below, rows, pictures, maps, strict=True):
        upper.set_title(f"{row['mpp']:.3g} um/px\nP({classifier.labels[POSITIVE]}) = {row['probability']:.2f}")
        draw(upper, picture)
        draw(lower, picture, heat, bound)
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    return rows
