"""What the network sees of a cached image: random views for training, the centre for evaluation. Batched, on device.

Both views show the image at the *base scale*: resized so that its short side is ``view_height(size)`` pixels, of
which a square of `size` pixels is kept (timm's ``crop_pct`` of 0.875). A zoom of z shows the tissue z times larger:
its micrometres per pixel are those of the base scale divided by z.
"""

import math

import torch
import torch.nn.functional as F

CROP_PCT = 0.875

# Optical density of haematoxylin, eosin and a residual in RGB (Ruifrok & Johnston 2001), rows of unit length.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS = _STAINS / _STAINS.norm(dim=1, keepdim=True)
_UNMIX = torch.linalg.inv(_STAINS)  # here, on the CPU: on a GPU it makes the host wait, to look for singular matrices

DRAWS = 10  # random numbers an image needs: quarter turn and flip, zoom, centre (2), stain (6)


def view_height(size: int) -> int:
    """Short side in pixels of the resized image, of which a square of `size` is the input; rounded as in timm."""
    return math.floor(size / CROP_PCT)


def cache_height(size: int, zoom: float = 1.0) -> int:
    """Short side to cache, so that the largest zoom-in shows pixels and not blur."""
    return math.ceil(view_height(size) * zoom)


def input_mpp(cached_mpp, cached_height: int, size: int):
    """Micrometres per pixel at the network's input, unzoomed, of a cached image of `cached_mpp`."""
    return cached_mpp * cached_height / view_height(size)


def centre_view(images: torch.Tensor, size: int) -> torch.Tensor:
    """Uint8 (b, 3, height, width) to float (b, 3, size, size) in [0, 1]: the base scale, the middle of the image."""
    height = view_height(size)
    x = images.float().div_(255)
    if x.shape[2] != height:
        width = x.shape[3] * height // x.shape[2]
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
    top, left = round((x.shape[2] - size) / 2), round((x.shape[3] - size) / 2)  # as torchvision's CenterCrop
    return x[:, :, top : top + size, left : left + size]


def random_view(
    images: torch.Tensor, draws: torch.Tensor, size: int, *, zoom: float = 1.0, stain: float = 0.0
) -> torch.Tensor:
    """Random flip, quarter turn, place, continuous zoom and stain of every image of a batch.

    Args:
        images: uint8 (b, 3, height, width).
        draws: uniform random numbers in [0, 1), (b, `DRAWS`); the result depends on nothing else.
        size: side of the square network input in pixels.
        zoom: the zoom is log-uniform in [1 / zoom, zoom]; 1 turns it off. Views wider than the image are filled
            by reflection.
        stain: strength of the stain jitter: the haematoxylin, eosin and residual densities are multiplied by
            U(1 - stain, 1 + stain) and shifted by U(-stain, stain) / 4 (after Tellez et al. 2018); 0 turns it off.

    Returns:
        float (b, 3, size, size) in [0, 1].
    """
    x = images.float().div_(255)
    height, width = x.shape[2:]
    turn = (draws[:, 0] * 8).long()  # the eight symmetries of the square
    magnify = zoom ** (2 * draws[:, 1] - 1)
    step = (height / view_height(size)) / magnify  # cached pixels from one output pixel to the next

    # Where the output's top left pixel may lie; whole cached pixels, so that without a zoom pixels are copied.
    span = step * (size - 1)
    room = torch.stack([width - 1 - span, height - 1 - span], 1)
    corner = torch.where(room >= 0, torch.floor(draws[:, 2:4] * (room + 1).clamp(min=1)).minimum(room), room / 2)
    centre = corner + span[:, None] / 2

    axis = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    quarter, flip = turn % 4, 1 - 2 * (turn // 4).to(x.dtype)
    cos = (quarter == 0).to(x.dtype) - (quarter == 2).to(x.dtype)
    sin = (quarter == 1).to(x.dtype) - (quarter == 3).to(x.dtype)
    u, v = axis[None, None, :] * flip[:, None, None], axis[None, :, None]
    turned = torch.stack(torch.broadcast_tensors(_col(cos) * u - _col(sin) * v, _col(sin) * u + _col(cos) * v), -1)
    where = turned * step[:, None, None, None] + centre[:, None, None, :]

    x = _sample(x, where, step, levels=max(0, math.ceil(math.log2(max(1.0, zoom * height / view_height(size))))))
    return _jitter_stain(x, draws[:, 4:], stain) if stain else x


def _col(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None]


def _sample(x: torch.Tensor, where: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Bilinear sampling at `where` (pixels), blended from halved copies where `step` would skip pixels (mip-mapping).

    Every image is sampled at every level and weighted, since choosing by value would make the host wait.
    """
    level = step.log2().clamp(0, levels)
    out = 0.0
    for k in range(levels + 1):
        if k:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        last = torch.tensor([x.shape[3] - 1, x.shape[2] - 1], dtype=x.dtype).to(x.device, non_blocking=True)
        grid = ((where + 0.5) / 2**k - 0.5) * (2 / last) - 1
        picked = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        out = out + picked * (1 - (level - k).abs()).clamp(min=0)[:, None, None, None] if levels else picked
    return out


def _jitter_stain(x: torch.Tensor, draws: torch.Tensor, strength: float) -> torch.Tensor:
    stains, unmix = _STAINS.to(x, non_blocking=True), _UNMIX.to(x, non_blocking=True)
    scale = 1 + strength * (2 * draws[:, :3] - 1)
    shift = strength / 4 * (2 * draws[:, 3:6] - 1)
    # density @ inv(stains), scaled and shifted a stain, back @ stains: one 3x3 matrix an image
    mix = unmix @ (scale[:, :, None] * stains)
    density = -torch.log(x.clamp(min=1 / 255)).flatten(2)
    density = mix.transpose(1, 2) @ density + (shift @ stains)[:, :, None]
    return torch.exp(-density).clamp(max=1).view_as(x)
