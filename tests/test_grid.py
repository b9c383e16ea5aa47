r"""Tables on a grid: ε-supports are smallest sets, sums are the closed forms, the fits are optima."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from svae_lib.exact import World
from svae_lib.grid import Family, Joints, fit, fraction_inside, kl, log_gaussian, minimise, mixture, support


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


X, Z = line(-7, 7, 141), line(-4.5, 4.5, 121)
TWO_MODES = mixture(X, [0.6, 0.4], [-2.5, 2.5], 0.5)


def tables(w: World) -> Joints:
    r"""A linear-Gaussian world with 1-D x and z, cut into cells; the cut loses less than 1e-12."""

    def reach(a, b) -> Tensor:
        ends = [float(d.mean + k * d.stddev) for d in (a, b) for k in (-9, 9)]
        return line(min(ends), max(ends), 601)

    x, z = reach(w.q_x, w.p_x), reach(w.q_z, w.p_z)
    xz = torch.cartesian_prod(x, z)
    cut = (d.log_prob(xz).log_softmax(0).reshape(len(x), len(z)) for d in (w.q, w.p))
    return Joints(x, z, *cut)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    eps=st.sampled_from([0.001, 0.05, 0.2, 0.5]),
)
def test_support_is_the_smallest_set_that_holds_enough(weights: list[float], eps: float) -> None:
    mass = torch.tensor(weights, dtype=torch.float64)
    mass = mass / mass.sum()
    inside = support(mass.log(), eps)
    assert mass[inside].sum() >= 1 - eps - 1e-12
    smaller = (set(c) for n in range(int(inside.sum())) for c in combinations(range(len(mass)), n))
    assert all(mass[list(c)].sum() < 1 - eps + 1e-12 for c in smaller)


def test_support_of_a_gaussian_is_its_central_interval() -> None:
    x = line(-8, 8, 16_001)
    inside = support(log_gaussian(x, 0.0, 1.0).log_softmax(0), 0.05)
    assert_close(x[inside].max(), torch.tensor(1.96).double(), atol=2e-3, rtol=0)
    assert_close(x[inside].min(), torch.tensor(-1.96).double(), atol=2e-3, rtol=0)


def test_supports_are_nested_and_inclusion_is_counted() -> None:
    small, large = support(TWO_MODES, 0.2), support(TWO_MODES, 0.01)
    assert fraction_inside(small, large) == 1
    assert fraction_inside(large, small) == small.sum() / large.sum() < 1


def test_kl_is_the_closed_form() -> None:
    x = line(-20, 20, 4001)
    a, b = Normal(0.5, 1.5), Normal(-1.0, 2.0)
    log_a, log_b = (log_gaussian(x, d.loc, d.scale).log_softmax(0) for d in (a, b))
    assert_close(kl(log_a, log_b), kl_divergence(a, b).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_tables_agree_with_the_linear_gaussian_world(seed: int) -> None:
    w = World.random(1, 1, seed)
    j = tables(w)
    assert_close(kl(j.log_q, j.log_p), kl_divergence(w.q, w.p), rtol=1e-8, atol=0)
    assert_close(j.L_x(), w.L_x(), rtol=1e-8, atol=0)
    assert_close(j.L_z(), w.L_z(), rtol=1e-8, atol=0)
    assert_close(j.L_xz(), w.L_x() + w.L_z(), rtol=1e-8, atol=0)
    for mine, density, at in [(j.q_x, w.q_x, j.x), (j.p_x, w.p_x, j.x), (j.q_z, w.q_z, j.z), (j.p_z, w.p_z, j.z)]:
        assert_close(mine.exp(), density.log_prob(at[:, None]).softmax(0), rtol=0, atol=1e-12)


def test_family_is_what_it_says() -> None:
    family = Family(X, Z, TWO_MODES, slope=5.0, seed=3)
    j = family()
    assert_close(j.q_x, TWO_MODES)
    assert_close(j.p_z, log_gaussian(Z, 0.0, 1.0).log_softmax(0))
    for table in (j.log_q, j.log_p):
        assert_close(table.exp().sum(), torch.ones(()).double())
    for p in family.climb.parameters():
        p.data.fill_(9.0)  # as steep as it gets
    mean_x = (X @ (family().log_p - j.p_z).exp()).detach()
    assert float(mean_x.diff().max()) <= 5.0 * float(Z[1] - Z[0]) + 1e-9
    (-family().L_xz()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in family.parameters())


def test_the_seed_decides_the_start_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (Family(X, Z, TWO_MODES, 5.0, seed)().log_q for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("goal", [Joints.L_x, Joints.L_z, Joints.L_xz])
def test_a_family_that_contains_the_data_is_fitted_exactly(goal) -> None:
    j = fit(goal, X, Z, mixture(X, [1.0], [0.7], 1.3), slope=5.0, starts=1)
    assert kl(j.log_q, j.log_p) < 2e-3
    assert kl(j.log_p, j.log_q) < 2e-3


def test_minimise_finds_a_known_optimum() -> None:
    r"""The Gaussian nearest to q in KL(q ‖ ·) has q's mean and variance."""
    x = line(-15, 15, 301)
    q = mixture(x, [0.6, 0.4], [-2.5, 2.5], 0.5)
    mean, log_std = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    minimise(lambda: kl(q, log_gaussian(x, mean, log_std.exp()).log_softmax(0)), [mean, log_std])
    q_mean = q.exp() @ x
    assert_close(mean[0].detach(), q_mean, atol=1e-4, rtol=0)
    assert_close((2 * log_std[0]).exp().detach(), q.exp() @ (x - q_mean).square(), atol=1e-3, rtol=0)
