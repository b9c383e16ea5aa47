r"""S26–S29: what λ times both reconstructions adds to the symmetric objective, to its gradient and to its maximum.

R = E_qφ log p_θ(x|z) + E_pθ log q_φ(z|x) is the added term. Three things are proved beyond the printed
equations: what R measures (mutual information, up to gaps), which part of its gradient moves a joint that
already matches, and when S28 has a maximum at all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import strategies as st
from proof import (
    DIMS,
    SEEDS,
    about,
    as_conditional,
    best_encoder,
    estimates,
    four,
    gradient,
    logs,
    matched,
    proved,
    refuses,
    refuses_estimates,
    same,
    scores,
    worlds,
)
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from svae_lib.exact import PHI, THETA, World, expected_kl, expected_log_prob, marginal
from svae_lib.grid import Joints
from svae_lib.objectives import symmetric_with_reconstruction

WEIGHTS = st.floats(0.05, 3)


def mean_square(joint: MultivariateNormal, of: Tensor) -> Tensor:
    r"""E (row · (u, 1))² for each row of an affine map of the joint's coordinates u; (rows, dim + 1) -> (rows,)."""
    linear, shift = of[:, :-1], of[:, -1]
    return (linear @ joint.mean + shift).square() + (linear @ joint.covariance_matrix @ linear.mT).diag()


def x_cycle(w: World) -> Tensor:
    r"""E_qφ (x − W z − b)², per coordinate: the square of the error of x → z → x."""
    return mean_square(w.q, torch.cat([torch.eye(len(w.b)).double(), -w.W, -w.b[:, None]], 1))


def z_cycle(w: World) -> Tensor:
    r"""E_pθ (z − V x − c)², per coordinate: the square of the error of z → x → z."""
    return mean_square(w.p, torch.cat([-w.V, torch.eye(len(w.c)).double(), -w.c[:, None]], 1))


def fit(cycle: Tensor, log_var: Tensor) -> Tensor:
    r"""Σ −½ [cycle / σ² + log σ² + log 2π]: an expected Gaussian log-density, from its mean square error."""
    return -0.5 * (cycle / log_var.exp() + log_var + math.log(2 * math.pi)).sum()


def information(joint: MultivariateNormal, w: World) -> Tensor:
    r"""I(x; z) = h(x) + h(z) − h(x, z), in nats."""
    return marginal(joint, w.x).entropy() + marginal(joint, w.z).entropy() - joint.entropy()


def reconstructions(w: World, drawn: World | None = None) -> Tensor:
    r"""R, the densities from w and the pairs from `drawn` (w itself unless given)."""
    drawn = drawn or w
    return w.expected_log_decoder(drawn.q) + w.expected_log_encoder(drawn.p)


# The equations ------------------------------------------------------------------------------


@worlds(weight=WEIGHTS)
def test_S26_both_forms(w: World, weight: float) -> None:
    r"""(λ + 1) E_qφ log p_θ(x|z) − E KL(q_φ(z|x) ‖ p(z)), from the cycle error, is L_x plus λ reconstructions."""
    log_p = fit(x_cycle(w), w.s)
    rate = expected_kl(w.q_z_given_x, as_conditional(w.p_z, len(w.m)), w.q_x)
    same(w.L_x(weight), (weight + 1) * log_p - rate)
    same(w.L_x(weight), w.L_x() + weight * log_p)
    same(w.L_x(0.0), log_p - rate)
    refuses(w.L_x(weight), weight * log_p - rate, (weight + 1) * (log_p - rate), w.L_x() - weight * log_p)


@worlds(weight=WEIGHTS)
def test_S27_both_forms(w: World, weight: float) -> None:
    log_q = fit(z_cycle(w), w.t)
    rate = expected_kl(w.p_x_given_z, as_conditional(w.q_x, len(w.c)), w.p_z)
    same(w.L_z(weight), (weight + 1) * log_q - rate)
    same(w.L_z(weight), w.L_z() + weight * log_q)
    same(w.L_z(0.0), log_q - rate)
    refuses(w.L_z(weight), weight * log_q - rate, (weight + 1) * (log_q - rate), w.L_z() - weight * log_q)
    refuses(w.L_z(weight), w.L_z() + weight * fit(x_cycle(w), w.s))


@worlds(weight=WEIGHTS)
def test_S28_is_the_symmetric_kl_with_both_reconstructions(w: World, weight: float) -> None:
    R = fit(x_cycle(w), w.s) + fit(z_cycle(w), w.t)
    same(w.L_xz(weight), w.L_xz() + weight * R)
    same(w.L_xz(weight), -w.kl_s() + w.C_x + w.C_z + weight * R)
    refuses(w.L_xz(weight), w.L_xz() - weight * R, w.L_xz() + weight * fit(x_cycle(w), w.s), w.L_xz(2 * weight))


@worlds(weight=WEIGHTS)
def test_S29_value_is_S28_without_its_constant(w: World, weight: float) -> None:
    value = symmetric_with_reconstruction(*scores(w, w), *logs(w, w), weight=weight)
    same(value, w.L_xz(weight) - w.C_x - w.C_z)
    f_q, f_p = scores(w, w)
    log_p, log_q = logs(w, w)
    wrong_sign = f_q.mean() + weight * log_p.mean() - f_p.mean() - weight * log_q.mean()
    refuses(value, wrong_sign, symmetric_with_reconstruction(f_p, f_q, log_p, log_q, weight), w.L_xz(weight))


@pytest.mark.parametrize(("x_dim", "z_dim"), [(1, 1), (3, 2), (2, 5)])
def test_S26_S27_S28_S29_by_monte_carlo(x_dim: int, z_dim: int) -> None:
    r"""Every logarithm at ancestral draws, λ = 0.3; four standard errors, fixed seed."""
    w, generator, weight = World.random(x_dim, z_dim, seed=11), torch.Generator().manual_seed(0), 0.3
    noise_q, noise_p = torch.randn(2, 200_000, x_dim + z_dim, generator=generator, dtype=torch.float64)
    _, qzx, pz, pxz = four(w, *w.encoder_pairs(noise_q))
    qx_, qzx_, _, pxz_ = four(w, *w.decoder_pairs(noise_p))
    l_x = (1 + weight) * pxz + pz - qzx
    l_z = (1 + weight) * qzx_ + qx_ - pxz_
    estimates(l_x, w.L_x(weight))
    estimates(l_z, w.L_z(weight))
    estimates(l_x + l_z, w.L_xz(weight))
    refuses_estimates(l_x + l_z, w.L_xz(), w.L_xz(-weight))


@worlds(weight=WEIGHTS)
def test_S26_is_a_beta_vae_with_beta_below_one(w: World, weight: float) -> None:
    r"""Higgins et al. 2017: E log p − β KL to the prior; here β = 1/(1 + λ), and the whole scaled by 1 + λ."""
    rate = expected_kl(w.q_z_given_x, as_conditional(w.p_z, len(w.m)), w.q_x)

    def beta_vae(beta: float) -> Tensor:
        return w.expected_log_decoder(w.q) - beta * rate

    same(w.L_x(weight), (1 + weight) * beta_vae(1 / (1 + weight)))
    refuses(w.L_x(weight), (1 + weight) * beta_vae(1 + weight), beta_vae(1 / (1 + weight)))


# What the added term measures ---------------------------------------------------------------


@worlds
def test_S26_reconstruction_is_information_minus_a_gap(w: World) -> None:
    r"""E_qφ log p_θ(x|z) = I_q(x; z) − h(q(x)) − E KL(q_φ(x|z) ‖ p_θ(x|z)) ≤ −h_q(x|z) (Barber, Agakov 2003)."""
    log_p, I_q = w.expected_log_decoder(w.q), information(w.q, w)
    gap = expected_kl(w.q_x_given_z, w.p_x_given_z, w.q_z)
    same(log_p, I_q + w.C_x - gap)
    same(I_q + w.C_x, -w.q_x_given_z.at(w.c).entropy())
    assert gap >= 0
    refuses(log_p, I_q + w.C_x, I_q - w.C_x - gap, information(w.p, w) + w.C_x - gap)


@worlds
def test_S27_reconstruction_is_information_minus_a_gap(w: World) -> None:
    log_q, I_p = w.expected_log_encoder(w.p), information(w.p, w)
    gap = expected_kl(w.p_z_given_x, w.q_z_given_x, w.p_x)
    same(log_q, I_p + w.C_z - gap)
    same(I_p + w.C_z, -w.p_z_given_x.at(w.m).entropy())
    assert gap >= 0
    refuses(log_q, I_p + w.C_z, I_p - w.C_z - gap, information(w.q, w) + w.C_z - gap)


@worlds
def test_S26_rate_is_information_plus_the_mismatch_of_the_codes(w: World) -> None:
    rate = expected_kl(w.q_z_given_x, as_conditional(w.p_z, len(w.m)), w.q_x)
    same(rate, information(w.q, w) + kl_divergence(w.q_z, w.p_z))
    refuses(rate, information(w.q, w), information(w.p, w) + kl_divergence(w.q_z, w.p_z))


@worlds
def test_S26_a_small_cycle_error_needs_information(w: World) -> None:
    r"""I_q ≥ h(q(x)) − (d/2) log(2πe · mean cycle error), the best width being put into S26's term."""
    d = len(w.m)
    mse = x_cycle(w).mean()
    floor = w.q_x.entropy() - d / 2 * (2 * math.pi * math.e * mse).log()
    best = fit(x_cycle(w), mse.log().expand(d))
    same(floor, best - w.C_x)
    for other in (-0.2, 0.2):
        assert fit(x_cycle(w), mse.log().expand(d) + other) < best
    assert information(w.q, w) >= floor
    rate = expected_kl(w.q_z_given_x, as_conditional(w.p_z, d), w.q_x)
    assert rate >= information(w.q, w) - 1e-12
    refuses(floor, best + w.C_x)


# The gradient of S29 in three parts ---------------------------------------------------------


@worlds(weight=WEIGHTS)
def test_S29_gradient_is_S14_plus_halves_plus_pathwise_parts(w: World, weight: float) -> None:
    r"""The library's lines against closed forms: ∇ℓ' = ∇ℓ + λ ∇R(draws fixed) + λ ∇R(densities fixed)."""
    w = w.with_grad()
    fixed = w.frozen()
    whole = gradient(symmetric_with_reconstruction(*scores(w, fixed), *logs(w, w), weight=weight), w)
    game = gradient(w.ell(fixed), w)
    halves, path = gradient(reconstructions(w, fixed), w), gradient(reconstructions(fixed, w), w)
    same(whole, game + weight * halves + weight * path)
    same(gradient(sum(term.mean() for term in logs(w, fixed)), w), halves)
    same(gradient(sum(term.mean() for term in logs(fixed, w)), w), path)
    refuses(whole, game, game + weight * halves, game + weight * path, game + 2 * weight * halves + weight * path)


@worlds
def test_S14_contains_one_pull_and_no_fit(w: World) -> None:
    r"""Each player's direction of KL is one reconstruction with moving draws, plus terms without the other player."""
    w = w.with_grad()
    fixed = w.frozen()
    game = w.ell(fixed)
    decoder = fixed.expected_log_encoder(w.p) + w.p_x_given_z.at(fixed.c).entropy()
    decoder = decoder + expected_log_prob(w.p_x, fixed.q_x)
    encoder = fixed.expected_log_decoder(w.q) + w.q_z_given_x.at(fixed.m).entropy()
    encoder = encoder + expected_log_prob(w.q_z, fixed.p_z)
    same(gradient(game, w, THETA), gradient(decoder, w, THETA))
    same(gradient(game, w, PHI), gradient(encoder, w, PHI))
    refuses(gradient(game, w, THETA), gradient(decoder + w.expected_log_decoder(fixed.q), w, THETA))
    refuses(gradient(game, w, PHI), gradient(encoder + w.expected_log_encoder(fixed.p), w, PHI))


@worlds(weight=WEIGHTS)
def test_S29_gradient_is_that_of_S28_less_the_missing_halves(w: World, weight: float) -> None:
    r"""So S29 with a frozen critic does not climb S28, for no λ."""
    w = w.with_grad()
    fixed = w.frozen()
    whole = gradient(w.ell(fixed) + weight * reconstructions(w), w)
    target, halves = gradient(w.L_xz(weight), w), gradient(reconstructions(w, fixed), w)
    same(whole, target - halves)
    refuses(whole, target, target + halves)


@worlds(w=st.builds(matched, DIMS, DIMS, SEEDS), weight=WEIGHTS)
def test_S29_at_matched_joints_climbs_mutual_information(w: World, weight: float) -> None:
    r"""There S14 and the halves rest. With detached draws it is a fixed point for every λ; as printed it is none."""
    same(w.kl_s(), torch.zeros(()).double())
    w = w.with_grad()
    fixed = w.frozen()
    zero = torch.zeros_like(gradient(w.kl_s(), w))
    same(gradient(w.ell(fixed), w), zero)
    same(gradient(reconstructions(w, fixed), w), zero)
    whole = gradient(symmetric_with_reconstruction(*scores(w, fixed), *logs(w, w), weight=weight), w)
    climb = gradient(information(w.q, w) + information(w.p, w), w)
    same(whole, weight * climb)
    refuses(whole, zero, -whole, weight * gradient(information(w.q, w), w))


# Is there a maximum? ------------------------------------------------------------------------


def test_S28_scalar_world_in_symbols() -> None:
    r"""x and z numbers, q(x) = p(z) = N(0, 1): KL_s has no logarithm of a variance, R has nothing else to lose."""
    W, V = sympy.symbols("W V", real=True)
    sigma, tau, rho = sympy.symbols("sigma tau rho", positive=True)

    def kl(a: sympy.Matrix, b: sympy.Matrix) -> sympy.Expr:
        return ((b.inv() * a).trace() - 2 + sympy.log(b.det()) - sympy.log(a.det())) / 2

    q = sympy.Matrix([[1, V], [V, V**2 + tau]])
    p = sympy.Matrix([[W**2 + sigma, W], [W, 1]])
    e = 1 - V * W
    x_error, z_error = e**2 + W**2 * tau, e**2 + V**2 * sigma
    kl_s = (W**2 + sigma + V**2 + tau + z_error / tau + x_error / sigma) / 2 - 2
    proved(kl(q, p) + kl(p, q) - kl_s)
    matched = {W: rho, V: rho, sigma: 1 - rho**2, tau: 1 - rho**2}
    proved(kl_s.subs(matched))
    R = -sympy.log(2 * sympy.pi) - (sympy.log(sigma) + sympy.log(tau)) / 2 - (x_error / sigma + z_error / tau) / 2
    proved(R.subs(matched) + sympy.log(2 * sympy.pi) + sympy.log(1 - rho**2) + 1)


def copying(w: World, v: float) -> World:
    r"""The first code is the first datum to a precision 1/v; nothing else is encoded, all variances stay free."""
    scale = w.S[0, 0].sqrt()
    first_x, first_z = torch.eye(len(w.m)).double()[0], torch.eye(len(w.c)).double()[0]
    rho = math.sqrt(1 - v)
    W = torch.outer(w.S[0] / scale, first_z)
    W[0, 0] = rho * scale
    s = torch.zeros_like(w.m)
    s[0] = math.log(v) + 2 * scale.log()
    V = torch.outer(first_z, first_x) * rho / scale
    t = torch.zeros_like(w.c)
    t[0] = math.log(v)
    return replace(w, W=W, b=w.m, s=s, V=V, c=-V @ w.m, t=t)


@worlds(weight=st.floats(0.01, 3))
def test_S26_S28_have_no_maximum_when_all_variances_are_learnt(w: World, weight: float) -> None:
    r"""Each factor 1/e in v costs a bounded KL_s nothing and pays λ nats in S28, λ/2 in S26, for every λ > 0."""
    path = [copying(w, v) for v in (1e-3, 1e-5, 1e-7)]
    decades = weight * math.log(100)
    for a, b in zip(path, path[1:], strict=False):
        about(b.kl_s(), a.kl_s(), 0.02)
        about(b.L_xz(weight) - a.L_xz(weight), decades, 0.02 * (1 + weight))
        about(b.L_x(weight) - a.L_x(weight), decades / 2, 0.02 * (1 + weight))
        about(b.L_xz(), a.L_xz(), 0.02)
    refuses(path[1].L_xz(weight), path[2].L_xz(weight))


@worlds(w=st.builds(World.random, st.integers(1, 4), st.integers(4, 8), SEEDS), weight=WEIGHTS)
def test_S28_has_no_maximum_with_one_width_and_enough_codes(w: World, weight: float) -> None:
    r"""Probabilistic PCA with as many codes as coordinates: below the least eigenvalue of the data's covariance
    every shared variance v has joints that agree, and λ d nats more for each factor 1/e in v."""
    d, k = len(w.m), len(w.c)
    variances, axes = torch.linalg.eigh(w.S)

    def agreeing(v: float) -> World:
        W = torch.cat([axes * (variances - v).sqrt(), w.W.new_zeros(d, k - d)], 1)
        return best_encoder(replace(w, W=W, b=w.m, s=torch.full((d,), math.log(v), dtype=torch.float64)))

    wide, narrow = agreeing(0.3), agreeing(0.003)
    same(wide.kl_s(), torch.zeros(()).double())
    same(narrow.kl_s(), torch.zeros(()).double())
    gain = torch.tensor(weight * d * math.log(100), dtype=torch.float64)
    same(narrow.L_xz(weight) - wide.L_xz(weight), gain)
    refuses(narrow.L_xz(weight) - wide.L_xz(weight), gain / 2, -gain)


def most_information(w: World, weight: float) -> Tensor:
    r"""½ d [(1 + λ) log(1 + λ) − λ] + λ (h(q(x)) − h(p_θ(x|z))): λ I_p − KL(p_θ(x) ‖ q(x)) is never above it."""
    noise = w.p_x_given_z.at(torch.zeros_like(w.c)).entropy()
    reach = (1 + weight) * math.log(1 + weight) - weight
    return 0.5 * len(w.m) * reach + weight * (-w.C_x - noise)


def upper_bound(w: World, weight: float) -> Tensor:
    r"""K − λ (2 h(p_θ(x|z)) + C_x − C_z) + ½ d (1 + λ) log(1 + λ): S28 is never above it."""
    noise = w.p_x_given_z.at(torch.zeros_like(w.c)).entropy()
    reach = 0.5 * len(w.m) * (1 + weight) * math.log(1 + weight)
    return w.C_x + w.C_z - weight * (2 * noise + w.C_x - w.C_z) + reach


@worlds(weight=WEIGHTS)
def test_S28_bound_step_by_step(w: World, weight: float) -> None:
    r"""Three inequalities, and their sum. The second is an equality at data 1 + λ times too narrow."""
    data, I_p = kl_divergence(w.p_x, w.q_x), information(w.p, w)
    assert w.kl_s() >= data
    assert weight * I_p - data <= most_information(w, weight)
    wide = replace(w, m=w.b, S=w.p_x.covariance_matrix / (1 + weight))
    same(weight * I_p - kl_divergence(wide.p_x, wide.q_x), most_information(wide, weight))
    noise = w.p_x_given_z.at(torch.zeros_like(w.c)).entropy()
    log_p, log_q = len(w.m) / 2 - noise, I_p + w.C_z  # the largest that both reconstructions can be
    assert w.expected_log_decoder(w.q) <= log_p and w.expected_log_encoder(w.p) <= log_q
    summed = w.C_x + w.C_z + weight * (log_p + w.C_z) + most_information(w, weight)
    same(summed, upper_bound(w, weight))
    refuses(summed, upper_bound(w, 2 * weight), summed - upper_bound(w, weight))


@worlds(weight=WEIGHTS, stretch=st.floats(0.01, 30), width=st.floats(-12, 3))
def test_S28_is_bounded_when_the_decoder_keeps_its_width(w: World, weight: float, stretch: float, width: float) -> None:
    r"""For every gain and every encoder: the bound depends on the data and the decoder's variances alone."""
    sharp = copying(w, 1e-6)
    for moved in (w, replace(w, W=stretch * w.W, V=w.V / stretch, t=w.t + width), replace(sharp, s=w.s)):
        same(upper_bound(moved, weight), upper_bound(w, weight))
        assert moved.L_xz(weight) <= upper_bound(w, weight)
    same(upper_bound(w, 0.0), w.C_x + w.C_z)
    refuses(upper_bound(sharp, weight), upper_bound(w, weight))


@worlds(weight=WEIGHTS, shared=st.floats(-12, 2), stretch=st.floats(0.03, 10))
def test_S28_is_bounded_when_fewer_codes_share_one_width(
    w: World, weight: float, shared: float, stretch: float
) -> None:
    r"""One learnt variance v for all of x cannot vanish: at least `left` of the data's variance stays unexplained,
    which costs λ left / 2v, and upper_bound(v) − λ left / 2v is largest at v = left / 2d."""
    if len(w.c) >= len(w.m):
        w = World.random(len(w.m) + len(w.c), len(w.c), seed=len(w.m))
    d, k = len(w.m), len(w.c)
    left = torch.linalg.eigvalsh(w.S)[: d - k].sum()

    def bound(v: Tensor) -> Tensor:
        return upper_bound(replace(w, s=v.log().expand(d)), weight) - weight * left / (2 * v)

    v, best = torch.tensor(shared, dtype=torch.float64).exp(), (left / (2 * d)).requires_grad_()
    same(*torch.autograd.grad(bound(best), best), torch.zeros_like(best))
    assert bound(v) <= bound(best) + 1e-9
    for moved in (w, replace(w, W=stretch * w.W, V=w.V / stretch)):
        assert x_cycle(moved).sum() >= left - 1e-9
        assert replace(moved, s=v.log().expand(d)).L_xz(weight) <= bound(v)


@worlds(w=st.builds(matched, st.just(1), st.just(1), SEEDS), weight=WEIGHTS)
def test_S29_game_narrows_without_end_when_all_variances_are_learnt(w: World, weight: float) -> None:
    r"""At matched numbers x, z of correlation ρ both log-variances fall at the rate ½ λ ρ² under S29 and S28 alike."""
    w = w.with_grad()
    rho = 1 - w.t.exp()  # ρ²
    fall = (-0.5 * weight * rho).detach()
    game = w.ell(w.frozen()) + weight * reconstructions(w)
    for objective in (game, w.L_xz(weight)):
        same(gradient(objective, w, ("s",)), fall)
        same(gradient(objective, w, ("t",)), fall)
        refuses(gradient(objective, w, ("s",)), -fall, 2 * fall)


# The same equations in the grid world -------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_S28_tables_agree_with_the_linear_gaussian_world(seed: int) -> None:
    w = matched(1, 1, seed)
    w = replace(w, V=0.8 * w.V, t=w.t + 0.3)  # not far from agreement: a narrow grid cuts nothing off a conditional

    def reach(a: MultivariateNormal, b: MultivariateNormal) -> Tensor:
        ends = [float(d.mean + k * d.stddev) for d in (a, b) for k in (-9, 9)]
        return torch.linspace(min(ends), max(ends), 601, dtype=torch.float64)

    x, z = reach(w.q_x, w.p_x), reach(w.q_z, w.p_z)
    xz = torch.cartesian_prod(x, z)
    j = Joints(x, z, *(d.log_prob(xz).log_softmax(0).reshape(len(x), len(z)) for d in (w.q, w.p)))
    same(j.data_fit(), reconstructions(w))
    for weight in (0.0, 0.3, 2.0):
        same(j.L_xz(weight), w.L_xz(weight))
    refuses(j.L_xz(0.3), w.L_xz(), w.L_xz(0.6), w.L_xz() + 0.3 * w.expected_log_decoder(w.q))
