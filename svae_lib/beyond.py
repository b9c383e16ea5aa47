r"""Nets larger than the papers': residual blocks, and a code that is a small image itself, for the same objectives.

Images are halved until their side is 8; the code has a few numbers at each of the 8 × 8 places, kept as one vector.
The critic meets x and z at the same places. Two blocks to a stage, `channels` wide at full size and at most four times
that.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from svae_lib.densities import DiagonalGaussian, Point
from svae_lib.errors import UserError
from svae_lib.natural import pixels
from svae_lib.nets import LOG_VAR_LIMIT, NORMS

SIDE = 8  # of the code
BLOCKS = 2  # in a stage


class Residual(nn.Module):
    r"""x + two 3×3 convolutions, each behind a norm and a ReLU."""

    def __init__(self, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            NORMS[norm](width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            NORMS[norm](width), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def blocks(width: int, norm: str, dropout: float) -> list[nn.Module]:
    r"""One stage."""
    return [Residual(width, norm, dropout) for _ in range(BLOCKS)]


def stages(shape: tuple[int, int, int], channels: int) -> list[int]:
    r"""The width at each size, from the image's down to 8 × 8. Raises UserError where halving does not lead there."""
    _, height, width = shape
    halvings = (height // SIDE).bit_length() - 1
    if (height, width) != (SIDE * 2**halvings,) * 2:
        raise UserError(f"these nets need square images of side 8, 16, 32 or 64, not {height}×{width}")
    return [channels * min(2**stage, 4) for stage in range(halvings + 1)]


def features(shape: tuple[int, int, int], channels: int, norm: str, dropout: float) -> tuple[nn.Sequential, int]:
    r"""What encoder and critic see of x: (B, C, H, W) -> (B, width · 64), one vector; and width."""
    widths = stages(shape, channels)
    layers = [nn.Conv2d(shape[0], widths[0], 3, padding=1), *blocks(widths[0], norm, dropout)]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), *blocks(outputs, norm, dropout)]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1]


def places(count: int) -> int:
    r"""Numbers of a code at each place. Raises UserError if they are not whole."""
    if count % SIDE**2:
        raise UserError(f"the code of these nets has {SIDE} × {SIDE} places; z_dim must be a multiple of {SIDE**2}")
    return count // SIDE**2


class Encoder(nn.Module):
    r"""q_φ(z|x): features, and a 1×1 convolution to (μ, log σ²) at each place; -> DiagonalGaussian (B, z_dim)."""

    def __init__(self, shape: tuple[int, int, int], z_dim: int, channels: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.body, width = features(shape, channels, norm, dropout)
        self.head = nn.Sequential(
            nn.Unflatten(1, (width, SIDE, SIDE)), NORMS[norm](width), nn.ReLU(),
            nn.Conv2d(width, 2 * places(z_dim), 1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> DiagonalGaussian:
        mean, log_var = self.head(self.body(x)).to(x.dtype).chunk(2, 1)
        return DiagonalGaussian(mean, log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT))


class Decoder(nn.Module):
    r"""p_θ(x|z): the same in reverse, each size doubled by copying; -> DiagonalGaussian, or without `noise` a Point."""

    def __init__(
        self, shape: tuple[int, int, int], z_dim: int, channels: int, norm: str, dropout: float, noise: bool
    ) -> None:
        super().__init__()
        widths = stages(shape, channels)[::-1]
        layers: list[nn.Module] = [nn.Unflatten(1, (places(z_dim), SIDE, SIDE))]
        layers += [nn.Conv2d(places(z_dim), widths[0], 3, padding=1), *blocks(widths[0], norm, dropout)]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)]
            layers += blocks(outputs, norm, dropout)
        layers += [NORMS[norm](widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], (1 + noise) * shape[0], 3, padding=1)]
        self.net, self.noise = nn.Sequential(*layers), noise

    def forward(self, z: Tensor) -> DiagonalGaussian | Point:
        made = self.net(z).to(z.dtype)
        return pixels(*made.chunk(2, 1)) if self.noise else Point(made.sigmoid())


def joint(width: int, norm: str, dropout: float, outputs: int) -> nn.Sequential:
    r"""What the critic makes of all that it sees at each place, (B, width · 64) -> (B, outputs)."""
    hidden = 128
    return nn.Sequential(
        nn.Unflatten(1, (width, SIDE, SIDE)), nn.Conv2d(width, hidden, 1), *blocks(hidden, norm, dropout), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, outputs),
    )  # fmt: skip
