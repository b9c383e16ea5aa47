r"""The linear-Gaussian world: every density, KL, log-ratio and gradient in closed form.

    data     q(x)       = N(m, S)                prior    p(z)       = N(0, I)
    encoder  q_φ(z|x)   = N(V x + c, diag e^t)   decoder  p_θ(x|z)   = N(W z + b, diag e^s)

θ = (W, b, s), φ = (V, c, t). Both joints are Gaussian over (x, z), so nothing is approximated;
use float64. All expectations are differentiable in every tensor they depend on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from svae_lib.densities import DiagonalGaussian

THETA = ("W", "b", "s")
PHI = ("V", "c", "t")


@dataclass(frozen=True)
class Conditional:
    r"""The Gaussian conditional u ↦ N(gain u + offset, cov); gain (d, k), offset (d,), cov (d, d)."""

    gain: Tensor
    offset: Tensor
    cov: Tensor

    def at(self, u: Tensor) -> MultivariateNormal:
        r"""The density at given u, (..., k) -> a batch of densities over (..., d)."""
        return MultivariateNormal(u @ self.gain.mT + self.offset, self.cov)

    def joint(self, marginal: MultivariateNormal) -> MultivariateNormal:
        r"""p(u) p(v|u) as a Gaussian over (u, v)."""
        cov = marginal.covariance_matrix
        cross = cov @ self.gain.mT
        return MultivariateNormal(
            torch.cat([marginal.mean, self.gain @ marginal.mean + self.offset]),
            torch.cat(
                [
                    torch.cat([cov, cross], 1),
                    torch.cat([cross.mT, self.gain @ cross + self.cov], 1),
                ]
            ),
        )


def marginal(joint: MultivariateNormal, keep: slice) -> MultivariateNormal:
    r"""The density of the kept block of coordinates."""
    return MultivariateNormal(joint.mean[keep], joint.covariance_matrix[keep, keep])


def conditional(joint: MultivariateNormal, of: slice, given: slice) -> Conditional:
    r"""Bayes' rule for Gaussians: the `of` block given the `given` block."""
    cov = joint.covariance_matrix
    gain = torch.linalg.solve(cov[given, given], cov[given, of]).mT
    offset = joint.mean[of] - gain @ joint.mean[given]
    return Conditional(gain, offset, cov[of, of] - gain @ cov[given, of])


def expected_log_prob(under: MultivariateNormal, density: MultivariateNormal) -> Tensor:
    r"""E_under log density = −KL(under ‖ density) − h(under), in nats."""
    return -kl_divergence(under, density) - under.entropy()


def expected_kl(a: Conditional, b: Conditional, u: MultivariateNormal) -> Tensor:
    r"""E_u KL(a(·|u) ‖ b(·|u)): the KL at the mean of u plus the spread of the mean difference."""
    gain = a.gain - b.gain
    spread = torch.trace(torch.linalg.solve(b.cov, gain @ u.covariance_matrix @ gain.mT))
    return kl_divergence(a.at(u.mean), b.at(u.mean)) + 0.5 * spread


@dataclass(frozen=True)
class World:
    r"""One linear-Gaussian world. m (X,), S (X, X), W (X, Z), b (X,), s (X,), V (Z, X), c (Z,), t (Z,)."""

    m: Tensor
    S: Tensor
    W: Tensor
    b: Tensor
    s: Tensor
    V: Tensor
    c: Tensor
    t: Tensor

    @staticmethod
    def random(x_dim: int, z_dim: int, seed: int) -> World:
        r"""A well-conditioned world with random float64 parameters."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        root = normal(x_dim, x_dim) / x_dim**0.5
        return World(
            m=normal(x_dim), S=root @ root.mT + 0.5 * torch.eye(x_dim, dtype=torch.float64),
            W=normal(x_dim, z_dim) / z_dim**0.5, b=normal(x_dim), s=0.5 * normal(x_dim),
            V=normal(z_dim, x_dim) / x_dim**0.5, c=normal(z_dim), t=0.5 * normal(z_dim),
        )  # fmt: skip

    def with_grad(self) -> World:
        r"""A copy whose θ and φ are fresh leaves that require gradients."""
        return replace(self, **{k: getattr(self, k).detach().clone().requires_grad_() for k in THETA + PHI})

    def frozen(self) -> World:
        r"""A copy without gradients: the world in which the critic f* was computed."""
        return World(*(getattr(self, k).detach() for k in self.__dataclass_fields__))

    @property
    def parameters(self) -> dict[str, Tensor]:
        r"""θ and φ by name."""
        return {k: getattr(self, k) for k in THETA + PHI}

    # The four given densities -------------------------------------------------------------

    @property
    def q_x(self) -> MultivariateNormal:
        r"""Data q(x)."""
        return MultivariateNormal(self.m, self.S)

    @property
    def p_z(self) -> MultivariateNormal:
        r"""Prior p(z)."""
        zero = torch.zeros_like(self.c)
        return MultivariateNormal(zero, torch.diag_embed(torch.ones_like(zero)))

    @property
    def q_z_given_x(self) -> Conditional:
        r"""Encoder q_φ(z|x)."""
        return Conditional(self.V, self.c, self.t.exp().diag())

    @property
    def p_x_given_z(self) -> Conditional:
        r"""Decoder p_θ(x|z)."""
        return Conditional(self.W, self.b, self.s.exp().diag())

    # What follows from them ---------------------------------------------------------------

    @property
    def x(self) -> slice:
        r"""The coordinates of x in a joint."""
        return slice(0, len(self.m))

    @property
    def z(self) -> slice:
        r"""The coordinates of z in a joint."""
        return slice(len(self.m), len(self.m) + len(self.c))

    @property
    def q(self) -> MultivariateNormal:
        r"""Encoder joint q_φ(x, z) = q(x) q_φ(z|x)."""
        return self.q_z_given_x.joint(self.q_x)

    @property
    def p(self) -> MultivariateNormal:
        r"""Decoder joint p_θ(x, z) = p(z) p_θ(x|z), coordinates in the order (x, z)."""
        zx = self.p_x_given_z.joint(self.p_z)
        order = torch.arange(len(self.c), len(self.c) + len(self.m)).tolist() + list(range(len(self.c)))
        return MultivariateNormal(zx.mean[order], zx.covariance_matrix[order][:, order])

    @property
    def p_x(self) -> MultivariateNormal:
        r"""Model marginal p_θ(x)."""
        return marginal(self.p, self.x)

    @property
    def q_z(self) -> MultivariateNormal:
        r"""Aggregated code q_φ(z)."""
        return marginal(self.q, self.z)

    @property
    def p_z_given_x(self) -> Conditional:
        r"""Posterior of the model, p_θ(z|x)."""
        return conditional(self.p, self.z, self.x)

    @property
    def q_x_given_z(self) -> Conditional:
        r"""Posterior of the encoder joint, q_φ(x|z)."""
        return conditional(self.q, self.x, self.z)

    # The papers' quantities ---------------------------------------------------------------

    @property
    def C_x(self) -> Tensor:
        r"""S2: C_x = E_q(x) log q(x) = −h(q(x))."""
        return -self.q_x.entropy()

    @property
    def C_z(self) -> Tensor:
        r"""S6: C_z = −h(p(z))."""
        return -self.p_z.entropy()

    def expected_log_decoder(self, under: MultivariateNormal) -> Tensor:
        r"""E_under log p_θ(x|z) over pairs (x, z), from joint minus marginal."""
        return expected_log_prob(under, self.p) - expected_log_prob(marginal(under, self.z), self.p_z)

    def expected_log_encoder(self, under: MultivariateNormal) -> Tensor:
        r"""E_under log q_φ(z|x) over pairs (x, z)."""
        return expected_log_prob(under, self.q) - expected_log_prob(marginal(under, self.x), self.q_x)

    def L_x(self, weight: float = 0.0) -> Tensor:
        r"""S1, S26: E_qφ log [p_θ(x, z) / q_φ(z|x)] + λ E_qφ log p_θ(x|z), λ being `weight`."""
        entropy = self.q_z_given_x.at(self.m).entropy()
        return expected_log_prob(self.q, self.p) + entropy + weight * self.expected_log_decoder(self.q)

    def L_z(self, weight: float = 0.0) -> Tensor:
        r"""S5, S27: E_pθ log [q_φ(x, z) / p_θ(x|z)] + λ E_pθ log q_φ(z|x)."""
        entropy = self.p_x_given_z.at(torch.zeros_like(self.c)).entropy()
        return expected_log_prob(self.p, self.q) + entropy + weight * self.expected_log_encoder(self.p)

    def L_xz(self, weight: float = 0.0) -> Tensor:
        r"""S7, S28: L_x + L_z, each with λ times its reconstruction."""
        return self.L_x(weight) + self.L_z(weight)

    def kl_s(self) -> Tensor:
        r"""KL_s(q_φ ‖ p_θ) = KL(q_φ ‖ p_θ) + KL(p_θ ‖ q_φ) of the joints; L_xz = −KL_s + C_x + C_z (S7)."""
        return kl_divergence(self.q, self.p) + kl_divergence(self.p, self.q)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        r"""S11: f*(x, z) = log p_θ(x, z) − log q_φ(x, z); (B, X), (B, Z) -> (B,)."""
        xz = torch.cat([x, z], -1)
        return self.p.log_prob(xz) - self.q.log_prob(xz)

    def ell(self, critic: World) -> Tensor:
        r"""S14: E_qφ f* − E_pθ f* with f* the log-ratio of another world, usually `self.frozen()`."""
        under_q = expected_log_prob(self.q, critic.p) - expected_log_prob(self.q, critic.q)
        under_p = expected_log_prob(self.p, critic.p) - expected_log_prob(self.p, critic.q)
        return under_q - under_p

    # Paper A: other reference measures ------------------------------------------------------

    def L_VAEx(self) -> Tensor:
        r"""A8: E_q(x) log p_θ(x) − KL(q_φ(x, z) ‖ p_θ(x, z))."""
        return expected_log_prob(self.q_x, self.p_x) - kl_divergence(self.q, self.p)

    def L_VAEz(self) -> Tensor:
        r"""A9: E_p(z) log q_φ(z) − KL(p_θ(x, z) ‖ q_φ(x, z))."""
        return expected_log_prob(self.p_z, self.q_z) - kl_divergence(self.p, self.q)

    def f_1(self, x: Tensor, z: Tensor) -> Tensor:
        r"""A7: f_ψ1* = log q_φ(x, z) − log p_θ(x) p(z); (B, X), (B, Z) -> (B,)."""
        return self.q.log_prob(torch.cat([x, z], -1)) - self.p_x.log_prob(x) - self.p_z.log_prob(z)

    def f_2(self, x: Tensor, z: Tensor) -> Tensor:
        r"""A7, A18: f_ψ2* = log p_θ(x, z) − log q(x) q_φ(z), with q_φ(z) as in A18; A7 prints q_φ(z|x)."""
        return self.p.log_prob(torch.cat([x, z], -1)) - self.q_x.log_prob(x) - self.q_z.log_prob(z)

    def L_VAExz(self, critic: World) -> Tensor:
        r"""A10, A11: E_qφ[log p_θ(x|z) − f_ψ1] + E_pθ[log q_φ(z|x) − f_ψ2], the critics exact for another world,
        usually `self.frozen()`."""
        f_1 = expected_log_prob(self.q, critic.q)
        f_1 = f_1 - expected_log_prob(self.q_x, critic.p_x) - expected_log_prob(self.q_z, critic.p_z)
        f_2 = expected_log_prob(self.p, critic.p)
        f_2 = f_2 - expected_log_prob(self.p_x, critic.q_x) - expected_log_prob(self.p_z, critic.q_z)
        return self.expected_log_decoder(self.q) - f_1 + self.expected_log_encoder(self.p) - f_2

    # Draws, and the same world as networks -----------------------------------------------------

    def encoder_pairs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""(x, z̃) with x ~ q(x), z̃ ~ q_φ(z|x), pathwise from standard normal noise (B, X + Z)."""
        x = self.m + noise[:, self.x] @ torch.linalg.cholesky(self.S).mT
        return x, self.encoder()(x).rsample(noise[:, self.z])

    def decoder_pairs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""(x̃, z) with z ~ p(z), x̃ ~ p_θ(x|z), pathwise from standard normal noise (B, X + Z)."""
        z = noise[:, self.z]
        return self.decoder()(z).rsample(noise[:, self.x]), z

    def encoder(self) -> Linear:
        r"""q_φ(z|x) as a module, for the training code."""
        return Linear(self.V, self.c, self.t)

    def decoder(self) -> Linear:
        r"""p_θ(x|z) as a module."""
        return Linear(self.W, self.b, self.s)


class Linear(nn.Module):
    r"""u ↦ N(gain u + offset, diag e^log_var), sharing the given tensors and their gradients."""

    def __init__(self, gain: Tensor, offset: Tensor, log_var: Tensor) -> None:
        super().__init__()
        self.gain, self.offset, self.log_var = gain, offset, log_var

    def forward(self, u: Tensor) -> DiagonalGaussian:
        mean = u @ self.gain.mT + self.offset
        return DiagonalGaussian(mean, self.log_var.expand_as(mean))


def cubature(dim: int) -> Tensor:
    r"""2·dim equally weighted points ±√dim e_i: their mean integrates every polynomial of degree ≤ 3
    under N(0, I) exactly, so a *batch mean* over them is the expectation of a quadratic log-ratio.

    Source: the third-degree spherical rule (Stroud 1971). Returns (2 dim, dim), float64.
    """
    eye = dim**0.5 * torch.eye(dim, dtype=torch.float64)
    return torch.cat([eye, -eye])


def lattice(spacing: float = 0.1, reach: float = 8.0) -> tuple[Tensor, Tensor]:
    r"""Noise ε on a square lattice and weights w, so that Σ w g(ε) is E g(ε) under N(0, I) in two dimensions.

    The trapezoid rule: for smooth g its error falls exponentially with 1/spacing (Trefethen and Weideman 2014).
    Returns (n, 2) and (n,), float64, to be used as noise in a `World` with one-dimensional x and z.
    """
    ticks = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
    noise = torch.cartesian_prod(ticks, ticks)
    return noise, spacing**2 / (2 * math.pi) * torch.exp(-0.5 * noise.square().sum(1))
