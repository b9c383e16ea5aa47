"""Each method's gradient, through the code that trains it, against the exact linear-Gaussian world."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

from svae_lib import methods
from svae_lib.exact import PHI, THETA, World, cubature
from svae_lib.methods import METHODS, Draws, Model


class ExactCritic(nn.Module):
    """f* of a frozen world: what a perfect critic step would return."""

    def __init__(self, world):
        super().__init__()
        self.world = world.frozen()

    def forward(self, x, z):
        return self.world.log_ratio(x, z)


def exact_draws(world, weight=0.0):
    """Draws whose batch means are exact expectations of the quadratic log-ratios (degree 2)."""
    x_dim, z_dim = len(world.m), len(world.c)
    eps = cubature(x_dim + z_dim)
    x = world.m + eps[:, :x_dim] @ torch.linalg.cholesky(world.S).mT
    model = Model(world.encoder(), world.decoder(), ExactCritic(world), z_dim)
    return Draws(model, x, eps[:, x_dim:], weight, noise_q=eps[:, x_dim:], noise_p=eps[:, :x_dim])


def gradient(value, world, names=THETA + PHI):
    grads = torch.autograd.grad(value, [getattr(world, n) for n in names], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(getattr(world, n)) if g is None else g for n, g in zip(names, grads, strict=True)]


dims = pytest.mark.parametrize("x_dim, z_dim", [(1, 1), (3, 2), (2, 5), (8, 8)])


@dims
def test_S1_vae_gradient(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=1).with_grad()
    value = METHODS["vae"].player(exact_draws(world))
    assert_close(value, world.L_x(), rtol=1e-10, atol=1e-10)
    assert_close(gradient(value, world), gradient(world.L_x(), world), rtol=1e-8, atol=1e-8)


@dims
def test_S14_svae_follows_one_direction_of_kl_per_player(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=2).with_grad()
    value = METHODS["svae"].player(exact_draws(world))
    assert_close(value, -world.kl_s(), rtol=1e-10, atol=1e-10)
    reverse, forward = -kl_divergence(world.p, world.q), -kl_divergence(world.q, world.p)
    assert_close(gradient(value, world, THETA), gradient(reverse, world, THETA), rtol=1e-8, atol=1e-8)
    assert_close(gradient(value, world, PHI), gradient(forward, world, PHI), rtol=1e-8, atol=1e-8)
    whole = gradient(-world.kl_s(), world)
    assert not all(torch.allclose(a, b) for a, b in zip(gradient(value, world), whole, strict=True))


@dims
@pytest.mark.parametrize("method", ["svae-exact", "svae-elbo"])
def test_open_point_13_exact_gradient_is_that_of_the_symmetric_kl(x_dim, z_dim, method):
    world = World.random(x_dim, z_dim, seed=3).with_grad()
    value = METHODS[method].player(exact_draws(world))
    assert_close(gradient(value, world), gradient(-world.kl_s(), world), rtol=1e-8, atol=1e-8)


@dims
def test_S29_gradient_is_S14_plus_lambda_times_both_reconstructions(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=4).with_grad()
    value = METHODS["svae-r"].player(exact_draws(world, weight=0.3))
    log_p = world.L_x() + kl_to_prior(world)
    log_q = -expected_cross_entropy_of_codes(world)
    expected = world.ell(world.frozen()) + 0.3 * (log_p + log_q)
    assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert_close(gradient(value, world), gradient(expected, world), rtol=1e-8, atol=1e-8)
    # S29 at λ = 1 is not the exact gradient: its draws are attached
    lone = gradient(METHODS["svae-exact"].player(exact_draws(world)), world)
    printed = gradient(METHODS["svae-r"].player(exact_draws(world, weight=1.0)), world)
    assert not all(torch.allclose(a, b) for a, b in zip(lone, printed, strict=True))


def kl_to_prior(world):
    """E_q(x) KL(q_φ(z|x) ‖ p(z)) in closed form."""
    second_moment = world.q_z.covariance_matrix.diag() + world.q_z.mean.square()
    return 0.5 * (second_moment - 1 - world.t).sum()


def expected_cross_entropy_of_codes(world):
    """−E_pθ(x,z) log q_φ(z|x): the mean and variance of z − Vx − c are those of a linear map of (x, z)."""
    residual = torch.cat([-world.V, torch.eye(len(world.c), dtype=torch.float64)], 1)
    mean = residual @ world.p.mean - world.c
    variance = (residual @ world.p.covariance_matrix @ residual.mT).diag()
    return 0.5 * ((mean.square() + variance) / world.t.exp() + world.t + math.log(2 * math.pi)).sum()


def test_a_method_is_one_registration():
    toy = methods.Method("toy", "maximise f on decoder pairs", "S10", "–", lambda d: d.f_p.mean())
    try:
        assert methods.register(toy) is METHODS["toy"]
    finally:
        del METHODS["toy"]
