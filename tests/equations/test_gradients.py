r"""S14, S15: the field that encoder and decoder follow when the critic is frozen, and where it ends.

Four quarters make up −∇KL_s: two players, two directions. S14 has two of them and wake–sleep the others.
S14's field is the gradient of nothing, agrees with half of −∇KL_s where the joints agree, and ends at the
reverse divergence of the data where they cannot.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import (
    ONE_CODE,
    PROOF,
    SEEDS,
    WORLDS,
    agreed,
    best_encoder,
    disproved,
    estimates,
    gradient,
    proved,
    refuses,
    refuses_estimates,
    same,
    worlds,
)
from torch import Tensor
from torch.distributions import kl_divergence as KL

from svae_lib import games, grid
from svae_lib.exact import PHI, THETA, World, expected_log_prob
from svae_lib.games import field, jacobian

FEW = settings(PROOF, max_examples=10)
SMALL = st.builds(World.random, x_dim=st.integers(1, 3), z_dim=st.integers(1, 2), seed=SEEDS)


def n_theta(w: World) -> int:
    return sum(w.parameters[k].numel() for k in THETA)


def quarters(w: World) -> dict[str, Tensor]:
    r"""The negative gradients of both directions of KL in θ and in φ."""
    w = w.with_grad()
    directions = {"qp": KL(w.q, w.p), "pq": KL(w.p, w.q)}
    return {k + n: -gradient(v, w, names) for k, v in directions.items() for n, names in (("θ", THETA), ("φ", PHI))}


# Which gradient it is ------------------------------------------------------------------------------


@worlds
def test_S14_the_mean_score_is_zero_under_its_own_density_only(w: World) -> None:
    r"""E_pθ ∂_θ log p_θ = 0: the term of ∇_θ KL(p_θ ‖ q_φ) that a frozen critic hides."""
    w, fixed = w.with_grad(), w.frozen()
    for joint, names in (("p", THETA), ("q", PHI)):
        own, other = getattr(fixed, joint), getattr(fixed, "q" if joint == "p" else "p")
        score = gradient(expected_log_prob(own, getattr(w, joint)), w, names)
        same(score, torch.zeros_like(score))
        refuses(score, gradient(expected_log_prob(other, getattr(w, joint)), w, names))


@FEW
@given(w=WORLDS)
def test_S1_S5_S14_S15_each_method_takes_its_quarters(w: World) -> None:
    r"""The VAE and its mirror image take a direction each, S14 and wake–sleep a diagonal each, −KL_s all four."""
    f = quarters(w)
    table = {
        "L_x": (lambda w, at: w.L_x(), [f["qpθ"], f["qpφ"]]),
        "L_z": (lambda w, at: w.L_z(), [f["pqθ"], f["pqφ"]]),
        "S14": (games.svae, [f["pqθ"], f["qpφ"]]),
        "wake–sleep": (games.wake_sleep, [f["qpθ"], f["pqφ"]]),
        "exact": (games.svae_exact, [f["qpθ"] + f["pqθ"], f["qpφ"] + f["pqφ"]]),
        "−KL_s": (lambda w, at: -w.kl_s(), [f["qpθ"] + f["pqθ"], f["qpφ"] + f["pqφ"]]),
    }
    for objective, expected in table.values():
        same(field(objective, w), torch.cat(expected))
    fields = {name: field(objective, w) for name, (objective, _) in table.items()}
    for name in ("L_x", "L_z", "S14", "wake–sleep"):
        refuses(fields[name], *(other for key, other in fields.items() if key != name))


@FEW
@given(w=WORLDS, weight=st.floats(0.05, 3))
def test_S29_field_is_no_weighting_of_the_quarters(w: World, weight: float) -> None:
    r"""As printed, its draws carry gradients: at λ = 1 it is −∇KL_s plus the gradient through the draws."""
    through = field(lambda w, at: at.expected_log_decoder(w.q) + at.expected_log_encoder(w.p), w)
    expected = field(games.svae, w) + weight * (field(games.wake_sleep, w) + through)
    same(field(games.svae_r(weight), w), expected)
    refuses(field(games.svae_r(weight), w), field(games.svae, w) + weight * field(games.wake_sleep, w))


# Is it the gradient of anything? -------------------------------------------------------------------


@FEW
@given(w=SMALL)
def test_S14_field_is_a_gradient_only_where_both_directions_have_the_same_mixed_slopes(w: World) -> None:
    r"""J − Jᵀ is the mixed second derivative of KL(p_θ ‖ q_φ) − KL(q_φ ‖ p_θ), and of opposite sign in wake–sleep."""
    n = n_theta(w)
    J, other, both = (jacobian(o, w) for o in (games.svae, games.wake_sleep, games.svae_exact))
    twist = J - J.mT
    mixed = jacobian(lambda w, at: KL(w.p, w.q) - KL(w.q, w.p), w)[:n, n:]
    same(twist[:n, n:], -mixed)
    same(twist[:n, :n], torch.zeros(n, n).double())
    same(twist[n:, n:], torch.zeros_like(twist[n:, n:]))
    same(other - other.mT, -twist)
    same(both, both.mT)
    same(both, jacobian(lambda w, at: -w.kl_s(), w))
    refuses(J, J.mT)


@FEW
@given(w=st.builds(World.random, x_dim=st.integers(1, 3), z_dim=st.just(1), seed=SEEDS))
def test_S14_S15_where_the_joints_agree_it_is_half_of_the_symmetric_gradient(w: World) -> None:
    r"""Same directions, half the rate, and the same flat directions; away from agreement it is not so."""
    moved, w = w, agreed(w)
    same(w.kl_s(), torch.zeros(()).double())
    same(field(games.svae, w), torch.zeros_like(field(games.svae, w)))
    J, other, both = (jacobian(o, w) for o in (games.svae, games.wake_sleep, games.svae_exact))
    same(J, both / 2)
    same(other, both / 2)
    same(J, J.mT)
    rates = torch.linalg.eigvalsh(J)
    assert rates.max() < 1e-9 and rates.min() < -1e-2
    refuses(J, both)
    refuses(jacobian(games.svae, moved), jacobian(games.svae_exact, moved) / 2)


def test_S14_game_of_the_offsets_in_symbols() -> None:
    r"""x and z numbers, q(x) = N(0, 1), only b and c learn: S14 turns, or runs away, where KL_s is convex."""
    W, V, b, c = sympy.symbols("W V b c", real=True)
    sigma, tau = sympy.symbols("sigma tau", positive=True)  # e^s and e^t
    cov_q = sympy.Matrix([[1, V], [V, V**2 + tau]])
    cov_p = sympy.Matrix([[W**2 + sigma, W], [W, 1]])
    gap = sympy.Matrix([b, -c])  # mean of p_θ(x, z) less that of q_φ(x, z)
    pq, qp = ((gap.T * cov.inv() * gap)[0] / 2 for cov in (cov_q, cov_p))  # the parts that depend on b, c

    def matrix(b_descends: sympy.Expr, c_descends: sympy.Expr) -> sympy.Matrix:
        return -sympy.Matrix([sympy.diff(b_descends, b), sympy.diff(c_descends, c)]).jacobian([b, c])

    s14, wake_sleep, both = matrix(pq, qp), matrix(qp, pq), matrix(pq + qp, pq + qp)
    expected = -sympy.Matrix([[V**2 / tau + 1, V / tau], [W / sigma, W**2 / sigma + 1]])
    for entry in [*(s14 - expected), *(s14 + wake_sleep - both), both[0, 1] - both[1, 0]]:
        proved(entry)
    disproved(s14[0, 1] - s14[1, 0])
    turning = s14.subs({W: -V, sigma: tau})
    proved(turning.charpoly().as_expr().subs(turning.charpoly().gen, -(V**2 / tau + 1) + sympy.I * V / tau))
    running = s14.subs({W: V, sigma: tau})
    proved((running * sympy.Matrix([1, -1]) - (V - V**2 - tau) / tau * sympy.Matrix([1, -1]))[0])
    w = World.random(1, 1, 0)
    w = replace(w, m=torch.zeros(1).double(), S=torch.eye(1).double())
    numbers = {W: w.W.item(), V: w.V.item(), sigma: w.s.exp().item(), tau: w.t.exp().item()}
    by_hand = torch.tensor(expected.subs(numbers).tolist(), dtype=torch.float64)
    same(jacobian(games.svae, w)[[1, 4]][:, [1, 4]], by_hand)
    refuses(jacobian(games.wake_sleep, w)[[1, 4]][:, [1, 4]], by_hand)


def test_where_only_the_offsets_learn_climbing_S14_lowers_its_value() -> None:
    r"""Two sharp conditionals with opposite offsets: the step that S14 asks of b and c increases KL_s."""
    w = World(*(torch.tensor(v).double() for v in ([0.0], [[1.0]], [[0.5]], [0.3], [-2.3], [[0.5]], [-0.3], [-2.3])))

    def moved(objective: games.Objective) -> World:
        F = field(objective, w)
        return replace(w, b=w.b + 1e-4 * F[1], c=w.c + 1e-4 * F[4])

    assert moved(games.svae).ell(w.frozen()) > w.ell(w.frozen())  # the frozen critic sees a gain,
    assert moved(games.svae).kl_s() > w.kl_s()  # and it is a loss
    assert moved(games.svae_exact).kl_s() < w.kl_s()


# Where it ends -------------------------------------------------------------------------------------


@FEW
@given(w=ONE_CODE)
def test_S14_S20_with_the_best_encoder_the_decoder_descends_the_reverse_divergence_of_the_data(w: World) -> None:
    r"""S14: KL(p_θ(x) ‖ q(x)). Wake–sleep and the VAE: KL(q(x) ‖ p_θ(x)). The exact gradient: both."""
    w = best_encoder(w)
    n, v = n_theta(w), w.with_grad()
    reverse, forward = (gradient(-kl, v, THETA) for kl in (KL(v.p_x, v.q_x), KL(v.q_x, v.p_x)))
    ends = {
        games.svae: reverse,
        games.wake_sleep: forward,
        games.svae_exact: reverse + forward,
        lambda w, at: w.L_x(): forward,
        lambda w, at: w.L_z(): reverse,
    }
    for objective, theta in ends.items():
        F = field(objective, w)
        same(F[:n], theta)
        same(F[n:], torch.zeros_like(F[n:]))  # the encoder rests
    refuses(field(games.svae, w)[:n], forward, reverse + forward)


def test_S14_on_a_grid_with_two_modes() -> None:
    r"""The same for data that are not Gaussian, the posterior as a table, and every parameter of a decoder."""
    x, z = torch.linspace(-6, 6, 61).double(), torch.linspace(-4, 4, 51).double()
    family = grid.Family(x, z, grid.mixture(x, [0.6, 0.4], [-2, 2], 0.4), slope=4.0, seed=0)
    decoder = [family.centre, family.log_std, *family.climb.parameters()]
    log_p = family().log_p
    p_x = log_p.logsumexp(1)
    log_q = (family.q_x[:, None] + log_p - p_x[:, None]).detach()
    f = (log_p - log_q).detach()  # frozen
    ell = (log_q.exp() * f).sum() - (log_p.exp() * f).sum()

    def flat(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, decoder, retain_graph=True)])

    same(flat(ell), flat(-grid.kl(p_x, family.q_x)))
    refuses(flat(ell), flat(-grid.kl(family.q_x, p_x)))


def pairs(rho: float, v: float) -> World:
    r"""Four data in two pairs of correlation ρ, one code: the first pair is explained, the second gets variance v."""
    S = torch.eye(4, dtype=torch.float64)
    S[0, 1] = S[1, 0] = S[2, 3] = S[3, 2] = rho
    w = World.random(4, 1, 0)
    W = torch.tensor([[rho**0.5], [rho**0.5], [0.0], [0.0]], dtype=torch.float64)
    s = torch.tensor([1 - rho, 1 - rho, v, v], dtype=torch.float64).log()
    return best_encoder(replace(w, m=torch.zeros_like(w.m), S=S, W=W, b=torch.zeros_like(w.b), s=s))


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 3.0])
def test_S14_end_points_from_reverse_to_forward(rho: float, weight: float) -> None:
    r"""S14 + λ wake–sleep rests at v = δ [1 − λ + √((1 − λ)² + 4λ/δ)]/2 with δ = 1 − ρ², and is stable there."""
    delta = 1 - rho**2
    v = delta * (1 - weight + ((1 - weight) ** 2 + 4 * weight / delta) ** 0.5) / 2

    def objective(w: World, at: World) -> Tensor:
        return games.svae(w, at) + weight * games.wake_sleep(w, at)

    rest = field(objective, pairs(rho, v))
    same(rest, torch.zeros_like(rest))
    refuses(rest, field(objective, pairs(rho, 1.1 * v)), field(games.svae_r(0.5), pairs(rho, v)))
    rates = torch.linalg.eigvals(jacobian(objective, pairs(rho, v))).real
    assert rates.max() < 1e-9  # zero along the exchange of W₁, W₂ against their noise


def test_S14_has_no_noise_at_agreement_and_wake_sleep_has() -> None:
    r"""There f* = 0, so its slope is zero at every draw; the score of the decoder has the Fisher information."""
    w = agreed(World.random(1, 1, 4))
    noise = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, z = (u.requires_grad_() for u in w.decoder_pairs(noise))
    slopes = torch.autograd.grad(w.log_ratio(x, z).sum(), (x, z))
    same(torch.cat(slopes), torch.zeros_like(torch.cat(slopes)))
    score = ((x - w.decoder()(z).mean) * z / w.s.exp()).detach()  # ∂_W log p_θ(x|z)
    estimates(score.squeeze(1), 0.0)
    estimates(score.squeeze(1).square(), (-w.s).exp().squeeze())
    refuses_estimates(score.squeeze(1).square(), 0.0)
