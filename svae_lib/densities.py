r"""Densities in closed form: what encoders and decoders return.

A distribution here is a batch of independent vectors or images: ``log_prob``
sums over all but the first axis and returns one number per sample, in nats.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from svae_lib.errors import UserError

LOG_2PI = math.log(2 * math.pi)


class DiagonalGaussian(NamedTuple):
    r"""N(mean, diag e^log_var), both (B, ...); the encoder q_φ(z|x) of the papers."""

    mean: Tensor
    log_var: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        r"""−½ Σ [(v − μ)² e^{−log σ²} + log σ² + log 2π]; (B, ...) -> (B,)."""
        square = (value - self.mean).square() * (-self.log_var).exp()
        return -0.5 * (square + self.log_var + LOG_2PI).flatten(1).sum(1)

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        r"""μ + σ ε with ε ~ N(0, I), differentiable in μ and σ; `noise` gives ε."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.log_var).exp() * noise

    def rsample_and_log_prob(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""A draw and its own log-density, −½ Σ [ε² + log σ² + log 2π]; -> (B, ...), (B,)."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        log_prob = -0.5 * (noise.square() + self.log_var + LOG_2PI).flatten(1).sum(1)
        return self.rsample(noise), log_prob

    def standardise(self, value: Tensor) -> Tensor:
        r"""(v − μ)/σ, the noise that `rsample` would have made it of."""
        return (value - self.mean) * (-0.5 * self.log_var).exp()

    def kl(self, other: DiagonalGaussian) -> Tensor:
        r"""KL(self ‖ other) in nats; -> (B,)."""
        square = (self.mean - other.mean).square() * (-other.log_var).exp()
        ratio = self.log_var - other.log_var
        return 0.5 * (square + ratio.exp() - 1 - ratio).flatten(1).sum(1)

    def kl_to_standard(self) -> Tensor:
        r"""KL(self ‖ N(0, I)) = ½ Σ (μ² + σ² − 1 − log σ²); -> (B,)."""
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var).flatten(1).sum(1)


class BernoulliImage(NamedTuple):
    r"""Independent Bernoulli pixels with the given logits, (B, ...): p_θ(x|z) on MNIST.

    Targets may be binary, or grey in [0, 1]: then −log_prob is the cross-entropy of
    paper A §5.1, the mean of the binary NLL over all binarisations of the grey image.
    """

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Σ [v log σ(l) + (1 − v) log σ(−l)]; (B, ...) -> (B,)."""
        nll = binary_cross_entropy_with_logits(self.logits, value, reduction="none")
        return -nll.flatten(1).sum(1)

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        r"""The mean image. Bernoulli draws have no pathwise gradient, so the draw that the
        critic compares with a grey image is the mean (chapter MNIST)."""
        return self.mean


class Point(NamedTuple):
    r"""All mass at one point, (B, ...): a network that adds no noise, or whose noise went in at its input.

    It can be drawn from and has no density: `log_prob` raises UserError. With noise at the input, `moments` may be
    the Gaussian that has the mean and the variances of the unknown density.
    """

    mean: Tensor
    moments: DiagonalGaussian | None = None

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        return self.mean

    def rsample_and_log_prob(self, noise: Tensor | None = None) -> tuple[Tensor, None]:
        return self.mean, None

    def log_prob(self, value: Tensor) -> Tensor:
        cure = "set encoder=gaussian, decoder=gaussian and components=1, or choose another setting than authors"
        raise UserError(f"this needs a density where the net only draws; {cure}")


class DiscretisedGaussian(NamedTuple):
    r"""A §5.1: p(i) = Φ((i + 1 − μ)/σ) − Φ((i − μ)/σ), the mass that N(μ, σ²) gives to the grey level i = 0..255.

    mean and log_var (B, ...) in grey levels, on the axis on which level i is the interval [i, i + 1). With
    `open_edges` the levels 0 and 255 also get the mass beyond them, so that the 256 probabilities sum to one;
    with the closed cells of the paper's formula they sum to less. Nothing is clamped: a bad fit costs what it costs.
    """

    mean: Tensor
    log_var: Tensor
    open_edges: bool = False

    @staticmethod
    def on_levels(density: DiagonalGaussian, open_edges: bool = False) -> DiscretisedGaussian:
        r"""The same for a Gaussian on [0, 1), where level i is the interval [i, i + 1)/256."""
        return DiscretisedGaussian(256 * density.mean, density.log_var + 2 * math.log(256), open_edges)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Σ log p(i) in nats for levels `value` (B, ...), integers in any dtype; -> (B,)."""
        value = value.to(self.mean.dtype)
        scale = (-0.5 * self.log_var).exp()
        low, high = (value - self.mean) * scale, (value + 1 - self.mean) * scale
        if self.open_edges:
            low = low.masked_fill(value == 0, -math.inf)
            high = high.masked_fill(value == 255, math.inf)
        right = low > 0  # both ends in the right tail: mirror the cell, for Φ is only accurate on the left
        low, high = torch.where(right, -high, low), torch.where(right, -low, high)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return (log_high + torch.log(-torch.expm1(log_low - log_high))).flatten(1).sum(1)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""log N(z; 0, I), the prior p(z); (B, ...) -> (B,)."""
    return -0.5 * (z.square() + LOG_2PI).flatten(1).sum(1)


def kl_to_prior(q: Any, z: Tensor, log_q: Tensor | None) -> Tensor:
    r"""KL(q ‖ p(z)) in nats: in closed form for a Gaussian, else log q(z) − log p(z), estimated by z ~ q; -> (B,)."""
    if isinstance(q, DiagonalGaussian):
        return q.kl_to_standard()
    log_q = Point.log_prob(q, z) if log_q is None else log_q  # raises UserError
    return log_q - standard_normal_log_prob(z)
