r"""The networks, by the name of the appendix that prints them. Nets know sizes, not losses.

Their outputs are fp32 under autocast too: only convolutions and matrix products run in bf16.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from svae_lib.densities import BernoulliImage, DiagonalGaussian
from svae_lib.errors import UserError

LOG_VAR_LIMIT = 8.0  # keeps e^{log σ²} and its inverse finite in fp32; never reached in a healthy run

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 8),
    "none": nn.Identity,
}

POOLS = ("average", "none")


def init_xavier(net: nn.Module) -> nn.Module:
    r"""Xavier-uniform weights and zero biases (paper S §6)."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def down(inputs: int, outputs: int, norm: str, dropout: float) -> nn.Sequential:
    r"""One "3×3 conv, stride 2, BN, ReLU" of the appendix, then dropout: (H, W) -> (H/2, W/2)."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    return nn.Sequential(conv, NORMS[norm](outputs), nn.ReLU(), nn.Dropout(dropout))


def up(inputs: int, outputs: int, norm: str, dropout: float) -> nn.Sequential:
    r"""One "3×3 deconv, stride 2, BN, ReLU", then dropout: (H, W) -> (2H, 2W)."""
    deconv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(deconv, NORMS[norm](outputs), nn.ReLU(), nn.Dropout(dropout))


def quarter(shape: tuple[int, int, int]) -> tuple[int, int]:
    r"""The spatial size after two strides of 2. Raises UserError where that is not exact."""
    _, height, width = shape
    if height % 4 or width % 4:
        raise UserError(f"the A.1 nets need image sides divisible by 4, not {height}×{width}")
    return height // 4, width // 4


class A1Encoder(nn.Module):
    r"""q_φ(z|x) of A.1 with a diagonal Gaussian: conv 32 s2, conv 64 s2, MLP -> (μ_z, log σ²_z).

    x (B, C, H, W) in [0, 1] -> DiagonalGaussian over (B, z_dim). Source: S appendix A.1.
    """

    def __init__(
        self, shape: tuple[int, int, int], z_dim: int, hidden: int, norm: str = "batch", dropout: float = 0.0
    ) -> None:
        super().__init__()
        height, width = quarter(shape)
        self.net = nn.Sequential(
            down(shape[0], 32, norm, dropout),
            down(32, 64, norm, dropout),
            nn.Flatten(),
            nn.Linear(64 * height * width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 2 * z_dim),
        )

    def forward(self, x: Tensor) -> DiagonalGaussian:
        mean, log_var = self.net(x).float().chunk(2, 1)
        return DiagonalGaussian(mean, log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT))


class A1Decoder(nn.Module):
    r"""p_θ(x|z) of A.1: MLP, deconv 64 s2, deconv 32 s2, and a 3×3 convolution to the pixel logits.

    The appendix ends in a ReLU of 32 channels; the last convolution is ours (chapter MNIST).
    z (B, z_dim) -> BernoulliImage over (B, C, H, W). Source: S appendix A.1.
    """

    def __init__(
        self, shape: tuple[int, int, int], z_dim: int, hidden: int, norm: str = "batch", dropout: float = 0.0
    ) -> None:
        super().__init__()
        height, width = quarter(shape)
        self.net = nn.Sequential(
            nn.Linear(z_dim, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 64 * height * width),
            nn.ReLU(),
            nn.Unflatten(1, (64, height, width)),
            up(64, 64, norm, dropout),
            up(64, 32, norm, dropout),
            nn.Conv2d(32, shape[0], 3, padding=1),
        )

    def forward(self, z: Tensor) -> BernoulliImage:
        return BernoulliImage(self.net(z).float())


class A1Critic(nn.Module):
    r"""f_ψ(x, z) of A.1: conv 32 s2, conv 64 s2, pool; MLP of z; concatenate, MLP -> one score.

    pool="average" is the appendix: global average pooling leaves 64 numbers of x, no positions.
    pool="none" flattens instead, so that the critic can see *where* a stroke is.
    noise > 0 adds Gaussian noise of that std to every image it is shown, real or drawn, always:
    f is then the log-ratio of the two smoothed joints, which is finite (Sønderby et al. 2017).
    x (B, C, H, W), z (B, z_dim) -> (B,). Source: S appendix A.1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        z_dim: int,
        hidden: int,
        norm: str = "batch",
        dropout: float = 0.0,
        pool: str = "average",
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.noise = noise
        height, width = quarter(shape)
        positions = 1 if pool == "average" else height * width
        self.of_x = nn.Sequential(
            down(shape[0], 32, norm, dropout),
            down(32, 64, norm, dropout),
            nn.AdaptiveAvgPool2d(1) if pool == "average" else nn.Identity(),
            nn.Flatten(),
        )
        self.of_z = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.of_both = nn.Sequential(
            nn.Linear(64 * positions + hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        return self.of_both(torch.cat([self.of_x(x), self.of_z(z)], 1)).squeeze(1).float()
