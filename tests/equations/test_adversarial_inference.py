r"""Adversarially learned inference: S18 and A3, S19, and how both are related to S14.

Expectations are exact three times over:

* a *table*: two distributions over k cells with free logits, every expectation a finite sum;
* a *plane* world: x and z are numbers, expectations are sums over `exact.lattice`;
* a *parallel* world: x and z of 1 to 8 dimensions, joints that differ by a shift only. Then f* is linear, and a line
  of nodes along its gradient with cubature across it integrates every function of f* times a quadratic.

`frozen` means: f* computed once and then held fixed, as when the players move. `live` means: f* moves with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import (
    DIMS,
    PROOF,
    SEEDS,
    about,
    correlated,
    disproved,
    gradient,
    matched,
    normal,
    number,
    proved,
    refuses,
    same,
    scores,
)
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import logsigmoid

from svae_lib.exact import PHI, THETA, World, cubature, lattice
from svae_lib.objectives import non_saturating, saturating, symmetric

Objective = Callable[[Tensor, Tensor], Tensor]
LOG2 = math.log(2)


def each(objective: Objective, f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""The objective of every pair of scores as a batch of one: the integrand of its expectation."""
    return torch.vmap(objective)(f_q.reshape(-1, 1), f_p.reshape(-1, 1)).reshape(f_q.shape)


# Tables --------------------------------------------------------------------------------------------


class Table:
    r"""q_φ and p_θ over k cells; the parameters are the logits."""

    def __init__(self, k: int, seed: int) -> None:
        self.phi, self.theta = (1.5 * normal(2, k, seed=seed)).requires_grad_()
        self.log_q, self.log_p = self.phi.log_softmax(0), self.theta.log_softmax(0)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()
        self.m = (self.p + self.q) / 2
        self.live = self.log_p - self.log_q  # f*
        self.frozen = self.live.detach()

    def mean(self, objective: Objective, f: Tensor) -> Tensor:
        f_q, f_p = torch.broadcast_tensors(f[:, None], f)
        return self.q @ each(objective, f_q, f_p) @ self.p

    def slopes(self, value: Tensor) -> tuple[Tensor, Tensor]:
        r"""The gradient in θ and in φ."""
        return torch.autograd.grad(value, (self.theta, self.phi), retain_graph=True, materialize_grads=True)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum()


def js(t: Table) -> Tensor:
    return (kl(t.q, t.m) + kl(t.p, t.m)) / 2


tables = given(t=st.builds(Table, k=st.integers(2, 8), seed=SEEDS))


@PROOF
@tables
def test_S18_value_of_the_game_is_twice_js_minus_2_log_2(t: Table) -> None:
    best = -t.mean(saturating, t.live)  # max over ψ of g
    same(best, 2 * js(t) - 2 * LOG2)
    same(best, (t.p * t.live.sigmoid().log()).sum() + (t.q * (1 - t.live.sigmoid()).log()).sum())  # as printed
    refuses(best, 2 * js(t), js(t) - LOG2, 2 * LOG2 - 2 * js(t), -t.mean(saturating, -t.live))
    assert -2 * LOG2 < best < 0
    assert -t.mean(saturating, t.frozen + normal(len(t.q), seed=0)) < best


@PROOF
@given(k=st.integers(2, 8), seed=SEEDS)
def test_S18_equilibrium_value_is_minus_2_log_2(k: int, seed: int) -> None:
    r"""Equal joints: f* = 0, no critic does better than guessing, and no player has anything to gain."""
    t = Table(k, seed)
    t.q, t.log_q = t.p, t.log_p
    same(-t.mean(saturating, torch.zeros_like(t.frozen)), number(-2 * LOG2))
    f = normal(k, seed=seed)
    assert -t.mean(saturating, f) < -2 * LOG2
    refuses(-t.mean(saturating, f), number(-2 * LOG2))


@PROOF
@tables
def test_A3_is_S18_with_the_labels_exchanged(t: Table) -> None:
    r"""A3 as printed, E_q log σ(f) + E_p log(1 − σ(f)), has its maximum at f_A3* = −f_S18*, with the same value."""

    def printed(f: Tensor) -> Tensor:
        return (t.q * f.sigmoid().log()).sum() + (t.p * (1 - f.sigmoid()).log()).sum()

    f = (-t.frozen).requires_grad_()
    (slope,) = torch.autograd.grad(printed(f), f)
    same(slope, torch.zeros_like(slope))
    same(printed(f), 2 * js(t) - 2 * LOG2)
    anywhere = normal(len(t.q), seed=1)
    same(printed(anywhere), -t.mean(saturating, -anywhere))
    refuses(printed(anywhere), -t.mean(saturating, anywhere))
    (slope,) = torch.autograd.grad(printed(-f), f)
    refuses(slope, torch.zeros_like(slope))


@PROOF
@given(n=st.integers(1, 9), scale=st.floats(0.1, 30), seed=SEEDS)
def test_S14_S18_S19_the_symmetric_objective_is_the_sum_of_both(n: int, scale: float, seed: int) -> None:
    r"""For every critic, optimal or not: log σ(f) − log σ(−f) = f."""
    f_q, f_p = scale * normal(2, n, seed=seed)
    both = saturating(f_q, f_p) + non_saturating(f_q, f_p)
    same(both, symmetric(f_q, f_p))
    refuses(both, -symmetric(f_q, f_p), saturating(f_q, f_p), saturating(f_q, f_p) - non_saturating(f_q, f_p))


@PROOF
@tables
def test_S19_value_at_the_optimal_critic(t: Table) -> None:
    value = t.mean(non_saturating, t.live)
    kl_s = kl(t.q, t.p) + kl(t.p, t.q)
    same(value, (t.q * (t.p / (t.p + t.q)).log()).sum() + (t.p * (t.q / (t.p + t.q)).log()).sum())
    same(value, 2 * js(t) - kl_s - 2 * LOG2)
    refuses(value, -kl_s, -t.mean(saturating, t.live), 2 * js(t) - 2 * LOG2)


@PROOF
@tables
def test_S18_freezing_the_critic_gives_the_gradient_of_js(t: Table) -> None:
    r"""The envelope theorem: f* maximises g, so its own motion does not count. It does not maximise S14 or S19."""
    frozen, live = t.mean(saturating, t.frozen), t.mean(saturating, t.live)
    for a, b, c in zip(t.slopes(frozen), t.slopes(live), t.slopes(-2 * js(t)), strict=True):
        same(a, c)
        same(b, c)
        refuses(c, -c, c / 2, torch.zeros_like(c))
    for other in (symmetric, non_saturating):
        pairs = zip(t.slopes(t.mean(other, t.frozen)), t.slopes(t.mean(other, t.live)), strict=True)
        for a, b in pairs:
            refuses(a, b)


@PROOF
@tables
def test_S19_freezing_the_critic_gives_kl_from_the_mixture(t: Table) -> None:
    r"""θ descends 2 KL(M ‖ q) = KL(p ‖ q) − 2 JS, φ descends 2 KL(M ‖ p) = KL(q ‖ p) − 2 JS."""
    theta, phi = t.slopes(t.mean(non_saturating, t.frozen))
    same(theta, t.slopes(-2 * kl(t.m, t.q))[0])
    same(theta, t.slopes(-kl(t.p, t.q) + 2 * js(t))[0])
    same(phi, t.slopes(-2 * kl(t.m, t.p))[1])
    same(phi, t.slopes(-kl(t.q, t.p) + 2 * js(t))[1])
    same(2 * kl(t.m, t.q), kl(t.p, t.q) - 2 * js(t))
    refuses(theta, t.slopes(-2 * kl(t.m, t.p))[0], t.slopes(-2 * js(t))[0], t.slopes(-kl(t.p, t.q))[0])
    refuses(phi, t.slopes(-2 * kl(t.m, t.q))[1], t.slopes(-2 * js(t))[1], t.slopes(-kl(t.q, t.p))[1])


@PROOF
@tables
def test_S18_pushes_where_the_critic_is_informed(t: Table) -> None:
    r"""Both players' weights in S18 integrate pq/(p + q), which is also what an error of the critic costs it in S10."""
    overlap = t.p * t.q / (t.p + t.q)
    f = t.frozen.clone().requires_grad_()
    curvature = torch.autograd.functional.hessian(lambda f: -t.mean(saturating, f), f).diagonal()
    same(t.p * (-f).sigmoid(), overlap)
    same(t.q * f.sigmoid(), overlap)
    same(-curvature, overlap)
    assert overlap.sum() <= 0.5 * (t.p * t.q).sqrt().sum()
    refuses(overlap, t.p * f.sigmoid(), t.q * (-f).sigmoid())


# Symbols: the same statements at one cell, for all p and q ---------------------------------------------

p, q, r = sympy.symbols("p q r", positive=True)
says_p, says_q = sympy.log(p / (p + q)), sympy.log(q / (p + q))  # log σ(f*) and log σ(−f*)
js2 = p * sympy.log(2 * p / (p + q)) + q * sympy.log(2 * q / (p + q))  # integrand of 2 JS
km2 = (p + q) * sympy.log((p + q) / (2 * q))  # integrand of 2 KL(M ‖ q)


def zero(expression: sympy.Expr) -> sympy.Expr:
    return sympy.expand_log(expression, force=True)


def test_S18_S19_symbolic_identities() -> None:
    r"""A density's slope only matters up to a constant, since ∫ ∇p = 0."""
    f = sympy.log(p / q)
    proved(zero(sympy.log(1 / (1 + sympy.exp(-f))) - says_p))
    proved(zero(says_p - says_q - f))  # S18 + S19 = S14
    proved(zero(sympy.diff(js2, p) - says_p - sympy.log(2)))  # S18, θ
    proved(zero(sympy.diff(js2, q) - says_q - sympy.log(2)))  # S18, φ
    proved(zero(sympy.diff(km2, p) + says_q + sympy.log(2) - 1))  # S19, θ
    proved(zero(p * f - js2 - km2))  # KL(p ‖ q) − 2 JS = 2 KL(M ‖ q)
    disproved(zero(sympy.diff(js2, p) + says_q + sympy.log(2) - 1))
    disproved(zero(p * f - js2 / 2 - km2))


def test_S14_S18_S19_generators_and_their_curvature_where_the_joints_agree() -> None:
    r"""With r = p/q the θ-player descends ∫ q h(r), h′(r) = what the objective charges a decoder pair; all h″ > 0."""
    charges = {"S14": sympy.log(r), "S18": sympy.log(r / (1 + r)), "S19": sympy.log(1 + r)}
    curvature = {name: sympy.simplify(sympy.diff(h, r)) for name, h in charges.items()}
    proved(curvature["S14"] - 1 / r)
    proved(curvature["S18"] - 1 / (r * (1 + r)))
    proved(curvature["S19"] - 1 / (1 + r))
    at_one = [curvature[name].subs(r, 1) for name in ("S14", "S18", "S19")]
    assert at_one == [1, sympy.Rational(1, 2), sympy.Rational(1, 2)]


# Worlds: gradients through the draws ---------------------------------------------------------------------

Nodes = tuple[Tensor, Tensor, Tensor]  # noise of encoder pairs, noise of decoder pairs, weights


def mean(objective: Objective, w: World, critic: World, nodes: Nodes) -> Tensor:
    noise_q, noise_p, weights = nodes
    f_q, f_p = critic.log_ratio(*w.encoder_pairs(noise_q)), critic.log_ratio(*w.decoder_pairs(noise_p))
    return weights @ each(objective, f_q, f_p)


def divergences(w: World, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
    r"""2 JS, 2 KL(M ‖ q) and 2 KL(M ‖ p) from the densities, without a critic."""
    noise_q, noise_p, weights = nodes
    log_q, log_p, log_m = [], [], []
    for pairs in (w.encoder_pairs(noise_q), w.decoder_pairs(noise_p)):
        u = torch.cat(pairs, 1)
        log_q.append(w.q.log_prob(u))
        log_p.append(w.p.log_prob(u))
        log_m.append(torch.logaddexp(log_p[-1], log_q[-1]) - LOG2)
    js2 = weights @ (log_q[0] - log_m[0] + log_p[1] - log_m[1])
    from_q = weights @ (log_m[0] - log_q[0] + log_m[1] - log_q[1])
    from_p = weights @ (log_m[0] - log_p[0] + log_m[1] - log_p[1])
    return js2, from_q, from_p


def plane(seed: int) -> tuple[World, Nodes]:
    noise, weights = lattice(0.05)  # fine enough for the steepest f*
    return World.random(1, 1, seed).with_grad(), (noise, noise, weights)


def shifted(w: World, distance: float, seed: int) -> World:
    r"""Both offsets moved at random until the means of the joints are `distance` standard deviations apart."""
    b, c = normal(len(w.b), seed=seed), normal(len(w.c), seed=seed + 1)
    unit = kl_divergence(*(getattr(replace(w, b=w.b + b, c=w.c + c), joint) for joint in "pq"))
    size = distance / (2 * unit).sqrt()  # KL = distance²/2
    return replace(w, b=w.b + size * b, c=w.c + size * c)


def pencil(pairs: Callable[[Tensor], tuple[Tensor, Tensor]], critic: World) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights that integrate (any function of a linear f*) × (a quadratic) exactly."""
    dim = len(critic.m) + len(critic.c)
    eye = torch.eye(dim, dtype=torch.float64)
    f = critic.log_ratio(*pairs(torch.cat([eye, 0 * eye])))
    frame, _ = torch.linalg.qr(torch.cat([(f[:dim] - f[dim:])[:, None], eye], 1))
    line = torch.arange(-8, 8.05, 0.1, dtype=torch.float64)
    across = cubature(dim - 1)
    nodes = torch.cat([line.repeat_interleave(len(across))[:, None], across.repeat(len(line), 1)], 1)
    weights = torch.exp(-line.square() / 2) * 0.1 / math.sqrt(2 * math.pi)
    return nodes @ frame.mT, weights.repeat_interleave(len(across)) / len(across)


def parallel(x_dim: int, z_dim: int, seed: int, distance: float) -> tuple[World, Nodes]:
    w = shifted(matched(x_dim, z_dim, seed), distance, seed)
    (noise_q, weights), (noise_p, _) = pencil(w.encoder_pairs, w), pencil(w.decoder_pairs, w)
    return w.with_grad(), (noise_q, noise_p, weights)


FEWER = settings(PROOF, max_examples=12)
parallels = given(x_dim=DIMS, z_dim=DIMS, seed=SEEDS, distance=st.floats(0.3, 6))


def check_frozen_gradients(w: World, nodes: Nodes) -> None:
    r"""Each player's gradient against the divergence that it is claimed to follow, and against the others."""
    still = w.frozen()
    js2, from_q, from_p = divergences(w, nodes)
    kl_pq, kl_qp = kl_divergence(w.p, w.q), kl_divergence(w.q, w.p)
    same(js2 + from_q, kl_pq)
    same(js2 + from_p, kl_qp)
    same(-mean(saturating, w, w, nodes), js2 - 2 * LOG2)
    same(mean(non_saturating, w, w, nodes), js2 - w.kl_s() - 2 * LOG2)
    for names, mixture, own in ((THETA, from_q, kl_pq), (PHI, from_p, kl_qp)):
        s14, s18, s19 = (
            gradient(mean(objective, w, still, nodes), w, names)
            for objective in (symmetric, saturating, non_saturating)
        )
        same(s14, gradient(-own, w, names))
        same(s18, gradient(-js2, w, names))
        same(s18, gradient(mean(saturating, w, w, nodes), w, names))  # live: the same
        same(s19, gradient(-mixture, w, names))
        same(s14, s18 + s19)
        refuses(s18, s14, s19, -s18, s14 / 2)
        refuses(s19, s14, gradient(mean(non_saturating, w, w, nodes), w, names))
        refuses(s14, gradient(mean(symmetric, w, w, nodes), w, names))


@pytest.mark.parametrize("seed", range(4))
def test_S14_S18_S19_which_divergence_each_player_descends_in_the_plane(seed: int) -> None:
    check_frozen_gradients(*plane(seed))


@FEWER
@parallels
def test_S14_S18_S19_which_divergence_each_player_descends(x_dim: int, z_dim: int, seed: int, distance: float) -> None:
    check_frozen_gradients(*parallel(x_dim, z_dim, seed, distance))


@FEWER
@parallels
def test_S18_S19_erratum_maximising_S19_is_not_minimising_S18(
    x_dim: int, z_dim: int, seed: int, distance: float
) -> None:
    r"""Paper S says that maximising S19 is the minimisation in S18, but value and gradient differ.

    What holds: S14 is the sum of both, and both are flat where the joints agree.
    """
    w, nodes = parallel(x_dim, z_dim, seed, distance)
    s18, s19 = (mean(objective, w, w.frozen(), nodes) for objective in (saturating, non_saturating))
    refuses(s19, s18, -s18)
    refuses(gradient(s19, w), gradient(s18, w), -gradient(s18, w))
    same(s18 + s19, w.ell(w.frozen()))

    home = matched(x_dim, z_dim, seed).with_grad()
    f_q, f_p = scores(home, home.frozen())
    same(f_q, torch.zeros_like(f_q))
    for objective, value in ((saturating, 2 * LOG2), (non_saturating, -2 * LOG2), (symmetric, 0.0)):
        reached = objective(f_q, f_p)
        same(reached, number(value))
        found = gradient(reached, home)
        same(found, torch.zeros_like(found))


@FEWER
@given(x_dim=DIMS, z_dim=DIMS, seed=SEEDS)
def test_S14_S18_S19_near_agreement_all_gradients_are_parallel(x_dim: int, z_dim: int, seed: int) -> None:
    r"""h″(1) = 1, ½, ½: to first order in the distance S18 and S19 are half of S14 and equal."""
    w, nodes = parallel(x_dim, z_dim, seed, distance=1e-4)
    s14, s18, s19 = (
        gradient(mean(objective, w, w.frozen(), nodes), w) for objective in (symmetric, saturating, non_saturating)
    )
    size = s14.norm()
    for other in (s18, s19):
        about((other - s14 / 2).norm() / size, 0.0, 1e-3)  # what is left out is of the order of the distance
        assert (other - s14).norm() > 0.4 * size


# Saturation ----------------------------------------------------------------------------------------------


@FEWER
@parallels
def test_S18_saturates_exponentially_S19_and_S14_do_not(x_dim: int, z_dim: int, seed: int, distance: float) -> None:
    r"""Joints d apart: f* ~ N(±d²/2, d²), every gradient is a weight times that of d²/2, and S18's is ≤ ½ e^(−d²/8)."""
    w, nodes = parallel(x_dim, z_dim, seed, distance)
    d = number(distance)
    same(kl_divergence(w.p, w.q), d**2 / 2)
    t = torch.arange(-8, 8.05, 0.1, dtype=torch.float64)
    f_p, density = d**2 / 2 + d * t, torch.exp(-0.5 * t.square()) * 0.1 / math.sqrt(2 * math.pi)
    free = {"S14": number(1.0), "S18": density @ (-f_p).sigmoid(), "S19": density @ f_p.sigmoid()}
    assert free["S18"] <= 0.5 * torch.exp(-(d**2) / 8) and free["S19"] >= 0.5
    offsets = ("b", "c")
    downhill = gradient(-kl_divergence(w.p, w.q), w, offsets)  # in the offsets both directions of KL agree
    for objective, weight in zip((symmetric, saturating, non_saturating), free.values(), strict=True):
        followed = gradient(mean(objective, w, w.frozen(), nodes), w, offsets)
        same(followed, weight * downhill)
        refuses(followed, (1.01 * weight) * downhill)


@PROOF
@given(f=st.floats(-30, 30))
def test_S14_S18_S19_weight_of_one_pair(f: float) -> None:
    r"""How hard a pair is pushed along ∇f: 1, σ(f) on one side, σ(−f) on the other, never the same for S18 and S19."""
    weights = {}
    for name, objective in (("S14", symmetric), ("S18", saturating), ("S19", non_saturating)):
        f_q, f_p = (torch.tensor([f], dtype=torch.float64, requires_grad=True) for _ in "qp")
        weights[name] = torch.cat(torch.autograd.grad(objective(f_q, f_p), (f_q, f_p)))
    one, up = number(1.0), torch.tensor(f, dtype=torch.float64).sigmoid()
    same(weights["S14"], torch.stack([one, -one]))
    same(weights["S18"], torch.stack([up, up - 1]))
    same(weights["S19"], torch.stack([1 - up, -up]))
    if abs(f) > 1e-3:
        refuses(weights["S18"], weights["S19"], weights["S14"])


# What none of them sees ----------------------------------------------------------------------------------


@PROOF
@given(rho=st.floats(-0.99, 0.99))
def test_S14_S18_S19_say_nothing_about_reconstruction(rho: float) -> None:
    r"""Every coupling of q(x) and p(z) is an equilibrium, with any reconstruction from useless to perfect."""
    w = correlated(rho).with_grad()
    same(w.kl_s(), number(0.0))
    f = scores(w, w.frozen())
    for objective, value in ((saturating, 2 * LOG2), (non_saturating, -2 * LOG2), (symmetric, 0.0)):
        same(objective(*f), number(value))
        flat = gradient(objective(*f), w)
        same(flat, torch.zeros_like(flat))
    same(w.L_x(), w.C_x)  # the evidence lower bound cannot tell them apart either
    log_likelihood = w.expected_log_decoder(w.q)
    same(log_likelihood, number(-0.5 * math.log(2 * math.pi * math.e * (1 - rho**2))))
    if abs(rho) > 0.1:
        refuses(log_likelihood, correlated(0.0).expected_log_decoder(correlated(0.0).q))


def test_S18_two_encoders_equal_in_js_unequal_in_reconstruction() -> None:
    r"""One decoder; an encoder that ignores x, and a narrow one that does not, found by bisection at the same JS."""
    noise, weights = lattice()
    w, nodes = correlated(0.8), (noise, noise, weights)

    def js2(v: World) -> Tensor:
        return divergences(v, nodes)[0]

    blind = replace(w, V=0 * w.V, t=0 * w.t)
    low, high = -6.0, float(w.t)
    for _ in range(35):
        middle = (low + high) / 2
        low, high = (middle, high) if js2(replace(w, t=number(middle)[None])) > js2(blind) else (low, middle)
    sharp = replace(w, t=number(high)[None])
    same(js2(sharp), js2(blind))
    better = sharp.expected_log_decoder(sharp.q) - blind.expected_log_decoder(blind.q)
    assert better > 1  # nats per datum
    refuses(js2(sharp), js2(w), js2(replace(w, t=number(high - 0.1)[None])))


def test_the_lattice_integrates_what_it_should() -> None:
    noise, weights = lattice()
    same(weights.sum(), number(1.0))
    same(weights @ noise, torch.zeros(2).double())
    same(noise.mT @ (weights[:, None] * noise), torch.eye(2).double())
    same(weights @ noise[:, 0].exp(), number(0.5).exp())
    same(weights @ logsigmoid(2 * noise[:, 0]) - weights @ logsigmoid(-2 * noise[:, 0]), number(0.0))
    refuses(lattice(2.0)[1] @ lattice(2.0)[0][:, 0].square(), number(1.0))
