r"""A method is a critic objective and a player objective over the same draws; one entry a row of the tables.

The players are the decoder (θ) and the encoder (φ). Both objectives are maximised in turn,
on the draws of one batch; `svae_lib.train.update` is the loop, `METHODS` the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from svae_lib import objectives
from svae_lib.densities import DiagonalGaussian


@dataclass
class Model:
    r"""Decoder p_θ(x|z), encoder q_φ(z|x) and critic f_ψ(x, z)."""

    encoder: nn.Module
    decoder: nn.Module
    critic: nn.Module | None
    z_dim: int

    @property
    def players(self) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})


@dataclass
class Draws:
    r"""A batch from each joint: (x, z_q) ~ q_φ(x, z) and (x_p, z_p) ~ p_θ(x, z), pathwise differentiable.

    `x` (B, ...) comes from the data and `z_p` (B, z_dim) from the prior. Everything else is computed
    when first asked for, so a method pays only for what its equation mentions. `noise_q`, `noise_p`
    replace the random ε of the two conditionals (used to integrate exactly).
    """

    model: Model
    x: Tensor
    z_p: Tensor
    weight: float = 0.0  # λ of S29
    noise_q: Tensor | None = field(default=None, repr=False)
    noise_p: Tensor | None = field(default=None, repr=False)

    @cached_property
    def q_z_given_x(self) -> DiagonalGaussian:
        return self.model.encoder(self.x)

    @cached_property
    def z_q(self) -> Tensor:
        return self.q_z_given_x.rsample(self.noise_q)

    @cached_property
    def x_p(self) -> Tensor:
        return self.model.decoder(self.z_p).rsample(self.noise_p)

    @cached_property
    def f_q(self) -> Tensor:
        return self.model.critic(self.x, self.z_q)

    @cached_property
    def f_p(self) -> Tensor:
        return self.model.critic(self.x_p, self.z_p)

    @cached_property
    def log_p_x_given_z(self) -> Tensor:
        r"""log p_θ(x|z) on encoder pairs; its gradient also reaches φ through z_q."""
        return self.model.decoder(self.z_q).log_prob(self.x)

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


@dataclass(frozen=True)
class Method:
    r"""One row of the papers' tables. `critic` maps (f_q, f_p), `player` maps Draws, to a maximised scalar."""

    name: str
    summary: str
    critic_equation: str
    player_equation: str
    player: Callable[[Draws], Tensor]
    critic: Callable[[Tensor, Tensor], Tensor] | None = objectives.critic_lrt


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    r"""Add a method to the registry under its name."""
    METHODS[method.name] = method
    return method


def vae(d: Draws) -> Tensor:
    r"""S1, with the KL to the prior in closed form."""
    return objectives.elbo(d.log_p_x_given_z, d.q_z_given_x.kl_to_standard())


def svae(d: Draws) -> Tensor:
    r"""S14: both players meet only in the critic."""
    return objectives.symmetric(d.f_q, d.f_p)


def svae_r(d: Draws) -> Tensor:
    r"""S29: S14 plus λ times both reconstructions, as printed (draws attached)."""
    return objectives.symmetric_with_reconstruction(
        d.f_q, d.f_p, d.log_p_x_given_z, d.log_q_z_given_x, d.weight
    )


def wake_sleep(d: Draws) -> Tensor:
    r"""The halves that S14 misses: the decoder learns from encoder pairs, the encoder from decoder pairs."""
    return objectives.wake_sleep(d.log_p_x_given_z_detached, d.log_q_z_given_x_detached)


def svae_exact(d: Draws) -> Tensor:
    r"""The exact gradient of −KL_s: S29 with λ = 1 and the draws detached in both reconstructions."""
    return svae(d) + wake_sleep(d)


def svae_elbo(d: Draws) -> Tensor:
    r"""The exact gradient of −KL_s with its L_x half in closed form (S1): the critic is left with L_z (S13)."""
    return vae(d) + objectives.l_z(d.f_p, d.log_q_z_given_x_detached)


for row in (
    Method("vae", "variational autoencoder: maximise the evidence lower bound", "–", "S1", vae, critic=None),
    Method("svae", "symmetric VAE: raise the critic on encoder pairs, lower it on decoder pairs", "S10", "S14", svae),
    Method("svae-r", "symmetric VAE with λ times the reconstruction of x and of z", "S10", "S29", svae_r),
    Method("wake-sleep", "decoder and encoder each fit the pairs of the other", "–", "halves", wake_sleep, critic=None),
    Method("svae-exact", "exact gradient of −KL_s: S14 plus its two missing halves", "S10", "S14 + halves", svae_exact),
    Method("svae-elbo", "the same gradient, L_x in closed form, a critic for L_z", "S10", "S1 + S13", svae_elbo),
):
    register(row)


def scores_and_slope(critic: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scores f(x, z) and the mean squared slope E ‖∇_(x,z) f‖², the R1/R2 penalty on whatever is passed.

    x (B, ...), z (B, z_dim) -> (B,), scalar. Source: Mescheder et al. 2018.
    """
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    scores = critic(x, z)
    slopes = torch.autograd.grad(scores.sum(), (x, z), create_graph=True)
    return scores, sum(g.square().sum() for g in slopes) / len(x)
