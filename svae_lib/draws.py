r"""What a method is made of: the nets, a batch of draws from both joints, and the method itself.

The players are the decoder (θ) and the encoder (φ). Critic and player objectives are maximised in turn on the
draws of one batch; `svae_lib.train.Trainer.alternate` is the update, `svae_lib.methods` has the rows of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from svae_lib import objectives
from svae_lib.densities import DiagonalGaussian, kl_to_prior
from svae_lib.levels import Axis, Grey


@dataclass
class Model:
    r"""Decoder p_θ(x|z), encoder q_φ(z|x) or None, and the critics f_ψ; each critic maps its arguments to scores."""

    encoder: nn.Module | None
    decoder: nn.Module
    critics: Sequence[Callable[..., Tensor]]
    z_dim: int
    axis: Axis = Grey  # on which the nets see the grey levels of images

    @property
    def players(self) -> nn.ModuleDict:
        both = {"encoder": self.encoder, "decoder": self.decoder}
        return nn.ModuleDict({name: net for name, net in both.items() if net is not None})


@dataclass
class Draws:
    r"""A batch from each joint: (x, z_q) ~ q_φ(x, z) and (x_p, z_p) ~ p_θ(x, z), pathwise differentiable.

    `x` (B, ...) comes from the data and `z_p` (B, z_dim) from the prior. Everything else is computed
    when first asked for, so a method pays only for what its equation mentions; scores are computed whenever
    they are asked for, because the critic moves between its step and the players'. `noise_q`, `noise_p`
    replace the random ε of the two conditionals (used to integrate exactly).
    """

    model: Model
    x: Tensor
    z_p: Tensor
    weight: float = 0.0  # λ of the method
    noise_q: Tensor | None = field(default=None, repr=False)
    noise_p: Tensor | None = field(default=None, repr=False)
    runs: int = 1  # stacked runs, which share the batch one after the other (`svae_lib.ensembles`)
    scored: list[tuple[Tensor, list[Tensor]]] | None = field(default=None, repr=False)

    @cached_property
    def q_z_given_x(self) -> Any:
        r"""q_φ(z|x) at the data; a density of `svae_lib.densities` or `svae_lib.flows`."""
        return self.model.encoder(self.x)

    @cached_property
    def p_x_given_z_q(self) -> Any:
        r"""p_θ(x|z) at the encoder's codes."""
        return self.model.decoder(self.z_q)

    @cached_property
    def _z_q_and_log_q(self) -> tuple[Tensor, Tensor | None]:
        r"""z̃, and its log-density where the KL to the prior is estimated by it."""
        q = self.q_z_given_x
        if isinstance(q, DiagonalGaussian):
            return q.rsample(self.noise_q), None
        return q.rsample_and_log_prob(self.noise_q)

    @property
    def z_q(self) -> Tensor:
        return self._z_q_and_log_q[0]

    @cached_property
    def x_p(self) -> Tensor:
        return self.model.decoder(self.z_p).rsample(self.noise_p)

    @cached_property
    def x_q(self) -> Tensor:
        r"""The reconstruction x̂ ~ p_θ(x|z̃) of the data from their codes."""
        return self.p_x_given_z_q.rsample()

    def score(self, *pair: Tensor, critic: int = 0) -> Tensor:
        r"""f_ψ of a batch of pairs. With `scored` a list, the pairs are cut off and kept there with their scores."""
        if self.scored is not None:
            pair = [part.detach().requires_grad_() for part in pair]
        scores = self.model.critics[critic](*pair)
        if self.scored is not None:
            self.scored.append((scores, pair))
        return scores

    @property
    def f_q(self) -> Tensor:
        return self.score(self.x, self.z_q)

    @property
    def f_p(self) -> Tensor:
        return self.score(self.x_p, self.z_p)

    @cached_property
    def kl_to_prior(self) -> Tensor:
        r"""KL(q_φ(z|x) ‖ p(z)): in closed form for a Gaussian, else log q_φ(z̃|x) − log p(z̃), its one-draw estimate."""
        return kl_to_prior(self.q_z_given_x, *self._z_q_and_log_q)

    @cached_property
    def log_p_x_given_z(self) -> Tensor:
        r"""log p_θ(x|z) on encoder pairs; its gradient also reaches φ through z_q."""
        return self.p_x_given_z_q.log_prob(self.x)

    @cached_property
    def log_q_z_given_x(self) -> Tensor:
        r"""log q_φ(z|x) on decoder pairs; its gradient also reaches θ through x_p."""
        return self.model.encoder(self.x_p).log_prob(self.z_p)

    @cached_property
    def log_p_x_given_z_detached(self) -> Tensor:
        r"""The same value with z_q held fixed: its θ-gradient is the missing half of −∇_θ KL(q_φ ‖ p_θ)."""
        return self.model.decoder(self.z_q.detach()).log_prob(self.x)

    @cached_property
    def log_q_z_given_x_detached(self) -> Tensor:
        r"""The same value with x_p held fixed: its φ-gradient is the missing half of −∇_φ KL(p_θ ‖ q_φ)."""
        return self.model.encoder(self.x_p.detach()).log_prob(self.z_p)

    def of_others(self, z: Tensor) -> Tensor:
        r"""The same codes in another order: everyone gets those of a neighbour in the batch, an independent draw."""
        return z.unflatten(0, (self.runs, -1)).roll(1, 1).flatten(0, 1)


Objective = Callable[[Draws], Tensor]


def lrt(d: Draws) -> Tensor:
    r"""S10: the critic tells encoder pairs from decoder pairs."""
    return objectives.critic_lrt(d.f_q, d.f_p)


@dataclass(frozen=True)
class Method:
    r"""One row of the papers' tables: a critic objective and a player objective, both to be maximised.

    `critics` says what each critic sees: "xz" pairs, "x" data alone, "xx" pairs of data, or "energy" of x.
    Without `codes` there is no encoder. `defaults` are the hyperparameters it was published with,
    `after_critic` runs after each critic step, on its draws. Objectives that are not means over samples are not
    `separable`: their runs cannot share a batch. `data` names the kinds of data it is defined for, and
    `on_points` what differs from `defaults` on points.
    """

    name: str
    summary: str
    critic_equation: str
    player_equation: str
    player: Objective
    critic: Objective | None = lrt
    critics: tuple[str, ...] = ("xz",)
    codes: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    after_critic: Callable[[Draws], None] | None = None
    separable: bool = True
    data: tuple[str, ...] = ("images", "points")
    on_points: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.critic is None:
            object.__setattr__(self, "critics", ())


def mean_squared_slope(scores: Tensor, pair: Sequence[Tensor]) -> Tensor:
    r"""E ‖∇f‖² over all arguments of f, the R1/R2 penalty on whatever was scored: (B,), B each -> scalar.

    Of features (B, m) it is E ‖Jacobian‖²_F, estimated without bias: E_v ‖Jᵀv‖² for v ~ N(0, I).
    Source: Mescheder et al. 2018.
    """
    if scores.dim() > 1:
        scores = scores * torch.randn_like(scores)
    slopes = torch.autograd.grad(scores.sum(), pair, create_graph=True)
    return sum(slope.square().sum() for slope in slopes) / len(scores)
