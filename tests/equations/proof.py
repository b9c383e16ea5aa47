r"""The statements that proofs are made of, each recorded for the claims ledger (`svae verify`), and the worlds and
batches that several files of proofs share.

A test called `test_S14_...` belongs to equation S14, `test_S16_S17_...` to both. Comparisons are in
float64 and relative to 1e-8, gradients too; round-off is near 1e-12, so a wrong sign or a missing
term cannot pass, and `refuses` shows that it does not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

from svae_lib.exact import PHI, THETA, Conditional, World, cubature

RTOL = 1e-8
STANDARD_ERRORS = 4
OBSERVED: list[tuple[str, float]] = []  # of the test that is running: kind of statement, observed error


def difference(a: Tensor, b: Tensor) -> float:
    r"""The largest |a − b| relative to 1 + the largest |b|."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / (1 + b.detach().abs().max()))


def same(a: Tensor, b: Tensor) -> None:
    r"""a = b to a relative error of 1e-8."""
    error = difference(a, b)
    OBSERVED.append(("exact", error))
    assert error <= RTOL, f"they differ by {error:.2g}"


def refuses(a: Tensor, *wrong: Tensor) -> None:
    r"""`same` would reject each of these."""
    for b in wrong:
        assert difference(a, b) > RTOL


def standard_errors(samples: Tensor, truth: Tensor | float) -> float:
    r"""|mean of the samples − truth| in standard errors of the mean."""
    return float((samples.mean() - truth).abs() / (samples.std() / len(samples) ** 0.5))


def estimates(samples: Tensor, truth: Tensor | float) -> None:
    r"""The mean of independent samples is `truth` within four standard errors; (B,)."""
    error = standard_errors(samples, truth)
    OBSERVED.append(("Monte Carlo", error))
    assert error <= STANDARD_ERRORS, f"{error:.1f} standard errors away"


def refuses_estimates(samples: Tensor, *wrong: Tensor | float) -> None:
    r"""`estimates` would reject each of these."""
    for value in wrong:
        assert standard_errors(samples, value) > STANDARD_ERRORS


def about(value: Tensor | float, truth: Tensor | float, tolerance: float) -> None:
    r"""A trained or numerically integrated value is `truth` up to a stated absolute tolerance."""
    error = float((torch.as_tensor(value) - torch.as_tensor(truth)).detach().abs().max())
    OBSERVED.append(("empirical", error))
    assert error <= tolerance, f"{error:.2g} away, allowed is {tolerance:.2g}"


def proved(expression: sympy.Expr) -> None:
    r"""The symbolic expression is identically zero."""
    assert sympy.simplify(expression) == 0, expression
    OBSERVED.append(("proved", 0.0))


def disproved(expression: sympy.Expr) -> None:
    r"""The symbolic expression is not identically zero."""
    assert sympy.simplify(expression) != 0, expression


# Numbers and random worlds -------------------------------------------------------------------------

number = partial(torch.tensor, dtype=torch.float64)  # of Python numbers, which torch would round to float32


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIMS, SEEDS = st.integers(1, 8), st.integers(0, 2**31 - 1)
WORLDS = st.builds(World.random, x_dim=DIMS, z_dim=DIMS, seed=SEEDS)
ONE_CODE = st.builds(World.random, x_dim=DIMS, z_dim=st.just(1), seed=SEEDS)
PROOF = settings(derandomize=True, deadline=None, max_examples=30)


def worlds(test=None, **others):
    r"""Run a proof at 30 random worlds `w`, the same ones every time; `others` are further strategies."""
    if test is None:
        return partial(worlds, **others)
    return PROOF(given(**{"w": WORLDS} | others)(test))


def gradient(value: Tensor, w: World, names: tuple[str, ...] = THETA + PHI) -> Tensor:
    r"""The gradient of a scalar in parameters of the world, as one vector."""
    parameters = [w.parameters[k] for k in names]
    grads = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


# Worlds whose joints agree ---------------------------------------------------------------------------


def best_encoder(w: World) -> World:
    r"""The encoder becomes the model's posterior, where this is diagonal: the family then contains it."""
    posterior = w.p_z_given_x
    return replace(w, V=posterior.gain, c=posterior.offset, t=posterior.cov.diagonal().log())


def agreed(w: World) -> World:
    r"""Data drawn from the model, and the posterior as encoder: p_θ(x, z) = q_φ(x, z). For a 1-D code, say."""
    return best_encoder(replace(w, m=w.p_x.mean, S=w.p_x.covariance_matrix))


def matched(x_dim: int, z_dim: int, seed: int) -> World:
    r"""A world of any dimensions whose joints agree: orthogonal loadings make the posterior diagonal."""
    w = World.random(x_dim, z_dim, seed)
    n = min(x_dim, z_dim)
    orthogonal = torch.linalg.eigh(w.S).eigenvectors[:, :n] * torch.linspace(0.6, 1.4, n, dtype=torch.float64)
    loadings = torch.cat([orthogonal, w.W.new_zeros(x_dim, z_dim - n)], 1)
    return agreed(replace(w, W=(w.s / 2).exp()[:, None] * loadings))


def correlated(rho: float) -> World:
    r"""Equal joints with standard normal marginals and correlation ρ."""
    zero, one, gain, log_var = number([0.0]), number([[1.0]]), number([[rho]]), number([1 - rho**2]).log()
    return World(zero, one, gain, zero, log_var, gain, zero, log_var)


# Densities at points and batches ----------------------------------------------------------------------


def as_conditional(g: MultivariateNormal, k: int) -> Conditional:
    r"""A density that ignores its k-dimensional condition."""
    return Conditional(g.mean.new_zeros(len(g.mean), k), g.mean, g.covariance_matrix)


def points(w: World) -> tuple[Tensor, Tensor]:
    r"""Five points (x, z), anywhere."""
    xz = 2 * normal(5, len(w.m) + len(w.c), seed=0)
    return xz[:, w.x], xz[:, w.z]


def four(w: World, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""log q(x), log q_φ(z|x), log p(z), log p_θ(x|z)."""
    return w.q_x.log_prob(x), w.encoder()(x).log_prob(z), w.p_z.log_prob(z), w.decoder()(z).log_prob(x)


def batches(w: World) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    r"""Encoder pairs and decoder pairs, differentiable, over which a mean of a quadratic is its expectation."""
    noise = cubature(len(w.m) + len(w.c))
    return w.encoder_pairs(noise), w.decoder_pairs(noise)


def scores(w: World, critic: World) -> tuple[Tensor, Tensor]:
    r"""f_q and f_p of the batches of world w under the log-ratio of another world."""
    encoder_pairs, decoder_pairs = batches(w)
    return critic.log_ratio(*encoder_pairs), critic.log_ratio(*decoder_pairs)


def logs(w: World, drawn: World) -> tuple[Tensor, Tensor]:
    r"""log p_θ(x|z) on encoder pairs and log q_φ(z|x) on decoder pairs, drawn from world `drawn`."""
    (x_q, z_q), (x_p, z_p) = batches(drawn)
    return w.decoder()(z_q).log_prob(x_q), w.encoder()(x_p).log_prob(z_p)
