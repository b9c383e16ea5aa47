"""Mixtures in the plane: densities of total mass one, Bayes' rule, and what `coverage` says of known draws."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close

from svae_lib.densities import DiagonalGaussian
from svae_lib.evaluation import Evaluation, evaluate
from svae_lib.metrics import coverage
from svae_lib.mixtures import MIXTURES, Mixture

mixtures = pytest.mark.parametrize("name", MIXTURES)


def double(name):
    mixture = MIXTURES[name]
    return Mixture(mixture.centres.double(), mixture.std)


def draws(mixture, count, seed=0):
    return mixture.sample(count, torch.Generator().manual_seed(seed))


def mass(mixture, log_density, reach=8, step=0.25):
    """∫ of a density concentrated at the centres, by a lattice of 16σ × 16σ about each; centres are at least 14σ
    apart, and a point is counted where its nearest centre is."""
    ticks = mixture.std * torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    total = 0.0
    for k, centre in enumerate(mixture.centres):
        x = centre + torch.cartesian_prod(ticks, ticks)
        own = torch.cdist(x, mixture.centres).argmin(1) == k
        total += (log_density(x).exp() * own).sum() * (mixture.std * step) ** 2
    return total.item()


@mixtures
def test_density_integrates_to_one(name):
    mixture = double(name)
    assert mass(mixture, mixture.log_prob) == pytest.approx(1, abs=1e-8)
    wrong = [
        lambda x: mixture.log_components(x).logsumexp(1) + math.log(len(mixture.centres)),  # weights forgotten
        lambda x: mixture.log_prob(x) + math.log(mixture.std),  # normalised as in one dimension
    ]
    for density in wrong:
        assert abs(mass(mixture, density) - 1) > 0.1


@mixtures
def test_posterior_is_bayes_rule(name):
    mixture = double(name)
    x = mixture.centres.repeat(3, 1) + draws(mixture, 3 * len(mixture.centres))[0].double() / 3
    components = Independent(Normal(mixture.centres, mixture.std), 1)
    likelihood = components.log_prob(x[:, None])
    log_joint = likelihood - math.log(len(mixture.centres))
    assert_close(mixture.log_prob(x), log_joint.logsumexp(1))
    assert_close(mixture.log_posterior(x), log_joint - log_joint.logsumexp(1, keepdim=True))
    assert_close(mixture.log_posterior(x).exp().sum(1), torch.ones(len(x), dtype=torch.float64))


@mixtures
def test_draws_have_the_moments_and_components_of_the_mixture(name):
    mixture, count = MIXTURES[name], 20_000
    x, component = draws(mixture, count)
    noise = (x - mixture.centres[component]) / mixture.std
    assert (noise.mean(0).abs() < 4 / count**0.5).all()
    assert ((noise.square().mean(0) - 1).abs() < 4 * (2 / count) ** 0.5).all()
    share = torch.bincount(component).double() / count
    expected = 1 / len(mixture.centres)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / count) ** 0.5).all()


@mixtures
def test_coverage_of_its_own_draws(name):
    mixture, count = MIXTURES[name], 20_000
    values = coverage(mixture, draws(mixture, count)[0])
    inside = values["high_quality"]
    assert abs(inside["value"] - (1 - math.exp(-9 / 2))) < 4 * inside["se"] > 0
    assert inside["value"] - math.erf(3 / 2**0.5) < -4 * inside["se"], "the share of one dimension would be seen"
    assert values["modes"]["value"] == len(mixture.centres)


@mixtures
def test_mode_kl_of_its_own_draws_is_chi_squared(name):
    """2 N KL(h ‖ uniform) has K − 1 degrees of freedom: mean K − 1, variance 2(K − 1)."""
    mixture, count, repeats = MIXTURES[name], 2_000, 100
    kl = [coverage(mixture, draws(mixture, count, seed)[0])["mode_kl"]["value"] for seed in range(repeats)]
    freedom = len(mixture.centres) - 1
    mean = 2 * count * sum(kl) / repeats
    assert abs(mean - freedom) < 4 * (2 * freedom / repeats) ** 0.5 < freedom


@mixtures
def test_mode_kl_of_known_shares(name):
    mixture = MIXTURES[name]
    count = len(mixture.centres)
    uniform, one = coverage(mixture, mixture.centres), coverage(mixture, mixture.centres[:1].repeat(10, 1))
    assert uniform["mode_kl"]["value"] == pytest.approx(0, abs=1e-12) and uniform["modes"]["value"] == count
    assert one["mode_kl"]["value"] == pytest.approx(math.log(count)) and one["modes"]["value"] == 1
    half = coverage(mixture, mixture.centres[:2].repeat(5, 1))
    assert half["mode_kl"]["value"] == pytest.approx(math.log(count / 2)) and half["modes"]["value"] == 2


@mixtures
def test_a_mode_is_covered_only_by_draws_near_its_centre(name):
    mixture = MIXTURES[name]
    step = torch.tensor([mixture.std, 0.0])
    for sigmas, found in ((2.9, 1.0), (3.1, 0.0)):
        values = coverage(mixture, mixture.centres + sigmas * step)
        assert values["high_quality"]["value"] == found
        assert values["modes"]["value"] == found * len(mixture.centres)
        assert values["mode_kl"]["value"] == pytest.approx(0, abs=1e-12), "far draws count for the shares"


def test_a_model_that_is_too_wide_or_lost_a_mode_is_seen():
    ring = MIXTURES["ring8"]
    wide, _ = draws(Mixture(ring.centres, 2 * ring.std), 5_000)
    values = coverage(ring, wide)
    inside = values["high_quality"]
    assert abs(inside["value"] - (1 - math.exp(-9 / 8))) < 4 * inside["se"]
    lost, _ = draws(Mixture(ring.centres[1:], ring.std), 5_000)
    values = coverage(ring, lost)
    assert values["modes"]["value"] == 7
    assert values["mode_kl"]["value"] == pytest.approx(math.log(8 / 7), abs=0.01)


class Blur(nn.Module):
    """u ↦ N(u, std²)."""

    def __init__(self, std):
        super().__init__()
        self.log_var = 2 * math.log(std)

    def forward(self, u):
        return DiagonalGaussian(u, torch.full_like(u, self.log_var))


def test_the_reconstruction_error_of_points_is_a_squared_and_a_plain_distance(ring):
    """x̂ − x is N(0, a² + b²) in both coordinates, so its length is Rayleigh."""
    torch.manual_seed(0)
    players, a, b = nn.ModuleDict({"encoder": Blur(0.3), "decoder": Blur(0.4)}), 0.3, 0.4
    found = evaluate(players, ring, torch.device("cpu"), 2, Evaluation(score_samples=100))
    exact = {"mse": 2 * (a**2 + b**2), "l2": math.sqrt(math.pi / 2 * (a**2 + b**2))}
    for name, value in exact.items():
        assert found[name]["n"] == len(ring.test)
        assert abs(found[name]["value"] - value) < 4 * found[name]["se"] < 0.1 * value
