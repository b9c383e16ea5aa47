r"""Mixtures of equal round Gaussians in the plane: targets whose modes and density are known.

`ring8` and `grid25` are those of VEEGAN and PacGAN, `alice5` that of ALICE, all in units of their standard deviation,
so that one setting can serve them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    r"""q(x) = (1/K) Σ_k N(x; c_k, σ² I); `centres` (K, d), `std` is σ."""

    centres: Tensor
    std: float

    def standardised(self) -> Mixture:
        r"""The same mixture in units of its own standard deviation, the root mean square of all coordinates."""
        unit = (self.centres.square().mean() + self.std**2).sqrt().item()
        return Mixture(self.centres / unit, self.std / unit)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        r"""Points and the numbers of their components; (count, d), (count,)."""
        component = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, self.centres.shape[1], generator=generator)
        return self.centres[component] + self.std * noise, component

    def log_components(self, x: Tensor) -> Tensor:
        r"""log [(1/K) N(x; c_k, σ² I)] for each k; (B, d) -> (B, K), in nats."""
        square = (x[:, None] - self.centres).square().sum(-1) / self.std**2
        dim = self.centres.shape[1]
        return -0.5 * square - dim * (math.log(self.std) + 0.5 * math.log(2 * math.pi)) - math.log(len(self.centres))

    def log_prob(self, x: Tensor) -> Tensor:
        r"""log q(x); (B, d) -> (B,)."""
        return self.log_components(x).logsumexp(1)

    def log_posterior(self, x: Tensor) -> Tensor:
        r"""log q(k|x): the ideal classifier; (B, d) -> (B, K)."""
        return self.log_components(x).log_softmax(1)


def _grid(side: Tensor) -> Tensor:
    return torch.cartesian_prod(side, side)


_ANGLES = torch.arange(8) * (2 * math.pi / 8)

_PUBLISHED = {
    "ring8": Mixture(torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1), 0.01),
    "grid25": Mixture(_grid(torch.arange(-4.0, 5.0, 2.0)), 0.05),
    "alice5": Mixture(torch.cat([torch.zeros(1, 2), _grid(torch.tensor([-2.0, 2.0]))]), 0.2),
}
MIXTURES = {name: mixture.standardised() for name, mixture in _PUBLISHED.items()}
