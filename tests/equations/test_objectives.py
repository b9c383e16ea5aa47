r"""Every objective against a closed form: a proof per equation, and wrong variants it must refuse.

Two tricks make sample averages exact, so that the functions themselves are tested and not a
paraphrase of them:

* a *table*: two discrete distributions with whole-number counts, every cell repeated as often as
  it counts, so a batch mean is the expectation (S10, S11, S16, S17);
* *cubature*: draws of the linear-Gaussian world at the points of `exact.cubature`, where the batch
  mean of a quadratic log-ratio is its expectation, and stays so when parameters move, hence its
  gradient too (S1, S12–S15, S29).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import (
    ONE_CODE,
    PROOF,
    SEEDS,
    about,
    agreed,
    batches,
    gradient,
    logs,
    normal,
    number,
    refuses,
    same,
    scores,
    worlds,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from svae_lib.exact import PHI, THETA, World
from svae_lib.objectives import (
    critic_lrt,
    elbo,
    likelihood_ratio_test,
    symmetric,
    symmetric_with_reconstruction,
)

# Tables: expectations under discrete q and p are batch means -------------------------------------


class Table:
    r"""Two distributions over k cells with counts n_q, n_p of equal total, no cell empty."""

    def __init__(self, n_q: list[int], n_p: list[int]) -> None:
        n_q, n_p = torch.tensor(n_q), torch.tensor(n_p)
        n_q, n_p = n_q * n_p.sum(), n_p * n_q.sum()  # equal totals, the same distributions
        cells = torch.arange(len(n_q))
        self.of_q, self.of_p = cells.repeat_interleave(n_q), cells.repeat_interleave(n_p)
        self.q, self.p = n_q / n_q.sum().double(), n_p / n_p.sum().double()
        self.f_star = self.p.log() - self.q.log()

    def g(self, f: Tensor, objective=critic_lrt) -> Tensor:
        return objective(f[self.of_q], f[self.of_p])

    def js(self) -> Tensor:
        middle = (self.p + self.q) / 2
        return 0.5 * sum((a * (a / middle).log()).sum() for a in (self.p, self.q))


counts = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=6)
tables = given(table=counts.map(lambda pairs: Table(*map(list, zip(*pairs, strict=True)))), seed=SEEDS)


def slope(objective, f: Tensor) -> Tensor:
    f = f.clone().requires_grad_()
    return torch.autograd.grad(objective(f), f)[0]


@PROOF
@tables
def test_S10_is_stationary_at_the_log_ratio(table: Table, seed: int) -> None:
    flat = torch.zeros_like(table.f_star)
    same(slope(table.g, table.f_star), flat)
    same(slope(table.g, flat), (table.p - table.q) / 2)  # from f = 0 the first step goes towards p
    if table.f_star.abs().max() > 0.1:
        swapped = lambda f: table.g(f, lambda f_q, f_p: critic_lrt(f_p, f_q))  # noqa: E731
        refuses(slope(table.g, -table.f_star), flat)  # wrong sign
        refuses(slope(swapped, table.f_star), flat)  # wrong labels
        same(slope(swapped, -table.f_star), flat)  # the same mistake twice


@PROOF
@tables
def test_S10_maximum_is_twice_the_jensen_shannon_divergence_minus_2_log_2(table: Table, seed: int) -> None:
    best = table.g(table.f_star)
    same(best, 2 * table.js() - 2 * math.log(2))
    same(table.g(torch.zeros_like(table.f_star)), number(-2 * math.log(2)))
    assert table.g(table.f_star + normal(len(table.q), seed=seed)) < best  # strictly concave: one maximum
    if table.js() > 1e-3:
        refuses(best, table.js() - 2 * math.log(2), 2 * table.js(), 2 * table.js() + 2 * math.log(2))


def stratified(density: Normal, n: int = 200_000) -> Tensor:
    r"""The n mid-quantiles of a density: a batch mean over them is an integral in 1-D."""
    return density.icdf((torch.arange(n).double() + 0.5) / n)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0, 4.0])
def test_S10_maximum_by_integration(shift: float) -> None:
    r"""Two Gaussians, the integral of the Jensen–Shannon divergence by the trapezoid rule.

    Mid-quantiles cut the tails at mass 1/(2n), an error of order log(n)/n ≈ 6e-5.
    """
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    q, p = Normal(zero, one), Normal(zero + shift, 1.5 * one)
    f_star = lambda x: p.log_prob(x) - q.log_prob(x)  # noqa: E731
    x = torch.linspace(-30, 30, 60_001).double()
    log_q, log_p = q.log_prob(x), p.log_prob(x)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    js = 0.5 * torch.trapezoid(log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m), x)
    g = critic_lrt(f_star(stratified(q)), f_star(stratified(p)))
    about(g, 2 * js - 2 * math.log(2), 1e-4)
    for wrong in (critic_lrt(f_star(stratified(p)), f_star(stratified(q))), 2 * js, js - 2 * math.log(2)):
        assert (g - wrong).abs() > 1e-2


@PROOF
@given(f_q=st.floats(-30, 30), f_p=st.floats(-30, 30))
def test_S10_is_the_log_likelihood_of_the_labels(f_q: float, f_p: float) -> None:
    f_q, f_p = torch.tensor([f_q]).double(), torch.tensor([f_p]).double()
    literal = (1 / (1 + f_q.exp())).log() + (1 / (1 + (-f_p).exp())).log()  # 1 − σ(f) = 1 / (1 + e^f)
    same(critic_lrt(f_q, f_p), literal.squeeze())


def test_S10_survives_scores_that_float32_sigmoids_do_not() -> None:
    far = torch.tensor([1e4, -1e4])
    same(critic_lrt(far, far), torch.tensor(-1e4))
    naive = (1 - far.sigmoid()).log().mean() + far.sigmoid().log().mean()
    assert not naive.isfinite()


def newton(g, f: Tensor, steps: int = 60) -> Tensor:
    r"""Damped Newton ascent on a concave function."""
    for _ in range(steps):
        gradient = torch.autograd.functional.jacobian(g, f)
        step = torch.linalg.solve(torch.autograd.functional.hessian(g, f), -gradient)
        f = f + step / (1 + step.abs().max())
    return f


@settings(PROOF, max_examples=10)
@tables
def test_S11_ascent_from_zero_ends_at_the_log_ratio(table: Table, seed: int) -> None:
    trained = newton(table.g, torch.zeros_like(table.f_star))
    same(trained, table.f_star)
    if table.f_star.abs().max() > 0.1:
        refuses(trained, -table.f_star, table.p - table.q, table.p / (table.p + table.q))


def test_S11_logistic_regression_recovers_a_gaussian_log_ratio() -> None:
    r"""f* between two Gaussians is a parabola; its three coefficients come out of S10 alone.

    Mid-quantiles instead of random draws leave an error of order 1/√n in the tails at most.
    """
    q, p = Normal(torch.tensor(0.3).double(), 1.0), Normal(torch.tensor(-0.5).double(), 0.7)
    basis = lambda x: torch.stack([x**0, x, x**2], 1)  # noqa: E731
    b_q, b_p = basis(stratified(q, 20_000)), basis(stratified(p, 20_000))
    trained = newton(lambda c: critic_lrt(b_q @ c, b_p @ c), torch.zeros(3).double())
    x = torch.tensor([-1.0, 0.0, 1.0]).double()
    exact = torch.linalg.solve(basis(x), p.log_prob(x) - q.log_prob(x))
    about(trained, exact, 5e-3)
    assert (trained + exact).abs().max() > 1  # the other sign is far away


# Cubature: batch means in the linear-Gaussian world are expectations -----------------------------


@worlds
def test_S1_elbo_value_and_gradient(w: World) -> None:
    w = w.with_grad()
    x, z = batches(w)[0]
    log_p, kl = w.decoder()(z).log_prob(x), w.encoder()(x).kl_to_standard()
    value = elbo(log_p, kl)
    same(value, w.L_x())
    same(gradient(value, w), gradient(w.L_x(), w))
    refuses(value, elbo(log_p, -kl), elbo(-log_p, kl), log_p.mean())


@worlds
def test_S12_batch_mean_of_the_critic_gives_L_x(w: World) -> None:
    f_q, f_p = scores(w, w)
    same(f_q.mean() + w.C_x, w.L_x())
    refuses(w.L_x(), f_p.mean() + w.C_x, -f_q.mean() + w.C_x, f_q.mean())


@worlds
def test_S13_batch_mean_of_the_critic_gives_L_z(w: World) -> None:
    f_q, f_p = scores(w, w)
    same(-f_p.mean() + w.C_z, w.L_z())
    refuses(w.L_z(), -f_q.mean() + w.C_z, f_p.mean() + w.C_z, -f_p.mean())


@worlds
def test_S14_value_is_minus_the_symmetric_kl(w: World) -> None:
    f_q, f_p = scores(w, w)
    same(symmetric(f_q, f_p), -w.kl_s())
    refuses(symmetric(f_q, f_p), w.kl_s(), -kl_divergence(w.q, w.p), -kl_divergence(w.p, w.q))
    refuses(-w.kl_s(), symmetric(f_p, f_q), symmetric(-f_q, -f_p), f_q.mean() + f_p.mean())


@worlds
def test_S14_gradient_with_the_critic_frozen(w: World) -> None:
    r"""The batch's pathwise gradient is the exact one: each player follows one direction of KL."""
    w = w.with_grad()
    value = symmetric(*scores(w, w.frozen()))
    same(gradient(value, w), gradient(w.ell(w.frozen()), w))
    same(gradient(value, w, THETA), gradient(-kl_divergence(w.p, w.q), w, THETA))
    same(gradient(value, w, PHI), gradient(-kl_divergence(w.q, w.p), w, PHI))
    refuses(gradient(value, w), gradient(-w.kl_s(), w), -gradient(value, w))


@worlds
def test_S15_gradient_through_the_critic_is_that_of_the_symmetric_kl(w: World) -> None:
    w = w.with_grad()
    value = symmetric(*scores(w, w))
    assert value <= 0
    same(gradient(value, w), gradient(-w.kl_s(), w))
    refuses(gradient(value, w), gradient(symmetric(*scores(w, w.frozen())), w))


@worlds(w=ONE_CODE)
def test_S15_zero_and_flat_when_the_joints_agree(w: World) -> None:
    e = agreed(w).with_grad()
    value = symmetric(*scores(e, e.frozen()))
    same(value, torch.zeros(()).double())
    found = gradient(value, e)
    same(found, torch.zeros_like(found))
    moved = symmetric(*scores(w, w))
    assert moved < -1e-3


@worlds(weight=st.floats(0.05, 3))
def test_S29_as_printed_with_attached_draws(w: World, weight: float) -> None:
    w = w.with_grad()
    f, fit = scores(w, w.frozen()), logs(w, w)
    value = symmetric_with_reconstruction(*f, *fit, weight=weight)
    exact = w.ell(w.frozen()) + weight * (w.expected_log_decoder(w.q) + w.expected_log_encoder(w.p))
    same(value, exact)
    same(gradient(value, w), gradient(exact, w))
    forgotten = symmetric(*f)
    negative = symmetric_with_reconstruction(*f, *fit, weight=-weight)
    doubled = symmetric_with_reconstruction(*f, *fit, weight=2 * weight)
    for wrong in (forgotten, negative, doubled):
        refuses(gradient(value, w), gradient(wrong, w))
    refuses(value, symmetric_with_reconstruction(f[1], f[0], *fit, weight=weight))


@worlds
def test_S29_with_detached_draws_and_unit_weight_follows_the_symmetric_kl(w: World) -> None:
    w = w.with_grad()
    f = scores(w, w.frozen())
    detached = symmetric_with_reconstruction(*f, *logs(w, w.frozen()), weight=1.0)
    attached = symmetric_with_reconstruction(*f, *logs(w, w), weight=1.0)
    same(detached, attached)  # equal values,
    same(gradient(detached, w), gradient(-w.kl_s(), w))  # unequal gradients
    refuses(gradient(detached, w), gradient(attached, w), gradient(symmetric(*f), w))


@worlds
def test_S29_without_weight_is_S14(w: World) -> None:
    f = scores(w, w)
    same(symmetric_with_reconstruction(*f, *logs(w, w), weight=0.0), symmetric(*f))


# The likelihood-ratio test ------------------------------------------------------------------------


def error(table: Table, statistic: Tensor, threshold: float = 0.0) -> Tensor:
    r"""Probability of a wrong label under equal priors, the test being S16, S17 on a shifted score."""
    says_p = likelihood_ratio_test(statistic - threshold)
    return 0.5 * (says_p[table.of_q].double().mean() + (~says_p)[table.of_p].double().mean())


@PROOF
@tables
def test_S16_S17_threshold_zero_reaches_the_bayes_error(table: Table, seed: int) -> None:
    bayes = 0.5 * torch.minimum(table.q, table.p).sum()
    same(error(table, table.f_star), bayes)
    same(bayes, 0.5 * (1 - 0.5 * (table.p - table.q).abs().sum()))  # ½ (1 − total variation)
    for threshold in (-2.0, -0.5, 0.5, 2.0):
        assert error(table, table.f_star, threshold) >= bayes - 1e-12
    assert error(table, normal(len(table.q), seed=seed)) >= bayes - 1e-12
    if (table.f_star.abs() > 0.1).all():
        refuses(bayes, error(table, -table.f_star))  # labels swapped


def test_S16_S17_direction() -> None:
    same(likelihood_ratio_test(torch.tensor([3.0, -3.0])).double(), torch.tensor([1.0, 0.0]).double())  # 1: decoder


@pytest.mark.parametrize("distance", [0.5, 1.0, 3.0])
def test_S16_S17_bayes_error_of_two_gaussians(distance: float) -> None:
    r"""Equal variances: error Φ(−d/2). Mid-quantiles count it to 1/n."""
    standard = Normal(torch.zeros(()).double(), torch.ones(()).double())
    f_star = lambda x: distance * x - distance**2 / 2  # noqa: E731
    x = stratified(standard)
    wrong_q, wrong_p = likelihood_ratio_test(f_star(x)), ~likelihood_ratio_test(f_star(x + distance))
    measured = 0.5 * (wrong_q.double().mean() + wrong_p.double().mean())
    about(measured, standard.cdf(torch.tensor(-distance / 2).double()), 1e-5)


def roc(table: Table, statistic: Tensor) -> tuple[Tensor, Tensor]:
    r"""The corners of the ROC of "say p when the statistic is large": false and true positive rates."""
    order = torch.argsort(statistic, descending=True)
    zero = torch.zeros(1).double()
    return torch.cat([zero, table.q[order].cumsum(0)]), torch.cat([zero, table.p[order].cumsum(0)])


def power(curve: tuple[Tensor, Tensor], false_positive: Tensor) -> Tensor:
    r"""True positive rate at given false positive rates, randomising between corners."""
    fpr, tpr = curve
    i = torch.searchsorted(fpr, false_positive.contiguous()).clamp(1, len(fpr) - 1)
    return tpr[i - 1] + (tpr[i] - tpr[i - 1]) * (false_positive - fpr[i - 1]) / (fpr[i] - fpr[i - 1])


@PROOF
@tables
def test_S16_S17_neyman_pearson_no_statistic_beats_the_ratio(table: Table, seed: int) -> None:
    best = roc(table, table.f_star)
    perturbed = roc(table, table.f_star + normal(len(table.q), seed=seed))
    assert (power(best, perturbed[0]) >= perturbed[1] - 1e-12).all()
    area = lambda curve: torch.trapezoid(curve[1], curve[0])  # noqa: E731
    assert area(best) >= area(perturbed) - 1e-12
    assert area(roc(table, -table.f_star)) <= 0.5 + 1e-12  # the wrong sign is worse than guessing
    monotone = roc(table, table.f_star.sigmoid() * 3 - 1)  # any increasing map of f* is as good
    same(area(monotone), area(best))


def test_objectives_of_critic_and_players_are_not_interchangeable() -> None:
    r"""Same fixed point, other values: the critic's objective is bounded, the players' is not."""
    f_q, f_p = normal(5, seed=0) - 3, normal(5, seed=1) + 3
    assert critic_lrt(f_q, f_p) < 0 < -symmetric(f_q, f_p)
