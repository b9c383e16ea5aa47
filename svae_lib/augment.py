r"""DiffAugment: the critic sees data and draws through the same random, differentiable changes.

Each function maps a batch and its own random numbers to a batch, (B, C, H, W) in [0, 1] -> (B, C, H, W), so that
`augment` can give one draw to several images. Since T is drawn alike for data and draws, the critic compares
q ∗ T with p_θ ∗ T, which are equal if q = p_θ. Source: Zhao et al. 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _per_image(u: Tensor) -> Tensor:
    return u.reshape(-1, 1, 1, 1)


def brightness(x: Tensor, u: Tensor) -> Tensor:
    r"""x + (u − ½)/2, u (B,) uniform on [0, 1]; Zhao et al. add u − ½ to images in [−1, 1]."""
    return x + 0.5 * (_per_image(u) - 0.5)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    r"""The distance of each colour from the pixel's grey times 2u; grey images do not change."""
    grey = x.mean(1, keepdim=True)
    return grey + 2 * _per_image(u) * (x - grey)


def contrast(x: Tensor, u: Tensor) -> Tensor:
    r"""The distance of each pixel from the image's mean times ½ + u."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (0.5 + _per_image(u)) * (x - mean)


def translation(x: Tensor, u: Tensor, v: Tensor, ratio: float = 1 / 8) -> Tensor:
    r"""The image moved down and right by whole pixels, each at most `ratio` of the side; what comes in is black."""
    rows, rows_in = _moved(x.shape[2], u, ratio)
    columns, columns_in = _moved(x.shape[3], v, ratio)
    return picked(x, rows, columns) * (rows_in[:, None, :, None] & columns_in[:, None, None, :])


def picked(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r"""Of each image its own rows (B, H') and columns (B, W'); -> (B, C, H', W'), channels last in memory."""
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _moved(side: int, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Where each of `side` pixels comes from, (B, side), and whether that is inside; shifts are equally likely."""
    most = int(side * ratio + 0.5)
    shift = (u * (2 * most + 1)).long().clamp_max(2 * most) - most
    source = torch.arange(side, device=u.device) - shift[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def cutout(x: Tensor, u: Tensor, v: Tensor, ratio: float = 1 / 2) -> Tensor:
    r"""A box of `ratio` of each side, its centre anywhere in the image, is black."""
    rows, columns = _covered(x.shape[2], u, ratio), _covered(x.shape[3], v, ratio)
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _covered(side: int, u: Tensor, ratio: float) -> Tensor:
    """Whether each of `side` pixels lies in the box, (B, side)."""
    length = int(side * ratio + 0.5)
    start = (u * side).long() - length // 2
    pixel = torch.arange(side, device=u.device)
    return (pixel >= start[:, None]) & (pixel < start[:, None] + length)


class Augmented(nn.Module):
    r"""A critic that sees images through random changes of colour, place and parts, in evaluation too.

    Every sample has a change of its own, which all images of that sample share: a critic of pairs of images
    still sees whether the two agree. Codes pass as they are.
    """

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, *arguments: Tensor) -> Tensor:
        u = torch.rand(7, len(arguments[0]), device=arguments[0].device)
        return self.critic(*(augment(a, u) if a.dim() == 4 else a for a in arguments))


def augment(x: Tensor, u: Tensor) -> Tensor:
    r"""Brightness, saturation, contrast, translation and cutout with random numbers u (7, B)."""
    x = contrast(saturation(brightness(x, u[0]), u[1]), u[2])
    return cutout(translation(x, u[3], u[4]), u[5], u[6])
