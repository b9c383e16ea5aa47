r"""Nets for natural images: appendices A.2 and A.3 of paper S, whose p_θ(x|z) is a Gaussian on [0, 1).

They see dequantised images (`svae_lib.data.Cells`). A.2 and A.3 are one pattern at two sizes: stages of three layers,
the first of which halves (or doubles) the image. Like those of `svae_lib.nets`, they know sizes, not losses.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from svae_lib.densities import DiagonalGaussian, Point
from svae_lib.errors import UserError
from svae_lib.nets import conv, deconv

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

ARCHITECTURES = (*APPENDICES,)


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
        mean = self.mean(features).to(self.mean[-1].weight.dtype).sigmoid()
        if self.log_var is None:
            return Point(mean)
        log_var = self.log_var(features).to(mean.dtype)
        return DiagonalGaussian(mean, LOG_VAR_FLOOR + F.softplus(log_var - LOG_VAR_FLOOR))


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
