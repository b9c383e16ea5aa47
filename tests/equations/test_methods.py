r"""Each method's gradient, through the code that trains it, against the exact linear-Gaussian world.

Quadratic objectives are integrated exactly by a cubature, those with log σ(f) in the plane by the trapezoid rule:
`Weighted` turns the batch means of the code under test into that integral. Divergences to compare with come from
a table of the two densities, in which nothing is drawn. Shuffled codes are averaged over blocks of one large batch.
"""

import math

import pytest
import torch
from proof import STANDARD_ERRORS, about, estimates, gradient, refuses, same, standard_errors
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import logsigmoid
from torch.overrides import TorchFunctionMode

from svae_lib import methods
from svae_lib.densities import standard_normal_log_prob
from svae_lib.draws import Draws, Model
from svae_lib.exact import PHI, THETA, World, cubature, expected_log_prob, lattice
from svae_lib.generators import halfway, jensen_shannon
from svae_lib.grid import kl
from svae_lib.methods import METHODS


class ExactCritic(nn.Module):
    """f*, or f_1*, f_2* of paper A, of a frozen world: what a perfect critic step would return.

    `psi` are the coefficients of a quadratic polynomial that is added to it: zero, but there to be climbed. Each
    block of the batch has its own."""

    def __init__(self, world, name="log_ratio", blocks=1):
        super().__init__()
        self.exact = name(world.frozen()) if callable(name) else getattr(world.frozen(), name)
        self.psi = nn.Parameter(torch.zeros(blocks, 6, dtype=torch.float64))

    def forward(self, x, z):
        u, v = x[:, 0], z[:, 0]
        powers = torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], 1)
        return self.exact(x, z) + (powers * self.psi.repeat_interleave(len(x) // len(self.psi), 0)).sum(1)


def exact_draws(world, weight=0.0, names=("log_ratio",), eps=None, blocks=1):
    """Draws whose batch means are exact expectations of the quadratic log-ratios (degree 2).

    Noise beyond that of (x, z) is the noise of the reconstruction x̂."""
    x_dim, z_dim = len(world.m), len(world.c)
    eps = cubature(x_dim + z_dim) if eps is None else eps
    of_x, of_z, of_x_q = eps[:, :x_dim], eps[:, x_dim : x_dim + z_dim], eps[:, x_dim + z_dim :]
    x, _ = world.encoder_pairs(eps)
    critics = [ExactCritic(world, name, blocks) for name in names]
    model = Model(world.encoder(), world.decoder(), critics, z_dim)
    draws = Draws(model, x, of_z, weight, noise_q=of_z, noise_p=of_x)
    if of_x_q.shape[1]:
        draws.x_q = draws.p_x_given_z_q.rsample(of_x_q)
    return draws


class Weighted(TorchFunctionMode):
    """While this is active, the mean over a batch is Σ w."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.mean and args[0].shape == self.weights.shape:
            return (self.weights * args[0]).sum()
        return func(*args, **(kwargs or {}))


planes = pytest.mark.parametrize("seed", range(3))


def plane(seed):
    """A world with one-dimensional x and z, and the lattice of its noise, fine enough for the steepest f*."""
    return World.random(1, 1, seed).with_grad(), *lattice(0.05)


def tables(w):
    """log p_θ(x, z) and log q_φ(x, z) times the cell, on a grid that holds both joints."""
    ticks = []
    for i in range(2):
        joints = [(joint.mean[i].item(), joint.covariance_matrix[i, i].sqrt().item()) for joint in (w.p, w.q)]
        low, high = min(m - 9 * s for m, s in joints), max(m + 9 * s for m, s in joints)
        ticks.append(torch.linspace(low, high, 500, dtype=torch.float64))
    cell = math.log((ticks[0][1] - ticks[0][0]) * (ticks[1][1] - ticks[1][0]))
    points = torch.cartesian_prod(*ticks)
    return w.p.log_prob(points) + cell, w.q.log_prob(points) + cell


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


# Paper A: two critics --------------------------------------------------------------------------------

CRITICS_A = ("f_1", "f_2")


def halves(w, critic):
    """A10 in closed form: E_qφ[log p_θ(x|z) − f_1*] and E_pθ[log q_φ(z|x) − f_2*], the critics those of a world."""
    E = expected_log_prob
    f_1 = E(w.q, critic.q) - E(w.q_x, critic.p_x) - E(w.q_z, critic.p_z)
    f_2 = E(w.p, critic.p) - E(w.p_x, critic.q_x) - E(w.p_z, critic.q_z)
    return w.expected_log_decoder(w.q) - f_1, w.expected_log_encoder(w.p) - f_2


@dims
def test_A10_A11_as_vae_rows_with_exact_critics(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=5).with_grad()
    of_row = {"as-vae-r": CRITICS_A[:1], "as-vae-g": CRITICS_A[1:], "as-vae": CRITICS_A}
    reconstruct, generate = halves(world, world.frozen())
    values = [METHODS[name].player(exact_draws(world, names=critics)) for name, critics in of_row.items()]
    gradients = [gradient(value, world) for value in values]
    frozen = (reconstruct, generate, world.L_VAExz(world.frozen()))
    bounds = (world.L_VAEx(), world.L_VAEz(), world.L_VAEx() + world.L_VAEz())
    follows = (world.L_x(), world.L_z(), -world.kl_s())  # in spite of the frozen critics
    for i in range(3):
        same(values[i], bounds[i])
        same(gradients[i], gradient(frozen[i], world))
        same(gradients[i], gradient(follows[i], world))
        refuses(gradients[i], gradients[i - 1], gradient(bounds[i], world))
    swapped = METHODS["as-vae"].player(exact_draws(world, names=CRITICS_A[::-1]))
    refuses(gradient(swapped, world), gradients[2])


def climb(method, draws):
    """The gradient of the critic objective in ψ of all critics."""
    value = METHODS[method].critic(draws)
    psi = [critic.psi for critic in draws.model.critics]
    return torch.cat([len(psi[0]) * slope for slope in torch.autograd.grad(value, psi)], -1)


def test_A5_A6_as_vae_critic_objective_is_stationary_at_the_exact_critics():
    world = World.random(1, 1, seed=6)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = climb("as-vae", exact_draws(world, names=CRITICS_A, eps=noise, blocks=50))
    for slope in slopes.T:
        estimates(slope, 0.0)
    swapped = climb("as-vae", exact_draws(world, names=CRITICS_A[::-1], eps=noise, blocks=50))
    for of_one in swapped.T.split(6):
        assert max(standard_errors(slope, 0.0) for slope in of_one) > STANDARD_ERRORS


# log σ(f): S18, S19 and cycles -----------------------------------------------------------------------


@planes
def test_S10_critic_objective_is_stationary_at_the_exact_critic(seed):
    rows = {row.name for row in methods.ROWS if row.critic is methods.lrt}
    assert rows == {"svae", "svae-r", "svae-exact", "svae-elbo", "ali", "ali-saturating", "alice", "alice-l1"}
    world, noise, weights = plane(seed)
    draws = exact_draws(world, eps=noise)
    with Weighted(weights):
        value = METHODS["svae"].critic(draws)
        log_p, log_q = tables(world)
        same(value, 2 * jensen_shannon(log_p, log_q) - 2 * math.log(2))
        slope = climb("svae", draws)
        same(slope, torch.zeros_like(slope))
        draws.model.critics[0].psi.data[0, 0] = 0.01
        refuses(climb("svae", draws), slope)


@planes
def test_S18_ali_saturating_follows_jensen_and_shannon(seed):
    world, noise, weights = plane(seed)
    with Weighted(weights):
        value = METHODS["ali-saturating"].player(exact_draws(world, eps=noise))
    twice = 2 * jensen_shannon(*tables(world))
    same(value, 2 * math.log(2) - twice)
    same(gradient(value, world), gradient(-twice, world))
    refuses(gradient(value, world), gradient(-world.kl_s(), world), gradient(twice, world))


@planes
def test_S19_ali_follows_one_divergence_from_the_mixture_per_player(seed):
    world, noise, weights = plane(seed)
    with Weighted(weights):
        value = METHODS["ali"].player(exact_draws(world, eps=noise))
    log_p, log_q = tables(world)
    of_theta, of_phi = 2 * kl(halfway(log_p, log_q), log_q), 2 * kl(halfway(log_p, log_q), log_p)
    same(gradient(value, world, THETA), gradient(-of_theta, world, THETA))
    same(gradient(value, world, PHI), gradient(-of_phi, world, PHI))
    refuses(gradient(value, world, THETA), gradient(-of_phi, world, THETA))
    refuses(gradient(value, world, PHI), gradient(-of_theta, world, PHI))


def cycle(w):
    """Mean and covariance of x̂ − x, which is Gaussian."""
    gain = w.W @ w.V - torch.eye(len(w.m), dtype=torch.float64)
    noise = (w.W * w.t.exp()) @ w.W.mT + w.s.exp().diag()
    return gain @ w.m + w.W @ w.c + w.b, gain @ w.S @ gain.mT + noise


def beyond_ali(method, draws):
    """What a row adds to ALI; the scores of both are of the same pairs."""
    return METHODS[method].player(draws) - METHODS["ali"].player(draws)


@dims
def test_alice_adds_the_squared_cycle(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=7).with_grad()
    added = beyond_ali("alice", exact_draws(world, 0.7, eps=cubature(2 * x_dim + z_dim)))
    mean, cov = cycle(world)
    expected = -0.7 * (mean.square().sum() + cov.trace())
    same(added, expected)
    same(gradient(added, world), gradient(expected, world))
    refuses(added, -expected, expected / x_dim if x_dim > 1 else expected / 2)
    refuses(gradient(added, world), gradient(-0.7 * mean.square().sum(), world))


def cube():
    """Noise of x, z̃ and x̂ on a lattice, and its weights."""
    ticks = torch.arange(-7, 7.1, 0.5, dtype=torch.float64)
    noise = torch.cartesian_prod(ticks, ticks, ticks)
    return noise, (0.5 / math.sqrt(2 * math.pi)) ** 3 * torch.exp(-0.5 * noise.square().sum(1))


def test_alice_l1_adds_the_absolute_cycle():
    """|x − x̂| has a kink, on which the trapezoid rule is good to a few digits only."""
    world, (noise, weights) = World.random(1, 1, seed=8).with_grad(), cube()
    with Weighted(weights):
        added = beyond_ali("alice-l1", exact_draws(world, 0.7, eps=noise))
    mean, cov = cycle(world)
    std = cov.diagonal().sqrt()
    t = mean / (math.sqrt(2) * std)
    folded = (mean * t.erf() + math.sqrt(2 / math.pi) * std * torch.exp(-t.square())).sum()
    about(added, -0.7 * folded, 1e-2)
    about(gradient(added, world), gradient(-0.7 * folded, world), 1e-2)
    for wrong in (0.7 * folded, -folded, -0.7 * (mean.square() + cov[0]).sum(), -0.7 * mean.abs().sum()):
        assert (gradient(added, world) - gradient(wrong, world)).abs().max() > 0.1


class Cycle(nn.Module):
    """f_2(x, x̂) = ψ (x − x̂)²: a second critic of ALICE. Its optimum is not finite, for pairs (x, x) have no density."""

    def __init__(self, psi):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([[psi]], dtype=torch.float64))

    def forward(self, x, x_q):
        return self.psi[0] * (x - x_q).square().sum(1)


def test_alice_a_adds_the_cycle_that_its_critic_sees():
    world, (noise, weights) = World.random(1, 1, seed=9).with_grad(), cube()
    draws = exact_draws(world, 0.7, eps=noise)
    draws.model.critics = [*draws.model.critics, Cycle(0.05)]
    with Weighted(weights):
        added = beyond_ali("alice-a", draws)
    mean, cov = cycle(world)
    ticks = torch.arange(-8, 8.1, 0.1, dtype=torch.float64)
    d = mean + cov[0].sqrt() * ticks
    density = 0.1 * torch.exp(-0.5 * ticks.square()) / math.sqrt(2 * math.pi)
    expected = 0.7 * ((density * logsigmoid(-0.05 * d.square())).sum() + math.log(0.5))
    same(added, expected)
    same(gradient(added, world), gradient(expected, world))
    saturating = -0.7 * (density * logsigmoid(0.05 * d.square())).sum()
    refuses(gradient(added, world), gradient(-expected, world), gradient(saturating, world))


def test_alice_a_critics_climb_their_own_likelihood_ratios():
    world, noise, weights = plane(9)
    draws = exact_draws(world, eps=noise)
    draws.model.critics = [*draws.model.critics, Cycle(0.0)]
    with Weighted(weights):
        first, _ = climb("alice-a", draws).split([6, 1], -1)
        same(first, torch.zeros_like(first))
        draws.model.critics[0].psi.data[0, 0] = 0.01
        refuses(climb("alice-a", draws)[:, :6], first)
    draws = exact_draws(world, eps=cubature(3))
    draws.model.critics = [*draws.model.critics, Cycle(0.0)]
    _, second = climb("alice-a", draws).split([6, 1], -1)
    mean, cov = cycle(world)
    same(second[0], 0.5 * (mean.square() + cov[0]))  # σ(0) E(x − x̂)²: f_2 rises on reconstructions
    refuses(second[0], -second[0], mean.square() + cov[0])


# The registry ----------------------------------------------------------------------------------------


# Adversarial variational Bayes -----------------------------------------------------------------------


def log_reference(world):
    """f* = log p(z) − log q_φ(z|x), the critic's optimum where the reference is the prior."""
    return lambda x, z: standard_normal_log_prob(z) - world.encoder()(x).log_prob(z)


def nothing(world):
    """f* where the reference is the Gaussian encoder itself: there is nothing left to tell apart."""
    return lambda x, z: torch.zeros_like(x[:, 0])


@dims
def test_S1_avb_rows_with_exact_critics_follow_the_bound(x_dim, z_dim):
    world = World.random(x_dim, z_dim, seed=7).with_grad()
    for name, critic in (("avb", log_reference), ("avb-ac", nothing)):
        value = METHODS[name].player(exact_draws(world, names=[critic]))
        same(value, world.L_x())
        same(gradient(value, world), gradient(world.L_x(), world))
        other = METHODS["avb"].player(exact_draws(world, names=[nothing]))  # without the KL
        refuses(gradient(other, world), gradient(world.L_x(), world))


@planes
def test_avb_critics_are_stationary_at_their_optimum(seed):
    world, noise, weights = plane(seed)
    for name, right, wrong in (("avb", log_reference, nothing), ("avb-ac", nothing, log_reference)):
        with Weighted(weights):
            slope = climb(name, exact_draws(world, names=[right], eps=noise))
            other = climb(name, exact_draws(world, names=[wrong], eps=noise))
        same(slope, torch.zeros_like(slope))
        refuses(other, slope)
