"""Methods without an encoder: the objectives are the stated ones, every row learns, stabilisers do what they say."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from svae_lib import data, experiment, gans
from svae_lib.draws import Draws, Model
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS
from svae_lib.nets import Energy, MixtureGenerator, PointHead

CPU = torch.device("cpu")
NAMES = [row.name for row in gans.ROWS]
ON_POINTS = [row.name for row in gans.ROWS if "points" in row.data]

# Objectives: value and gradient of what is stated, written out afresh ----------------------------------------

RHO, MULTIPLIER = 0.6, 0.7


def softplus(f):
    return (1 + f.exp()).log()


def gan_value(f_q, f_p):
    return (-softplus(f_q)).mean() + (-softplus(-f_p)).mean()


def mmd_value(phi_q, phi_p):
    """Pair by pair; the biased estimate, with pairs of a draw and itself, is larger."""

    def kernel(a, b):
        return sum(math.e ** (-((a - b).square().sum()) / (2 * w * w)) for w in (1, 2, 4, 8, 16))

    n = len(phi_q)
    apart = [(i, j) for i in range(n) for j in range(n) if i != j]
    among = sum(kernel(phi[i], phi[j]) for phi in (phi_q, phi_p) for i, j in apart) / len(apart)
    return among - 2 * sum(kernel(a, b) for a in phi_q for b in phi_p) / n**2


def fisher_value(f_q, f_p):
    omega = (f_q.square().mean() + f_p.square().mean()) / 2
    return f_p.mean() - f_q.mean() + MULTIPLIER * (1 - omega) - RHO / 2 * (omega - 1) ** 2


def covariance_value(phi_q, phi_p):
    """The gap is symmetric, so its singular values are the sizes of its eigenvalues."""
    gap = sum(torch.outer(a, a) for a in phi_p) / len(phi_p) - sum(torch.outer(a, a) for a in phi_q) / len(phi_q)
    return torch.linalg.eigvalsh(gap).abs().sum()


def up(f_q, f_p):
    return f_p.mean() - f_q.mean()


def mean_value(phi_q, phi_p):
    return (phi_p.mean(0) - phi_q.mean(0)).square().sum().sqrt()


def minus(value):
    return lambda f_q, f_p: -value(f_q, f_p)


# (critic objective, player objective); the wrong ones stand in WRONG
STATED = {
    "gan": (gan_value, lambda f_q, f_p: -(softplus(-f_q) + softplus(f_p)).mean()),
    "gan-saturating": (gan_value, minus(gan_value)),
    "gan-symmetric": (gan_value, minus(up)),
    "dcgan": (gan_value, lambda f_q, f_p: -(softplus(-f_q) + softplus(f_p)).mean()),
    "wgan": (up, minus(up)),
    "mmd-gan": (mmd_value, minus(mmd_value)),
    "fisher-gan": (fisher_value, minus(up)),
    "mcgan-mean": (mean_value, minus(mean_value)),
    "mcgan-cov": (covariance_value, minus(covariance_value)),
    "eb-gan": (
        lambda f_q, f_p: -f_q.mean() - torch.where(f_p < RHO, RHO - f_p, 0.0).mean(),
        lambda f_q, f_p: -f_p.mean(),
    ),
}
WRONG = {
    "gan": (minus(gan_value), minus(gan_value)),
    "gan-saturating": (up, gan_value),
    "gan-symmetric": (up, minus(gan_value)),
    "dcgan": (minus(gan_value), minus(gan_value)),
    "wgan": (minus(up), up),
    "mmd-gan": (mean_value, mmd_value),
    "fisher-gan": (lambda f_q, f_p: fisher_value(f_q, f_p) + RHO * (f_q.square().mean() - 1), minus(fisher_value)),
    "mcgan-mean": (up, mean_value),
    "mcgan-cov": (mean_value, minus(mean_value)),
    "eb-gan": (lambda f_q, f_p: -f_q.mean() - RHO + f_p.mean(), lambda f_q, f_p: f_p.mean()),
}


def world(name, samples=6):
    """Small smooth nets in float64, and draws; parameters of the critic and of the player."""
    torch.manual_seed(0)
    row = METHODS[name]
    outputs = row.defaults.get("critic_outputs", 1)
    last = nn.Flatten(0) if outputs == 1 else nn.Tanh()
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs), last)
    if row.critics == ("energy",):
        critic = Energy(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), PointHead(8, 2)))
    generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), PointHead(8, 2))
    if "components" in row.defaults:
        generator = MixtureGenerator([generator, nn.Sequential(nn.Linear(3, 2), PointHead(2, 2))])
        nn.init.normal_(generator.logits)
    critic.register_buffer("multiplier", torch.tensor(MULTIPLIER))
    model = Model(None, generator.double(), [critic.double()], 3)
    x, z = torch.randn(samples, 2).double() + 1, torch.randn(samples, 3).double()
    return model, lambda: Draws(model, x, z, weight=RHO)


def slope_along(value, parameters, directions, step=1e-5):
    """d/dt value(parameters + t directions) at 0 by central differences."""
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
        sides.append(value().item())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * step * direction
    return (sides[0] - sides[1]) / (2 * step)


def directional(objective, parameters, directions):
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    return float(sum((g * v).sum() for g, v in zip(grads, directions, strict=True) if g is not None))


def agrees(objective, stated, parameters):
    """Whether the gradient of `objective` along a random direction is the slope of `stated`."""
    parameters = list(parameters)
    directions = [torch.randn_like(p) for p in parameters]
    ours, other = directional(objective(), parameters, directions), slope_along(stated, parameters, directions)
    return math.isclose(ours, other, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("name", STATED)
def test_gradients_are_those_of_the_stated_objective(name):
    model, draws = world(name)
    row = METHODS[name]
    sides = ((row.critic, model.critics[0].parameters()), (row.player, model.players.parameters()))
    for (objective, parameters), stated, wrong in zip(sides, STATED[name], WRONG[name], strict=True):
        parameters = list(parameters)

        def of_draws(value):
            d = draws()
            return lambda: value(d.score(d.x), d.score(Draws(model, d.x, d.z_p).x_p))

        assert_close(objective(draws()), of_draws(stated)())
        assert agrees(lambda: objective(draws()), of_draws(stated), parameters)  # noqa: B023
        assert not agrees(lambda: objective(draws()), of_draws(wrong), parameters)  # noqa: B023


def test_with_a_linear_critic_the_wasserstein_gradients_are_exact():
    """f = w·x: the critic climbs along the gap of the means, the mean of the draws moves along −w."""
    model, draws = world("wgan")
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    model.critics, d = [critic], draws()
    weight, bias = critic[0].parameters()
    to_weight, to_bias = torch.autograd.grad(METHODS["wgan"].critic(d), (weight, bias))
    assert_close(to_weight[0], (d.x_p - d.x).mean(0))
    assert_close(to_bias, torch.zeros_like(to_bias))
    shift = model.decoder[2].linear.bias
    (to_shift,) = torch.autograd.grad(METHODS["wgan"].player(d), shift)
    assert_close(to_shift, -weight[0])
    excess = weight.norm() - 1
    assert_close(METHODS["wgan-gp"].critic(d), METHODS["wgan"].critic(d) - RHO * excess**2)
    (ours,) = torch.autograd.grad(METHODS["wgan-gp"].critic(d), weight)
    assert_close(ours, to_weight - 2 * RHO * excess * weight / weight.norm())


def test_a_mixture_learns_components_and_weights():
    """∂/∂logit_i of −Σ w c + (λ/T) Σ log w is −w_i (c_i − Σ w c) + λ (1/T − w_i), c_i the mean score of component i."""
    model, draws = world("mix-wgan")
    mixture, d = model.decoder, draws()

    def stated():
        w = mixture.logits.exp() / mixture.logits.exp().sum()
        c = [model.critics[0](generator(d.z_p).mean).mean() for generator in mixture.generators]
        return model.critics[0](d.x).mean() - sum(a * b for a, b in zip(w, c, strict=True)) + RHO * w.log().sum() / 2

    objective = METHODS["mix-wgan"].player
    assert_close(objective(d), stated())
    assert agrees(lambda: objective(draws()), stated, mixture.parameters())
    w = mixture.logits.softmax(0)
    c = torch.stack([model.critics[0](g(d.z_p).mean).mean() for g in mixture.generators])
    (ours,) = torch.autograd.grad(objective(d), mixture.logits)
    assert_close(ours, -w * (c - (w * c).sum()) + RHO * (0.5 - w))
    sampled = torch.autograd.grad(METHODS["wgan"].player(draws()), mixture.logits, allow_unused=True)
    assert sampled == (None,), "draws alone say nothing about the weights"


def test_the_entropy_term_pulls_to_equal_weights():
    model, draws = world("mix-wgan")
    for parameter in model.critics[0].parameters():
        nn.init.zeros_(parameter)  # no payoff at all
    optimiser = torch.optim.Adam([model.decoder.logits], 0.1)
    assert (model.decoder.log_weights.exp() - 0.5).abs().max() > 0.05
    for _ in range(100):
        optimiser.zero_grad()
        (-METHODS["mix-wgan"].player(draws())).backward()
        optimiser.step()
    assert_close(model.decoder.log_weights.exp(), torch.full((2,), 0.5).double(), atol=1e-2, rtol=0)


def test_a_mixture_draws_a_component_by_its_weight():
    torch.manual_seed(0)
    places = [nn.Sequential(nn.Linear(1, 1), PointHead(1, 1)) for _ in range(3)]
    for k, place in enumerate(places):
        for parameter in place.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(place[1].linear.bias, k)
    mixture, w = MixtureGenerator(places), torch.tensor([0.2, 0.7, 0.1])
    mixture.logits.data = w.log()
    n = 20_000
    with torch.no_grad():
        share = torch.bincount(mixture(torch.zeros(n, 1)).rsample()[:, 0].long(), minlength=3) / n
    error = (w * (1 - w) / n).sqrt()
    assert ((share - w).abs() < 4 * error).all()
    assert ((share - 1 / 3).abs() > 4 * error).any()


def test_fisher_multiplier_climbs_where_the_constraint_is_broken():
    """λ ← λ − ρ ∂L/∂λ, and it is saved with the critic."""
    model, draws = world("fisher-gan")
    critic, d = model.critics[0], draws()
    critic.multiplier.requires_grad_()
    (slope,) = torch.autograd.grad(METHODS["fisher-gan"].critic(d), critic.multiplier)
    critic.multiplier.requires_grad_(False)
    before = critic.multiplier.clone()
    METHODS["fisher-gan"].after_critic(d)
    assert_close(critic.multiplier, before - RHO * slope)
    assert slope != 0


# The loop ---------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([1.0, -0.5]), torch.tensor([0.6, 0.3])
SMALL = {"hidden": 32, "critic_hidden": 32, "depth": 2, "batch": 64, "ema": 0.98, "updates": 250, "log_every": 250}
CHANGES = {  # where the game of small nets turns around the solution: a bound on the slope, or no momentum
    "gan": {"penalty": 0.1, "beta1": 0.5},
    "gan-saturating": {"penalty": 0.1, "beta1": 0.5},
    "gan-symmetric": {"penalty": 0.1, "beta1": 0.5},
    "mix-wgan": {"components": 2},
}


def one_gaussian():
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    split = data.Split(MEAN + STD * noise, torch.zeros(4096, dtype=torch.long))
    return data.Dataset("one", split, split, split)


def fitted(name, **changes):
    made = Experiment.make("ring8", name, **SMALL | CHANGES.get(name, {}) | changes)
    trainer = experiment.prepare(made, one_gaussian(), CPU)
    trainer.fit()
    with torch.no_grad():
        return trainer, trainer.evaluated_players()["decoder"](torch.randn(4000, 2)).rsample()


def misfit(x):
    """The largest error of the means, in the target's units of spread, and the largest |log ratio| of spreads."""
    return ((x.mean(0) - MEAN) / STD).abs().max().item(), (x.std(0) / STD).log().abs().max().item()


@pytest.mark.parametrize("name", ON_POINTS)
def test_every_row_fits_a_gaussian(name):
    _, x = fitted(name)
    place, spread = misfit(x)
    assert place < 0.5 and spread < math.log(2), f"mean off by {place:.2f} spreads, spread by e^{spread:.2f}"
