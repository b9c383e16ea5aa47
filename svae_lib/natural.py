r"""Nets for natural images: appendices A.2 and A.3 of paper S, whose p_θ(x|z) is a Gaussian on [0, 1), and others.

They see dequantised images (`svae_lib.levels.Cells`). A.2 and A.3 are one pattern at two sizes: stages of three layers,
the first of which halves (or doubles) the image. Like those of `svae_lib.nets`, they know sizes, not losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svae_lib.densities import DiagonalGaussian, Point
from svae_lib.errors import UserError
from svae_lib.nets import NORMS, Centre, conv, deconv

LOG_VAR_FLOOR = -12.0  # σ ≥ 0.6 of a grey level; a uniform draw within a level has 0.29


class Appendix(NamedTuple):
    r"""What A.2 and A.3 differ in: channels of each stage, and layers of 64 channels in each head of p_θ(x|z)."""

    widths: tuple[int, ...]
    head_layers: int

    def sides(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        r"""The spatial size behind all stages. Raises UserError where the image cannot be halved so often."""
        _, height, width = shape
        step = 2 ** len(self.widths)
        if height % step or width % step:
            raise UserError(f"these nets need image sides divisible by {step}, not {height}×{width}")
        return height // step, width // step


APPENDICES = {"a2": Appendix((16, 32, 64), 2), "a3": Appendix((32, 64, 128, 256), 3)}

ARCHITECTURES = (*APPENDICES, "authors", "beyond")


def encoder_features(
    plan: Appendix, shape: tuple[int, int, int], norm: str = "batch", dropout: float = 0.0
) -> tuple[nn.Sequential, int]:
    r"""q_φ(z|x) up to its two heads, and the number of features: (B, C, H, W) in [0, 1) -> (B, width).

    A.2: 5×5 conv 16 s2, 16, 16; 32 s2, 32, 32; 64 s2, 64, 64, 64. A.3 has a stage more. Source: S appendix A.
    """
    height, width = plan.sides(shape)
    layers, inputs = [], shape[0]
    for stage, outputs in enumerate(plan.widths):
        layers.append(conv(inputs, outputs, norm, dropout, size=3 if stage else 5, stride=2))
        layers += [conv(outputs, outputs, norm, dropout) for _ in range(2)]
        inputs = outputs
    layers.append(conv(inputs, inputs, norm, dropout))  # the last stage has one more
    return nn.Sequential(*layers, nn.Flatten()), inputs * height * width


def pixels(mean: Tensor, log_var: Tensor) -> DiagonalGaussian:
    r"""p_θ(x|z) of what two heads say: μ in (0, 1) by a sigmoid, log σ² > LOG_VAR_FLOOR by a softplus."""
    return DiagonalGaussian(mean.sigmoid(), LOG_VAR_FLOOR + F.softplus(log_var - LOG_VAR_FLOOR))


class Decoder(nn.Module):
    r"""p_θ(x|z): MLP, deconvolutions in stages, and a head each for μ and log σ².

    A.2: deconv 64 s2, 64, 64; 32 s2, 32, 32; 16 s2; heads of two deconv 64. The appendix ends in 64 channels and a
    ReLU; the 3×3 convolution to the colours behind it is ours, and so is the sigmoid that keeps μ in (0, 1).
    log σ² > LOG_VAR_FLOOR by a softplus, which has a slope everywhere.
    z (B, z_dim) -> DiagonalGaussian over (B, C, H, W), or with `noise` False no second head -> Point.
    Source: S appendix A.
    """

    def __init__(
        self, plan: Appendix, shape: tuple[int, int, int], z_dim: int, norm: str = "batch", dropout: float = 0.0,
        noise: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        height, width = plan.sides(shape)
        inputs = plan.widths[-1]
        layers = [nn.Linear(z_dim, inputs * height * width), nn.ReLU(), nn.Unflatten(1, (inputs, height, width))]
        for outputs in reversed(plan.widths):
            layers.append(deconv(inputs, outputs, norm, dropout, stride=2))
            if outputs != plan.widths[0]:
                layers += [deconv(outputs, outputs, norm, dropout) for _ in range(2)]
            inputs = outputs
        self.body = nn.Sequential(*layers)

        def head() -> nn.Sequential:
            widths = [inputs] + [64] * plan.head_layers
            made = [deconv(a, b, norm, dropout) for a, b in zip(widths, widths[1:], strict=False)]
            return nn.Sequential(*made, nn.Conv2d(64, shape[0], 3, padding=1))

        self.mean, self.log_var = head(), head() if noise else None

    def forward(self, z: Tensor) -> DiagonalGaussian | Point:
        features = self.body(z)
        mean = self.mean(features).to(self.mean[-1].weight.dtype)
        if self.log_var is None:
            return Point(mean.sigmoid())
        return pixels(mean, self.log_var(features).to(mean.dtype))


def critic_features(
    plan: Appendix, shape: tuple[int, int, int], norm: str = "batch", dropout: float = 0.0, pool: str = "average"
) -> tuple[nn.Sequential, int]:
    r"""What f_ψ sees of x: 5×5 convolutions of stride 2 (A.2: 16, 32, 64), pool; and the number of features.

    pool="average" is the appendix, pool="none" keeps the positions. Source: S appendix A.
    """
    height, width = plan.sides(shape)
    inputs = (shape[0], *plan.widths)
    layers = [conv(a, b, norm, dropout, size=5, stride=2) for a, b in zip(inputs, plan.widths, strict=False)]
    if pool == "average":
        layers.append(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten()), plan.widths[-1] * (1 if pool == "average" else height * width)


# The authors' program -----------------------------------------------------------------------------------
# The nets of the program that the authors of paper S published, for CIFAR-10. Encoder and decoder draw without a
# density: uniform noise is appended to their input. The prior is uniform on (−1, 1). Here a uniform code u is kept
# as z = √2 erf⁻¹(u), which is standard normal where u is uniform, so that nothing outside of these nets changes: a
# critic's log-ratio is the same in u and in z. Where a method adds a log-density, these nets give −mean|difference|.


def uniform(z: Tensor) -> Tensor:
    r"""u = 2Φ(z) − 1 = erf(z/√2), uniform on (−1, 1) where z is standard normal."""
    return torch.erf(z / math.sqrt(2))


def normal(u: Tensor) -> Tensor:
    r"""z = √2 erf⁻¹(u), the inverse of `uniform`; the last 10⁻⁶ of (−1, 1) at either end is one value."""
    return math.sqrt(2) * torch.erfinv(u.clamp(-1 + 1e-6, 1 - 1e-6))


class DrawnImage(Point):
    r"""A draw of x; `log_prob` is −mean|x − x̂| with pixels in [−1, 1], as in the authors' program: no density."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -2 * (value - self.mean).abs().flatten(1).mean(1)


class DrawnCode(Point):
    r"""A draw of z; `log_prob` is −mean|u − û|: no density."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -(uniform(value) - uniform(self.mean)).abs().mean(1)


class AppendNoise(nn.Module):
    r"""Uniform noise on (−1, 1) behind the channels of images (one channel), or behind codes (as many numbers)."""

    def forward(self, x: Tensor) -> Tensor:
        noise = 2 * torch.rand_like(x[:, :1] if x.dim() == 4 else x) - 1
        return torch.cat([x, noise], 1)


class Uniform(nn.Module):
    r"""The code that a net sees: uniform(z)."""

    def forward(self, z: Tensor) -> Tensor:
        return uniform(z)


def strided(inputs: int, widths: Sequence[int], norm: str, dropout: float = 0.0) -> nn.Sequential:
    r"""5×5 convolutions of stride 2, each with its norm and a leaky ReLU 0.2, and a flattening."""
    layers: list[nn.Module] = []
    for outputs in widths:
        layers += [nn.Conv2d(inputs, outputs, 5, 2, 2), NORMS[norm](outputs), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten())


AUTHORS = Appendix((32, 64, 128, 256), 0)  # of the encoder; the critic's are twice as wide
AUTHORS_CODE = 2_048  # what the critic makes of a code


class AuthorsEncoder(nn.Module):
    r"""u = tanh(linear(features(x, noise))): x (B, C, H, W) in [0, 1) -> DrawnCode (B, z_dim)."""

    def __init__(self, shape: tuple[int, int, int], z_dim: int, norm: str) -> None:
        super().__init__()
        height, width = AUTHORS.sides(shape)
        body = strided(shape[0] + 1, AUTHORS.widths, norm)
        self.net = nn.Sequential(Centre(), AppendNoise(), body, nn.Linear(256 * height * width, z_dim))

    def forward(self, x: Tensor) -> DrawnCode:
        return DrawnCode(normal(self.net(x).to(x.dtype).tanh()))


class AuthorsDecoder(nn.Module):
    r"""Linear to 512 channels, 5×5 deconvolutions of stride 2 to 256, 128 and the colours, tanh.

    z (B, z_dim) -> DrawnImage (B, C, H, W) in (0, 1).
    """

    def __init__(self, shape: tuple[int, int, int], z_dim: int, norm: str) -> None:
        super().__init__()
        height, width = (2 * side for side in AUTHORS.sides(shape))
        layers: list[nn.Module] = [Uniform(), AppendNoise(), nn.Linear(2 * z_dim, 512 * height * width)]
        layers += [nn.Unflatten(1, (512, height, width)), NORMS[norm](512), nn.ReLU()]
        for inputs, outputs in ((512, 256), (256, 128), (128, shape[0])):
            layers.append(nn.ConvTranspose2d(inputs, outputs, 5, 2, 2, output_padding=1))
            layers += [NORMS[norm](outputs), nn.ReLU()] if outputs != shape[0] else []
        self.net = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> DrawnImage:
        return DrawnImage(0.5 * (1 + self.net(z).to(z.dtype).tanh()))


def authors_critic_features(shape: tuple[int, int, int], norm: str, dropout: float) -> tuple[nn.Sequential, int]:
    r"""What f_ψ sees of x: 64, 128, 256 and 512 channels, not pooled; and the number of features."""
    height, width = AUTHORS.sides(shape)
    widths = [2 * channels for channels in AUTHORS.widths]
    return nn.Sequential(Centre(), strided(shape[0], widths, norm, dropout)), widths[-1] * height * width


def authors_code_features(z_dim: int) -> tuple[nn.Sequential, int]:
    r"""What f_ψ sees of z: a linear layer on the uniform code and noise; and the number of features."""
    layers = (Uniform(), AppendNoise(), nn.Linear(2 * z_dim, AUTHORS_CODE), nn.LeakyReLU(0.2))
    return nn.Sequential(*layers), AUTHORS_CODE
