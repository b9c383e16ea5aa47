r"""The networks, by the name of the appendix that prints them. Nets know sizes, not losses.

Their outputs are fp32 under autocast too: only convolutions and matrix products run in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from svae_lib.densities import BernoulliImage, DiagonalGaussian, Point
from svae_lib.errors import UserError

LOG_VAR_LIMIT = 12.0  # keeps e^{log σ²} and its inverse finite in fp32; never reached in a healthy run

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "none": nn.Identity,
}

POINT_NORMS = {
    "batch": nn.BatchNorm1d,
    "group": nn.LayerNorm,  # one group
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


def init_dcgan(net: nn.Module) -> nn.Module:
    r"""N(0, 0.02²) weights, N(1, 0.02²) slopes of the norms, and zero biases. Source: Radford et al. 2016."""
    for module in net.modules():
        norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
        if norm or isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, float(norm), 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def conv(inputs: int, outputs: int, norm: str, dropout: float, size: int = 3, stride: int = 1) -> nn.Sequential:
    r"""One "conv, BN, ReLU" of the appendix, then dropout: (H, W) -> (H/stride, W/stride)."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
    return nn.Sequential(layer, NORMS[norm](outputs), nn.ReLU(), nn.Dropout(dropout))


def deconv(inputs: int, outputs: int, norm: str, dropout: float, stride: int = 1) -> nn.Sequential:
    r"""One "3×3 deconv, BN, ReLU", then dropout: (H, W) -> (stride·H, stride·W)."""
    layer = nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1)
    return nn.Sequential(layer, NORMS[norm](outputs), nn.ReLU(), nn.Dropout(dropout))


down, up = partial(conv, stride=2), partial(deconv, stride=2)


def quarter(shape: tuple[int, int, int]) -> tuple[int, int]:
    r"""The spatial size after two strides of 2. Raises UserError where that is not exact."""
    _, height, width = shape
    if height % 4 or width % 4:
        raise UserError(f"the A.1 nets need image sides divisible by 4, not {height}×{width}")
    return height // 4, width // 4


def a1_features(shape: tuple[int, int, int], hidden: int, norm: str, dropout: float) -> nn.Sequential:
    r"""q_φ(z|x) of A.1 up to its heads: conv 32 s2, conv 64 s2, MLP; x (B, C, H, W) in [0, 1] -> (B, hidden).

    Source: S appendix A.1.
    """
    height, width = quarter(shape)
    return nn.Sequential(
        down(shape[0], 32, norm, dropout),
        down(32, 64, norm, dropout),
        nn.Flatten(),
        nn.Linear(64 * height * width, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


def mlp(inputs: int, hidden: int, depth: int, norm: str = "none", dropout: float = 0.0) -> nn.Sequential:
    r"""`depth` hidden layers of ReLUs; (B, inputs) -> (B, hidden)."""
    layers: list[nn.Module] = []
    for width in [inputs] + [hidden] * (depth - 1):
        layers += [nn.Linear(width, hidden), POINT_NORMS[norm](hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class GaussianHead(nn.Module):
    r"""The two heads (μ, log σ²) of an encoder or decoder; features (B, width) -> DiagonalGaussian over (B, dim)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * dim)

    def forward(self, features: Tensor) -> DiagonalGaussian:
        mean, log_var = self.linear(features).to(self.linear.weight.dtype).chunk(2, 1)
        return DiagonalGaussian(mean, log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT))


class PointHead(nn.Module):
    r"""One head and no noise: features (B, width) -> Point in (B, dim)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Point:
        return Point(self.linear(features).to(self.linear.weight.dtype))


class ImplicitEncoder(nn.Module):
    r"""z = c(x) + Σ_k a_k(x) ⊙ v_k(ε_k), ε_k ~ N(0, I): draws without a density, whose first two moments are known.

    The nets v_k do not see x, so their means and variances are shared by a batch and estimated from `others` draws:
    E z = c + Σ a_k E v_k and Var z = Σ a_k² Var v_k. u -> Point in (B, dim). Source: Mescheder et al. 2017.
    """

    runs = 1  # stacked ones (`svae_lib.ensembles`), each with other draws of its own

    def __init__(self, body: nn.Module, width: int, dim: int, sources: int = 8, others: int = 512) -> None:
        super().__init__()
        self.body, self.dim, self.others = body, dim, others
        self.head = nn.Linear(width, (1 + sources) * dim)
        self.sources = nn.ModuleList(nn.Sequential(mlp(dim, width, 2), nn.Linear(width, dim)) for _ in range(sources))

    def forward(self, u: Tensor) -> Point:
        made = self.head(self.body(u)).to(self.head.weight.dtype).unflatten(1, (-1, self.dim))
        c, a = made[:, 0], made[:, 1:]
        own = len(u) // self.runs
        noise = torch.randn(len(self.sources), self.runs * (own + self.others), self.dim, device=u.device)
        v = torch.stack([source(eps) for source, eps in zip(self.sources, noise, strict=True)], 1).to(c.dtype)
        v, others = v.unflatten(0, (self.runs, -1)).split([own, self.others], 1)
        mean, variance = (moment.repeat_interleave(own, 0) for moment in (others.mean(1), others.var(1)))
        log_var = (a.square() * variance).sum(1).log().clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
        return Point(c + (a * v.flatten(0, 1)).sum(1), DiagonalGaussian(c + (a * mean).sum(1), log_var))


class A1Decoder(nn.Module):
    r"""p_θ(x|z) of A.1: MLP, deconv 64 s2, deconv 32 s2, and a 3×3 convolution to the pixel logits.

    The appendix ends in a ReLU of 32 channels; the last convolution is ours (chapter MNIST).
    z (B, z_dim) -> BernoulliImage over (B, C, H, W). Source: S appendix A.1.
    """

    def __init__(self, shape: tuple[int, int, int], z_dim: int, hidden: int, norm: str, dropout: float) -> None:
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
        return BernoulliImage(self.net(z).to(z.dtype))


class Noise(nn.Module):
    r"""Adds Gaussian noise of that std, in evaluation too.

    A critic behind it sees the log-ratio of the two smoothed joints, which is finite (Sønderby et al. 2017).
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.std else x


class Critic(nn.Module):
    r"""f_ψ of one or several arguments: features of each, concatenated, MLP -> scores.

    x (B, ...), z (B, z_dim) -> (B,), or (B, outputs) if `joint` ends in several features. Source: S appendix A.1.
    """

    def __init__(self, parts: Sequence[nn.Module], joint: nn.Module) -> None:
        super().__init__()
        self.parts, self.joint = nn.ModuleList(parts), joint

    def forward(self, *arguments: Tensor) -> Tensor:
        features = [part(argument) for part, argument in zip(self.parts, arguments, strict=True)]
        return self.joint(torch.cat(features, 1)).squeeze(1).to(arguments[0].dtype)


def a1_critic_features(shape: tuple[int, int, int], norm: str, dropout: float, pool: str) -> tuple[nn.Sequential, int]:
    r"""What f_ψ of A.1 sees of x: conv 32 s2, conv 64 s2, pool; and the number of features.

    pool="average" is the appendix: global average pooling leaves 64 numbers of x, no positions.
    pool="none" flattens instead, so that the critic can see *where* a stroke is. Source: S appendix A.1.
    """
    height, width = quarter(shape)
    positions = 1 if pool == "average" else height * width
    of_x = nn.Sequential(
        down(shape[0], 32, norm, dropout),
        down(32, 64, norm, dropout),
        nn.AdaptiveAvgPool2d(1) if pool == "average" else nn.Identity(),
        nn.Flatten(),
    )
    return of_x, 64 * positions


class Energy(nn.Module):
    r"""f_ψ(x) = ‖x − r_ψ(x)‖ of an autoencoder r_ψ, the critic of the energy-based GAN; (B, ...) -> (B,)."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.autoencoder(x).mean).flatten(1).norm(dim=1)


class MixtureGenerator(nn.Module):
    r"""T generators and the logits of their weights: z (B, z_dim) -> Point (B, ...), one draw of the mixture each.

    Which component draws is part of the noise that went in, as z is. It has no pathwise gradient: a method
    learns the weights from `components` and `log_weights`. Source: Arora et al. 2017.
    """

    def __init__(self, generators: Sequence[nn.Module]) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators)
        self.logits = nn.Parameter(torch.zeros(len(generators)))

    @property
    def log_weights(self) -> Tensor:
        r"""log w (T,), w = softmax of the logits; uniform at first."""
        return self.logits.log_softmax(0)

    def components(self, z: Tensor) -> Tensor:
        r"""What every component makes of every z: (B, z_dim) -> (T, B, ...)."""
        return torch.stack([generator(z).mean for generator in self.generators])

    def forward(self, z: Tensor) -> Point:
        chosen = torch.multinomial(self.log_weights.detach().exp(), len(z), replacement=True)
        return Point(self.components(z)[chosen, torch.arange(len(z), device=z.device)])


# The deep convolutional GAN -----------------------------------------------------------------------------


def dcgan_sides(shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    r"""The sides of the images in the nets, halved until they are at most 7: 64, 32, 16, 8, 4; 28, 14, 7; 8, 4."""
    sides = [shape[1:]]
    while len(sides) == 1 or max(sides[-1]) > 7:
        height, width = sides[-1]
        if height % 2 or width % 2:
            raise UserError(f"the DCGAN nets need image sides that halve down to 7 or less, not {shape[1]}×{shape[2]}")
        sides.append((height // 2, width // 2))
    return sides


class DCGANDecoder(nn.Module):
    r"""The generator: MLP, then 4×4 deconvolutions of stride 2 with BN and ReLU, the channels halved each time.

    The paper's four deconvolutions make 64×64 pixels; smaller images have fewer. Its tanh in [−1, 1] is our
    sigmoid of the logits in [0, 1]. z (B, z_dim) -> BernoulliImage over (B, C, H, W). Source: Radford et al. 2016.
    """

    def __init__(self, shape: tuple[int, int, int], z_dim: int, channels: int, norm: str) -> None:
        super().__init__()
        *outer, (height, width) = dcgan_sides(shape)
        wide = [channels * 2**stage for stage in reversed(range(len(outer)))]
        layers = [nn.Linear(z_dim, wide[0] * height * width), nn.Unflatten(1, (wide[0], height, width))]
        layers += [NORMS[norm](wide[0]), nn.ReLU()]
        for inputs, outputs in zip(wide, wide[1:], strict=False):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), NORMS[norm](outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(channels, shape[0], 4, 2, 1))

    def forward(self, z: Tensor) -> BernoulliImage:
        return BernoulliImage(self.net(z).to(z.dtype))


class Centre(nn.Module):
    r"""[0, 1] -> [−1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


def dcgan_features(shape: tuple[int, int, int], channels: int, norm: str, dropout: float) -> tuple[nn.Sequential, int]:
    r"""The discriminator without its last layer, and its features: 4×4 convolutions of stride 2, leaky ReLU 0.2.

    The channels double each time; all but the first have a norm. Source: Radford et al. 2016.
    """
    *outer, (height, width) = dcgan_sides(shape)
    wide = [shape[0], *(channels * 2**stage for stage in range(len(outer)))]
    layers: list[nn.Module] = [Centre()]
    for stage, (inputs, outputs) in enumerate(zip(wide, wide[1:], strict=False)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), NORMS[norm if stage else "none"](outputs)]
        layers += [nn.LeakyReLU(0.2), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten()), wide[-1] * height * width
