r"""One-dimensional data and codes as tables on a grid: nothing is sampled, nothing approximated.

Tables hold log-*masses* (density times cell) that sum to one, so a divergence is a finite sum and the
papers' identities hold to round-off. Rows are x, columns z, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def log_gaussian(value: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    r"""log N(value; mean, std²) up to a constant; `log_softmax` finds the constant."""
    return -0.5 * ((value - mean) / std).square() - torch.as_tensor(std, dtype=value.dtype).log()


def mixture(x: Tensor, weights: Iterable[float], means: Iterable[float], std: float) -> Tensor:
    r"""Log-masses of Σ_k w_k N(m_k, std²) on the points x."""
    parts = [math.log(w) + log_gaussian(x, m, std) for w, m in zip(weights, means, strict=True)]
    return torch.stack(parts).logsumexp(0).log_softmax(0)


def kl(a: Tensor, b: Tensor) -> Tensor:
    r"""KL(a ‖ b) = Σ a (log a − log b) of two tables of log-masses, in nats."""
    return (a.exp() * (a - b)).sum()


def support(log_mass: Tensor, eps: float) -> Tensor:
    r"""The ε-support: the smallest set of cells that holds 1 − ε of the mass; boolean.

    Cells are equally large, so the fullest enter first; ε decides at which level to stop.
    """
    mass, order = log_mass.flatten().exp().sort(descending=True, stable=True)
    inside = torch.zeros(len(mass), dtype=torch.bool)
    inside[order] = mass.cumsum(0) - mass < 1 - eps  # the mass of all fuller cells
    return inside.reshape(log_mass.shape)


def fraction_inside(a: Tensor, b: Tensor) -> float:
    r"""|A ∩ B| / |A| for two sets of cells: 1 when A ⊂ B."""
    return float((a & b).sum() / a.sum())


@dataclass(frozen=True)
class Joints:
    r"""Both joints on one grid: log_q = log q_φ(x, z) and log_p = log p_θ(x, z), both (X, Z)."""

    x: Tensor
    z: Tensor
    log_q: Tensor
    log_p: Tensor

    @property
    def q_x(self) -> Tensor:
        r"""Log-masses of the data q(x); (X,)."""
        return self.log_q.logsumexp(1)

    @property
    def q_z(self) -> Tensor:
        r"""Log-masses of the aggregated code q_φ(z); (Z,)."""
        return self.log_q.logsumexp(0)

    @property
    def p_x(self) -> Tensor:
        r"""Log-masses of the model marginal p_θ(x); (X,)."""
        return self.log_p.logsumexp(1)

    @property
    def p_z(self) -> Tensor:
        r"""Log-masses of the prior p(z); (Z,)."""
        return self.log_p.logsumexp(0)

    def L_x(self) -> Tensor:
        r"""S1: E_qφ(x,z) log [p_θ(x|z) p(z) / q_φ(z|x)]; dx makes densities of masses."""
        log_ratio = self.log_p - (self.log_q - self.q_x[:, None])
        return (self.log_q.exp() * log_ratio).sum() - (self.x[1] - self.x[0]).log()

    def L_z(self) -> Tensor:
        r"""S5: E_pθ(x,z) log [q_φ(z|x) q(x) / p_θ(x|z)]; dz makes densities of masses."""
        log_ratio = self.log_q - (self.log_p - self.p_z)
        return (self.log_p.exp() * log_ratio).sum() - (self.z[1] - self.z[0]).log()

    def data_fit(self) -> Tensor:
        r"""R of S28: E_qφ log p_θ(x|z) + E_pθ log q_φ(z|x); dx and dz make densities of masses."""
        log_p = (self.log_q.exp() * (self.log_p - self.p_z)).sum() - (self.x[1] - self.x[0]).log()
        log_q = (self.log_p.exp() * (self.log_q - self.q_x[:, None])).sum() - (self.z[1] - self.z[0]).log()
        return log_p + log_q

    def L_xz(self, weight: float = 0.0) -> Tensor:
        r"""S7, S28: L_x + L_z + λ R, λ being `weight`."""
        value = self.L_x() + self.L_z()
        return value + weight * self.data_fit() if weight else value


class Family(nn.Module):
    r"""p(z) = N(0, 1), encoder q_φ(z|x) = N(μ_φ(x), σ_φ(x)²), decoder p_θ(x|z) = N(μ_θ(z), σ_θ²).

    μ_φ, log σ_φ and the climb of μ_θ are small tanh networks, `seed` draws them, and the decoder is
    centred on a random datum. |dμ_θ/dz| ≤ `slope`: what lies far apart cannot be joined by a jump.
    """

    def __init__(self, x: Tensor, z: Tensor, q_x: Tensor, slope: float, seed: int = 0) -> None:
        super().__init__()
        self.x, self.z, self.q_x, self.slope = x, z, q_x, slope
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder, self.climb = self._net(2), self._net(1)
            self.centre = nn.Parameter(x[torch.multinomial(q_x.exp(), 1)])
        self.log_std = nn.Parameter(torch.zeros(1, dtype=x.dtype))

    @staticmethod
    def _net(n: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, n)).double()

    def forward(self) -> Joints:
        r"""Both joints on the grid; standard deviations are at least 0.2, a few cells."""
        mean_z, log_std_z = self.encoder(self.x[:, None] / 3)[..., None].unbind(1)
        climb = self.slope * self.climb(self.z[:, None]).squeeze(1).tanh() * (self.z[1] - self.z[0])
        mean_x = self.centre + climb.cumsum(0) - climb[: len(climb) // 2 + 1].sum()
        q_z_given_x = log_gaussian(self.z, 3 * mean_z, 0.2 + log_std_z.exp()).log_softmax(1)
        p_x_given_z = log_gaussian(self.x[:, None], mean_x, 0.2 + self.log_std.exp()).log_softmax(0)
        p_z = log_gaussian(self.z, 0.0, 1.0).log_softmax(0)
        return Joints(self.x, self.z, self.q_x[:, None] + q_z_given_x, p_z + p_x_given_z)


def minimise(loss: Callable[[], Tensor], parameters: Iterable[Tensor], steps: int = 400) -> float:
    r"""Minimise an exact loss in place with L-BFGS; returns the value reached."""
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=steps, history_size=20, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return float(loss().detach())


def fit(goal: Callable[[Joints], Tensor], x: Tensor, z: Tensor, q_x: Tensor, slope: float, starts: int = 6) -> Joints:
    r"""The best of several maximisations of `Joints.L_x`, `L_z` or `L_xz`; of ±z the one whose decoder climbs."""
    best, best_loss = None, math.inf
    for seed in range(starts):
        family = Family(x, z, q_x, slope, seed)
        loss = minimise(lambda: -goal(family()), family.parameters())  # noqa: B023
        if loss < best_loss - 1e-3:  # ties go to the first, on every machine
            with torch.no_grad():
                best, best_loss = family(), loss
    mean_x = x @ (best.log_p - best.p_z).exp()
    return best if mean_x[-1] > mean_x[0] else Joints(x, z, best.log_q.flip(1), best.log_p.flip(1))
