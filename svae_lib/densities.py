r"""Densities in closed form: what encoders and decoders return.

A distribution here is a batch of independent vectors or images: ``log_prob``
sums over all but the first axis and returns one number per sample, in nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

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

    def entropy(self) -> Tensor:
        r"""h = ½ Σ [log σ² + log 2πe]; -> (B,)."""
        return 0.5 * (self.log_var + LOG_2PI + 1).flatten(1).sum(1)

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


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""log N(z; 0, I), the prior p(z); (B, ...) -> (B,)."""
    return -0.5 * (z.square() + LOG_2PI).flatten(1).sum(1)
