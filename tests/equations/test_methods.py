"""Each method's gradient, through the code that trains it, against the exact linear-Gaussian world."""

import math

import pytest
import torch
from proof import gradient, refuses, same
from torch import nn
from torch.distributions import kl_divergence

from svae_lib import methods
from svae_lib.draws import Draws, Method, Model
from svae_lib.exact import PHI, THETA, World, cubature
from svae_lib.methods import METHODS


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
    x, _ = world.encoder_pairs(eps)
    model = Model(world.encoder(), world.decoder(), [ExactCritic(world)], z_dim)
    return Draws(model, x, eps[:, x_dim:], weight, noise_q=eps[:, x_dim:], noise_p=eps[:, :x_dim])


dims = pytest.mark.parametrize("x_dim, z_dim", [(1, 1), (3, 2), (2, 5), (8, 8)])


@dims
def test_S1_vae_gradient(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=1).with_grad()
    value = METHODS["vae"].player(exact_draws(world))
    same(value, world.L_x())
    same(gradient(value, world), gradient(world.L_x(), world))


@dims
def test_S14_svae_follows_one_direction_of_kl_per_player(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=2).with_grad()
    value = METHODS["svae"].player(exact_draws(world))
    same(value, -world.kl_s())
    reverse, forward = -kl_divergence(world.p, world.q), -kl_divergence(world.q, world.p)
    same(gradient(value, world, THETA), gradient(reverse, world, THETA))
    same(gradient(value, world, PHI), gradient(forward, world, PHI))
    refuses(gradient(value, world), gradient(-world.kl_s(), world))


@dims
def test_S15_wake_sleep_follows_the_other_direction_per_player(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=2).with_grad()
    value = METHODS["wake-sleep"].player(exact_draws(world))
    reverse, forward = -kl_divergence(world.p, world.q), -kl_divergence(world.q, world.p)
    same(gradient(value, world, THETA), gradient(forward, world, THETA))
    same(gradient(value, world, PHI), gradient(reverse, world, PHI))
    other = gradient(METHODS["svae"].player(exact_draws(world)), world)
    same(gradient(value, world) + other, gradient(-world.kl_s(), world))
    refuses(gradient(value, world), other)


@dims
@pytest.mark.parametrize("method", ["svae-exact", "svae-elbo"])
def test_S15_exact_gradient_methods_follow_the_symmetric_kl(x_dim, z_dim, method):
    world = World.random(x_dim, z_dim, seed=3).with_grad()
    value = METHODS[method].player(exact_draws(world))
    same(gradient(value, world), gradient(-world.kl_s(), world))


@dims
def test_S29_gradient_is_S14_plus_lambda_times_both_reconstructions(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=4).with_grad()
    value = METHODS["svae-r"].player(exact_draws(world, weight=0.3))
    log_p = world.L_x() + kl_to_prior(world)
    log_q = -expected_cross_entropy_of_codes(world)
    expected = world.ell(world.frozen()) + 0.3 * (log_p + log_q)
    same(value, expected)
    same(gradient(value, world), gradient(expected, world))
    # S29 at λ = 1 is not the exact gradient: its draws are attached
    lone = METHODS["svae-exact"].player(exact_draws(world))
    printed = METHODS["svae-r"].player(exact_draws(world, weight=1.0))
    refuses(gradient(lone, world), gradient(printed, world))


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
    toy = Method("toy", "maximise f on decoder pairs", "S10", "–", lambda d: d.f_p.mean())
    try:
        methods.register(toy)
        assert METHODS["toy"] is toy
    finally:
        del METHODS["toy"]
