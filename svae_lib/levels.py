r"""What the 256 grey levels are to the nets: numbers for grey targets, intervals of a density for natural images."""

from __future__ import annotations

import torch
from torch import Tensor


def grey(images: Tensor) -> Tensor:
    r"""uint8 {0..255} -> float [0, 1]: the grey targets of the papers. Points, which are floats, stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class Grey:
    r"""Level i is the number i/255, in [0, 1]: an intensity, or the probability of a binary pixel. Points stay."""

    draw = see = staticmethod(grey)

    @staticmethod
    def back(x: Tensor) -> Tensor:
        r"""Numbers on this axis as grey in [0, 1]."""
        return x


class Cells:
    r"""Level i is the interval [i, i + 1)/256 of [0, 1): natural images for a density (A §5.1)."""

    @staticmethod
    def draw(images: Tensor) -> Tensor:
        r"""uint8 -> a uniform draw from the interval of each level: uniform dequantisation, afresh at each call."""
        x = images.float()
        return (x + torch.rand_like(x)) / 256

    @staticmethod
    def see(images: Tensor) -> Tensor:
        r"""uint8 -> the middle of each interval, where no draw is wanted."""
        return (images.float() + 0.5) / 256

    @staticmethod
    def back(x: Tensor) -> Tensor:
        r"""Numbers on this axis as grey in [0, 1], so that `back(see(images))` is `grey(images)`."""
        return (256 * x - 0.5) / 255


Axis = type[Grey] | type[Cells]


def binarise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Dynamic binarisation: every pixel is drawn from Bernoulli(x), afresh at each call."""
    return torch.bernoulli(x, generator=generator)
