r"""S25: each class of critics has its own maximum and maximiser, and both are in `svae_lib.ipm`.

A *table* has two distributions on the same few points, so expectations are sums. A *batch* is a table whose
masses are counts, every point repeated as often as it counts: what the training functions see, without noise.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from proof import PROOF, SEEDS, disproved, estimates, normal, proved, refuses, refuses_estimates, same, worlds
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import vmap

from svae_lib import grid, ipm, objectives
from svae_lib.exact import cubature


class Table:
    r"""Random points x, in increasing order, with log-masses log_q, log_p and f* = log p − log q."""

    def __init__(self, size: int, seed: int) -> None:
        self.x, log_q, log_p = normal(3, size, seed=seed)
        self.x = self.x.sort().values
        self.log_q, self.log_p = (2 * log_q).log_softmax(0), (2 * log_p).log_softmax(0)
        self.q, self.p, self.f_star = self.log_q.exp(), self.log_p.exp(), self.log_p - self.log_q
        self.both = self.log_q, self.log_p

    def ipm(self, f: Tensor) -> Tensor:
        return (self.p - self.q) @ f

    def arithmetic(self) -> Tensor:
        return 0.5 * (self.q + self.p)


def tables(test):
    return PROOF(given(t=st.builds(Table, st.integers(2, 12), SEEDS), seed=SEEDS)(test))


def batches(seed: int, size: int = 24, features: int = 3) -> tuple[Tensor, Tensor]:
    x_q, x_p = normal(2, size, features, seed=seed)
    return x_q, 1.5 * x_p + 0.5


# The equation, its sign, and S14 as a member --------------------------------------------------------


@PROOF
@given(seed=SEEDS)
def test_S25_prints_minus_the_critic_of_the_book(seed):
    f_q, f_p = normal(2, 9, seed=seed)
    same(objectives.ipm(f_q, f_p), (-f_q).mean() - (-f_p).mean())  # S25 as printed, of the critic −f
    refuses(objectives.ipm(f_q, f_p), objectives.symmetric(f_q, f_p), objectives.ipm(f_p, f_q))


@worlds
def test_S14_S25_the_log_ratio_pays_the_symmetric_divergence(w):
    eps = cubature(len(w.m) + len(w.c))
    at = [d.mean + eps @ torch.linalg.cholesky(d.covariance_matrix).mT for d in (w.q, w.p)]
    f_q, f_p = (w.log_ratio(xz[:, w.x], xz[:, w.z]) for xz in at)
    same(objectives.ipm(f_q, f_p), w.kl_s())
    refuses(objectives.ipm(f_q, f_p), -w.kl_s(), 0.5 * w.kl_s(), kl_divergence(w.q, w.p))


@tables
def test_S23_S25_the_symmetric_divergence_is_a_member_of_the_family(t, seed):
    r"""F = {f : Σ w f² ≤ 1} with w the logarithmic mean of q and p: the maximum is √KL_s, at f ∝ f*."""
    w = ipm.logarithmic_mean(*t.both)
    f = ipm.ball_critic(w, *t.both)
    kl_s = grid.kl(*t.both) + grid.kl(t.log_p, t.log_q)
    same(t.ipm(f).square(), kl_s)
    same(f, t.f_star / kl_s.sqrt())
    same(w @ f.square(), torch.ones(()).double())  # on the boundary of F
    other = f + normal(len(f), seed=seed)
    assert t.ipm(other / (w @ other.square()).sqrt()) < t.ipm(f)
    refuses(f, t.f_star, -t.f_star / kl_s.sqrt(), ipm.ball_critic(t.arithmetic(), *t.both))
    geometric, arithmetic = (t.q * t.p).sqrt(), t.arithmetic()
    assert (geometric <= w * (1 + 1e-12)).all() and (w <= arithmetic * (1 + 1e-12)).all()
    same(ipm.logarithmic_mean(t.log_q, t.log_q), t.q)
    nearby = t.log_q + 1e-9
    same(ipm.logarithmic_mean(t.log_q, nearby), t.q)


def test_S23_S25_symbolically():
    p, q = sympy.symbols("p q", positive=True)
    ratio = sympy.log(p) - sympy.log(q)
    mean = (p - q) / ratio
    proved((p - q) ** 2 / mean - (p - q) * ratio)  # the square of the maximum, at one point
    proved((p - q) / mean - ratio)  # the maximiser
    disproved((p - q) ** 2 / ((p + q) / 2) - (p - q) * ratio)


@tables
def test_S25_frozen_critics_give_the_gradient_when_F_does_not_move_with_the_model(t, seed):
    r"""The slope in the decoder's masses with f held fixed is that of the maximum, unless F depends on p."""
    logits = t.log_p.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    gram = ipm.gaussian_kernel(t.x[:, None], t.x[:, None])
    flat = torch.ones_like(t.x)

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def pair(f: Tensor) -> tuple[Tensor, Tensor]:
        gap = log_p.exp() - t.q
        return slope(gap @ f.detach()), slope(gap @ f)

    for f in (
        ipm.lipschitz_critic(t.x, t.log_q, log_p),
        ipm.kernel_critic(gram, t.log_q, log_p),
        ipm.ball_critic(flat, t.log_q, log_p),
        (log_p - t.log_q).sign(),
    ):
        same(*pair(f))
    arithmetic = 0.5 * (t.q + log_p.exp())
    for w in (arithmetic, ipm.logarithmic_mean(t.log_q, log_p)):
        refuses(*pair(ipm.ball_critic(w, t.log_q, log_p)))
    one_way, both_ways = pair(log_p - t.log_q)
    same(one_way, slope(grid.kl(log_p, t.log_q)))
    refuses(one_way, both_ways)


# Lipschitz functions ----------------------------------------------------------------------------------


@tables
def test_S25_wasserstein_critic_and_value_on_a_table(t, seed):
    f = ipm.lipschitz_critic(t.x, *t.both)
    area = ((t.q - t.p).cumsum(0)[:-1].abs() * t.x.diff()).sum()
    same(t.ipm(f), area)
    same(t.ipm(f), torch.tensor(wasserstein_distance(t.x, t.x, t.q, t.p)).double())
    same(f.diff().abs(), t.x.diff())  # as steep as F allows, everywhere
    turned = t.x.diff() * normal(len(f) - 1, seed=seed).tanh()
    assert t.ipm(torch.cat([t.x.new_zeros(1), turned.cumsum(0)])) < t.ipm(f)
    refuses(t.ipm(f), t.ipm(-f), t.ipm(t.f_star), (t.p - t.q).abs().sum())


@PROOF
@given(seed=SEEDS, size=st.integers(1, 40))
def test_S25_wasserstein_of_samples_is_that_of_their_table(seed, size):
    x_q, x_p = normal(2, size, seed=seed)
    x_p = 2 * x_p + 1
    points, at = torch.cat([x_q, x_p]).sort()
    from_q = (at < size).double()
    gap = ((1 - from_q) - from_q) / size
    f = ipm.lipschitz_critic(points, (from_q / size).log(), ((1 - from_q) / size).log())
    same(ipm.wasserstein(x_q, x_p), gap @ f)
    same(ipm.wasserstein(100 * x_q, 100 * x_p), 100 * ipm.wasserstein(x_q, x_p))  # metres to centimetres
    same(ipm.wasserstein(x_q, x_q + 3), torch.tensor(3.0).double())
    refuses(ipm.wasserstein(x_q, x_p), (x_q - x_p).abs().mean() + 1e-3, (x_q.mean() - x_p.mean()).abs() - 1e-3)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_S25_clipping_a_linear_critic_gives_the_clipped_sum_of_mean_differences(dim):
    x_q, x_p = batches(seed=dim, features=dim)
    critic, c = nn.Linear(dim, 1, bias=False).double(), 0.3
    for _ in range(60):
        critic.zero_grad()
        value = objectives.ipm(critic(x_q).squeeze(1), critic(x_p).squeeze(1))
        value.backward()
        critic.weight.data += 0.5 * critic.weight.grad
        ipm.clip_weights(critic, c)
    gap = x_p.mean(0) - x_q.mean(0)
    same(critic.weight[0], c * gap.sign())
    same(value, c * gap.abs().sum())
    refuses(value, gap.norm(), gap.abs().sum())


@worlds(seed=SEEDS)
def test_S25_gradient_penalty_of_known_slopes(w, seed):
    r"""f = a·(x, z) has slope ‖a‖ everywhere; f = ½‖(x, z)‖² has slope ‖û‖ at û."""
    x_dim, z_dim = len(w.m), len(w.c)
    a = normal(x_dim + z_dim, seed=seed).requires_grad_()
    q, p = [normal(2, 7, d, seed=seed + d).unbind(0) for d in (x_dim, z_dim)], None
    q, p = [pair[0] for pair in q], [pair[1] for pair in q]
    mix = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    penalty = ipm.gradient_penalty(lambda x, z: torch.cat([x, z], 1) @ a, q, p, mix)
    same(penalty, (a.norm() - 1).square())
    same(torch.autograd.grad(penalty, a)[0], 2 * (1 - 1 / a.norm()) * a)  # a gradient reaches the critic
    u = mix[:, None] * torch.cat(p, 1) + (1 - mix[:, None]) * torch.cat(q, 1)
    bowl = ipm.gradient_penalty(lambda x, z: 0.5 * (x.square().sum(1) + z.square().sum(1)), q, p, mix)
    same(bowl, (u.norm(dim=1) - 1).square().mean())
    swapped = ipm.gradient_penalty(lambda x, z: 0.5 * (x.square().sum(1) + z.square().sum(1)), p, q, mix)
    refuses(bowl, swapped, (u.norm(dim=1) - 1).mean().square(), (u.square().sum(1) - 1).square().mean())


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_S25_penalised_linear_critic_is_steeper_than_one(dim):
    r"""max a·δ − λ(‖a‖ − 1)²: the slope is 1 + ‖δ‖/2λ, so E_p f − E_q f exceeds W₁ = ‖δ‖ of a translation."""
    x_q, _ = batches(seed=dim, features=dim)
    gap, penalty = normal(dim, seed=9), 10.0
    x_p, mix = x_q + gap, torch.rand(len(x_q), generator=torch.Generator().manual_seed(1)).double()
    best = gap / gap.norm() * (1 + gap.norm() / (2 * penalty))
    for a, stationary in ((best, True), (gap / gap.norm(), False), (-best, False)):
        a = a.clone().requires_grad_()
        value = objectives.ipm(x_q @ a, x_p @ a)
        goal = value - penalty * ipm.gradient_penalty(lambda x, a=a: x @ a, [x_q], [x_p], mix)
        slope = torch.autograd.grad(goal, a)[0]
        (same if stationary else refuses)(slope, torch.zeros_like(slope))
    same(objectives.ipm(x_q @ best, x_p @ best), gap.norm() + gap.norm().square() / (2 * penalty))


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_S25_two_sided_penalty_has_a_wrong_signed_stationary_point(dim):
    r"""−(1 − ‖δ‖/2λ) δ/‖δ‖: a maximum among numbers, a saddle in more dimensions; the one-sided penalty has none."""
    penalty, gap = 10.0, normal(dim, seed=9)
    x_q, mix = normal(24, dim, seed=3), torch.full((24,), 0.5).double()

    def goal(a: Tensor, one_sided: bool = False) -> Tensor:
        loss = ipm.gradient_penalty(lambda x: x @ a, [x_q], [x_q + gap], mix, one_sided)
        return objectives.ipm(x_q @ a, (x_q + gap) @ a) - penalty * loss

    wrong = -gap / gap.norm() * (1 - gap.norm() / (2 * penalty))
    same(torch.autograd.functional.jacobian(goal, wrong), torch.zeros_like(gap))
    same(torch.autograd.functional.jacobian(partial(goal, one_sided=True), wrong), gap)
    curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(goal, wrong))
    same(curvature[0], torch.tensor(-2 * penalty).double())
    assert (curvature[1:] > 0).all()
    right = gap / gap.norm() * (1 + gap.norm() / (2 * penalty))
    same(torch.autograd.functional.jacobian(partial(goal, one_sided=True), right), torch.zeros_like(gap))


@PROOF
@given(seed=SEEDS, dim=st.integers(1, 8))
def test_S25_one_sided_penalty_is_convex_in_the_critic(seed, dim):
    x_q, x_p = batches(seed, features=dim)
    mix = torch.rand(len(x_q), generator=torch.Generator().manual_seed(seed)).double()
    first, second = normal(2, dim, dim, seed=seed + 1)

    def penalty(critic, one_sided: bool) -> Tensor:
        return ipm.gradient_penalty(critic, [x_q], [x_p], mix, one_sided)

    def f(x: Tensor) -> Tensor:
        return (x @ first).tanh().sum(1)

    def g(x: Tensor) -> Tensor:
        return (x @ second).square().sum(1)

    chord = 0.5 * (penalty(f, True) + penalty(g, True))
    assert penalty(lambda x: 0.5 * (f(x) + g(x)), True) <= chord + 1e-12
    both = [penalty(lambda x, s=s: s * x[:, 0], False) for s in (1, -1, 0)]
    same(torch.stack(both), torch.tensor([0, 0, 1]).double())  # two-sided: between two of its members lies a worse


# Kernels ----------------------------------------------------------------------------------------------


def gaussian_mmd2(m_q: Tensor, cov_q: Tensor, m_p: Tensor, cov_p: Tensor, width: float) -> Tensor:
    r"""MMD² of two Gaussians in closed form: E k is a Gaussian integral."""

    def mean_k(gap: Tensor, cov: Tensor) -> Tensor:
        wide = width**2 * torch.eye(len(gap)).double() + cov
        return width ** len(gap) * torch.det(wide) ** -0.5 * (-0.5 * gap @ torch.linalg.solve(wide, gap)).exp()

    zero = torch.zeros_like(m_q)
    return mean_k(zero, 2 * cov_q) + mean_k(zero, 2 * cov_p) - 2 * mean_k(m_p - m_q, cov_q + cov_p)


@pytest.mark.parametrize("dim", [1, 2, 8])
@pytest.mark.parametrize("width", [0.7, 2.0])
def test_S25_mmd_is_unbiased_for_the_closed_form_of_gaussians(dim, width):
    q, p = normal(2, dim, seed=dim)
    root_q, root_p = (torch.eye(dim).double() + 0.3 * normal(2, dim, dim, seed=dim + 1)).unbind(0)
    noise_q, noise_p = normal(2, 2000, 6, dim, seed=dim + 2)
    kernel = partial(ipm.gaussian_kernel, width=width)
    pairs = q + noise_q @ root_q.mT, p + noise_p @ root_p.mT
    truth = gaussian_mmd2(q, root_q @ root_q.mT, p, root_p @ root_p.mT, width)
    estimates(vmap(lambda a, b: ipm.mmd2(a, b, kernel))(*pairs), truth)
    biased = vmap(lambda a, b: kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())(*pairs)
    refuses_estimates(biased, truth)


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_S25_energy_distance_of_gaussians(shift):
    r"""2E|q − p| − E|q − q′| − E|p − p′| with folded normals; also 2∫(P − Q)², seen on a table."""
    folded = 2 / math.pi**0.5 * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    truth = 2 * folded - 4 / math.pi**0.5
    noise_q, noise_p = normal(2, 2000, 6, 1, seed=int(shift))
    found = vmap(lambda a, b: ipm.mmd2(a, b, ipm.energy_kernel))(noise_q, noise_p + shift)
    estimates(found, truth)
    refuses_estimates(found, truth + 0.5, 0.5 * truth - 0.3)
    x = torch.linspace(-9, 12, 2101, dtype=torch.float64)
    log_q, log_p = (Normal(m, 1.0).log_prob(x).log_softmax(0) for m in (0.0, shift))
    gap, gram = log_p.exp() - log_q.exp(), ipm.energy_kernel(x[:, None], x[:, None])
    same(gap @ gram @ gap, 2 * (gap.cumsum(0).square() * (x[1] - x[0])).sum())
    assert abs(gap @ gram @ gap - truth) < 1e-4  # cells of 0.01


@tables
def test_S25_kernel_critic_is_the_best_in_the_unit_ball(t, seed):
    x = t.x[:, None]
    gram, gap = ipm.gaussian_kernel(x, x), t.p - t.q
    f = ipm.kernel_critic(gram, *t.both)
    same(t.ipm(f).square(), gap @ gram @ gap)
    coefficients = normal(len(gap), seed=seed)  # another function of norm 1: Σ c_i k(x_i, ·)
    other = gram @ coefficients / (coefficients @ gram @ coefficients).sqrt()
    assert t.ipm(other) <= t.ipm(f) * (1 + 1e-9)
    refuses(t.ipm(f).square(), t.ipm(-f), gap @ gap)


def test_S25_mmd_of_images_flattens_them():
    x_q, x_p = normal(2, 5, 1, 2, 3, seed=0)
    same(ipm.mmd2(x_q, x_p), ipm.mmd2(x_q.flatten(1), x_p.flatten(1)))


# Square-integrable functions: Fisher ----------------------------------------------------------------------


@tables
def test_S25_fisher_critic_is_a_squashed_log_ratio(t, seed):
    f = ipm.ball_critic(t.arithmetic(), *t.both)
    value = ((t.p - t.q).square() / t.arithmetic()).sum().sqrt()
    same(t.ipm(f), value)
    same(f * value, 2 * (t.f_star / 2).tanh())  # the same sign, the same order
    assert value <= 2  # reached by distributions that do not meet
    other = f + normal(len(f), seed=seed)
    assert t.ipm(other) / (t.arithmetic() @ other.square()).sqrt() < value
    refuses(t.ipm(f), value.square(), (t.p - t.q).abs().sum(), t.ipm(t.f_star))
    free = f.clone().requires_grad_()  # the Lagrangian is stationary there, at λ = half the value

    def slope(multiplier: Tensor) -> Tensor:
        moment = t.arithmetic() @ free.square()
        goal = t.ipm(free) + multiplier * (1 - moment) - 0.5 * 3.0 * (1 - moment).square()
        return torch.autograd.grad(goal, free)[0]

    same(slope(value / 2), torch.zeros_like(f))
    refuses(slope(value), torch.zeros_like(f))


@PROOF
@given(seed=SEEDS, dim=st.integers(1, 8))
def test_S25_fisher_with_a_linear_critic_is_a_mahalanobis_distance(seed, dim):
    phi_q, phi_p = batches(seed, features=dim)
    gap = phi_p.mean(0) - phi_q.mean(0)
    moment = 0.5 * (phi_q.mT @ phi_q + phi_p.mT @ phi_p) / len(phi_q)
    best = torch.linalg.solve(moment, gap)
    value = (gap @ best).sqrt()
    same(ipm.fisher(phi_q @ best, phi_p @ best), value)
    same(ipm.fisher(7 * phi_q @ best, 7 * phi_p @ best), value)  # no scale
    other = best + normal(dim, seed=seed + 1)
    assert ipm.fisher(phi_q @ other, phi_p @ other) <= value * (1 + 1e-12)
    v = (best / value).requires_grad_()
    for multiplier, stationary in ((value / 2, True), (value, False), (0.0, False)):
        goal = ipm.fisher_lagrangian(phi_q @ v, phi_p @ v, multiplier, rho=0.7)
        slope = torch.autograd.grad(goal, v)[0]
        (same if stationary else refuses)(slope, torch.zeros_like(slope))
    same(ipm.fisher_lagrangian(phi_q @ v, phi_p @ v, value / 2, rho=0.7), value)
    doubled = ipm.fisher_lagrangian(2 * phi_q @ v, 2 * phi_p @ v, value / 2, rho=0.7)  # there Ω = 4
    same(doubled, 2 * value - 3 * value / 2 - 0.5 * 0.7 * 9)
    refuses(ipm.fisher(phi_q @ best, phi_p @ best), -value, value.square(), gap.norm())


# Features and bounded functions -----------------------------------------------------------------------


@PROOF
@given(seed=SEEDS, dim=st.integers(2, 8))
def test_S25_mean_matching_is_a_dual_norm(seed, dim):
    phi_q, phi_p = batches(seed, features=dim)
    gap = phi_p.mean(0) - phi_q.mean(0)
    best = {2: gap / gap.norm(), 1: gap.sign(), math.inf: gap.sign() * (gap.abs() == gap.abs().max())}
    for order, v in best.items():
        value = ipm.mean_matching(phi_q, phi_p, order)
        same(value, objectives.ipm(phi_q @ v, phi_p @ v))
        refuses(value, -value, *(ipm.mean_matching(phi_q, phi_p, o) for o in best if o != order))


@PROOF
@given(seed=SEEDS, dim=st.integers(2, 8))
def test_S25_covariance_matching_is_a_nuclear_norm(seed, dim):
    phi_q, phi_p = batches(seed, features=dim)
    gap = phi_p.mT @ phi_p / len(phi_p) - phi_q.mT @ phi_q / len(phi_q)
    left, _, right = torch.linalg.svd(gap)
    other_left, _ = torch.linalg.qr(normal(dim, dim, seed=seed + 1))
    for k in (1, dim - 1, dim):

        def critic(phi: Tensor, u: Tensor, v: Tensor) -> Tensor:
            return ((phi @ u) * (phi @ v)).sum(1)

        value = ipm.covariance_matching(phi_q, phi_p, rank=k)
        u, v = left[:, :k], right.mT[:, :k]
        same(value, objectives.ipm(critic(phi_q, u, v), critic(phi_p, u, v)))
        worse = other_left[:, :k]
        assert objectives.ipm(critic(phi_q, worse, v), critic(phi_p, worse, v)) < value
        refuses(value, -value, torch.linalg.matrix_norm(gap, "fro") + 1e-3, gap.trace() - 1)
    same(ipm.covariance_matching(phi_q, phi_p), torch.linalg.matrix_norm(gap, "nuc"))
    centred = phi_p.mT.cov(correction=0) - phi_q.mT.cov(correction=0)
    refuses(ipm.covariance_matching(phi_q, phi_p), torch.linalg.matrix_norm(centred, "nuc"))
    phi = phi_q.clone().requires_grad_()
    assert torch.autograd.grad(ipm.covariance_matching(phi, phi_p), phi)[0].isfinite().all()


@PROOF
@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=6),
    margin=st.floats(0.1, 10),
    seed=SEEDS,
)
def test_S25_energy_margin_measures_the_total_variation(counts, margin, seed):
    n_q, n_p = torch.tensor(counts).mT
    n_q, n_p = n_q * n_p.sum(), n_p * n_q.sum()
    of_q, of_p = (torch.arange(len(n)).repeat_interleave(n) for n in (n_q, n_p))
    q, p = n_q / n_q.sum().double(), n_p / n_p.sum().double()
    tv = 0.5 * (p - q).abs().sum()
    f = margin * (p > q).double()
    energy = ipm.energy_margin(f[of_q], f[of_p], margin)
    same(energy, -margin * (1 - tv))  # 1 − TV is twice the Bayes error
    same(objectives.ipm(f[of_q], f[of_p]), margin * tv)
    other = 2 * margin * torch.rand(len(q), generator=torch.Generator().manual_seed(seed)).double()
    assert ipm.energy_margin(other[of_q], other[of_p], margin) < energy + 1e-12
    if tv > 0:
        refuses(energy, ipm.energy_margin(f[of_p], f[of_q], margin), -margin * (1 + tv), -margin * tv.new_ones(()))
        refuses(objectives.ipm(f[of_q], f[of_p]), -margin * tv, 2 * margin * tv)
