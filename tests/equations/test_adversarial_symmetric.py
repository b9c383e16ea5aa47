r"""Paper A: the adversarial symmetric VAE, equation by equation (A3, ALI, is proved elsewhere).

The proofs about critics run on *tables*: two joint distributions of a discrete x and z, given by whole-number
counts, so that a batch mean over repeated cells is an expectation and the sums over x, z and z′ of the
paper's appendix are finite. Those about the bounds run in the linear-Gaussian world, at `exact.cubature`
points where a batch is meant.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from proof import (
    ONE_CODE,
    PROOF,
    SEEDS,
    about,
    agreed,
    batches,
    correlated,
    difference,
    disproved,
    estimates,
    four,
    gradient,
    logs,
    normal,
    points,
    proved,
    refuses,
    refuses_estimates,
    same,
    worlds,
)
from torch import Tensor
from torch.distributions import kl_divergence as KL
from torch.nn.functional import logsigmoid

from svae_lib.exact import PHI, THETA, World, expected_kl, expected_log_prob
from svae_lib.grid import minimise
from svae_lib.objectives import adversarial_symmetric, critic_lrt, symmetric_with_reconstruction

ZERO = torch.zeros((), dtype=torch.float64)


def elsewhere(w: World, seed: int) -> World:
    r"""Another encoder and decoder of the same data."""
    return replace(World.random(len(w.m), len(w.c), seed + 2**31), m=w.m, S=w.S)  # no seed that made w


# A1, A2: the evidence lower bound, as S1 and S2 ------------------------------------------------------


@worlds
def test_A1_both_forms_of_the_lower_bound(w: World) -> None:
    _, q_z_given_x, p_z, p_x_given_z = four(w, *batches(w)[0])
    first = (p_x_given_z + p_z - q_z_given_x).mean()  # E_qφ log [p_θ(x, z) / q_φ(z|x)]
    posterior = expected_kl(w.q_z_given_x, w.p_z_given_x, w.q_x)
    same(w.L_x(), first)
    same(first, expected_log_prob(w.q_x, w.p_x) - posterior)
    refuses(first, expected_log_prob(w.q_x, w.p_x) + posterior, expected_log_prob(w.p_x, w.p_x) - posterior)


@worlds(other=SEEDS)
def test_A2_the_constant_depends_on_the_data_alone(w: World, other: int) -> None:
    v = elsewhere(w, other)
    constant = w.L_x() + KL(w.q, w.p)
    same(constant, v.L_x() + KL(v.q, v.p))
    same(constant, w.C_x)
    refuses(constant, w.L_x() + KL(w.p, w.q), v.L_x() - KL(v.q, v.p))


# Lemma 1 and Corollary 1.1, on tables ---------------------------------------------------------------


class Tables:
    r"""q_φ(x, z) and p_θ(x, z) over 3 × 3 cells, from counts; batches hold each cell as often as it counts."""

    def __init__(self, n_q: list[int], n_p: list[int]) -> None:
        self.n_q, self.n_p = torch.tensor(n_q).view(3, 3), torch.tensor(n_p).view(3, 3)
        self.n_p_product = torch.outer(self.n_p.sum(1), self.n_p.sum(0))  # x and z of different draws
        self.n_q_product = torch.outer(self.n_q.sum(1), self.n_q.sum(0))
        self.q, self.p = self.n_q / self.n_q.sum().double(), self.n_p / self.n_p.sum().double()
        self.q_x, self.q_z = self.q.sum(1, keepdim=True), self.q.sum(0, keepdim=True)
        self.p_x, self.p_z = self.p.sum(1, keepdim=True), self.p.sum(0, keepdim=True)
        self.q_z_given_x, self.p_x_given_z = self.q / self.q_x, self.p / self.p_z
        self.f_1 = (self.q / (self.p_x * self.p_z)).log()
        self.f_2 = (self.p / (self.q_x * self.q_z)).log()
        self.f_2_printed = (self.p / (self.q_z_given_x * self.q_x)).log()  # A7 as printed: S's f*

    @property
    def generic(self) -> bool:
        r"""Far enough from coincidences (equal joints, independent x and z) to refuse anything."""
        products = (self.q - self.q_x * self.q_z).abs().max(), (self.p - self.p_x * self.p_z).abs().max()
        marginals = (self.q_x - self.p_x).abs().max(), (self.q_z - self.p_z).abs().max()
        return bool(min(*products, *marginals) > 0.02)


def g(f: Tensor, raised: Tensor, lowered: Tensor) -> Tensor:
    r"""`critic_lrt` of a table of scores, on pairs with the given counts."""
    batch = lambda n: f.flatten().repeat_interleave(n.flatten())  # noqa: E731
    return critic_lrt(f_q=batch(lowered), f_p=batch(raised))


def slope(f: Tensor, raised: Tensor, lowered: Tensor) -> Tensor:
    f = f.clone().requires_grad_()
    return torch.autograd.grad(g(f, raised, lowered), f)[0]


counts = st.lists(st.integers(1, 4), min_size=9, max_size=9)
FLAT = torch.zeros(3, 3, dtype=torch.float64)


def tables(test):
    r"""Run a proof on 30 random pairs of joint tables."""
    return PROOF(given(t=st.builds(Tables, counts, counts))(test))


def some_scores() -> Tensor:
    return normal(3, 3, seed=0)


def test_A4_stationary_and_concave_at_every_point() -> None:
    r"""The integrand p log σ(f) + q log(1 − σ(f)), as a function of one number f."""
    p, q = sympy.symbols("p q", positive=True)
    f = sympy.symbols("f", real=True)
    sigma = 1 / (1 + sympy.exp(-f))
    integrand = p * sympy.log(sigma) + q * sympy.log(1 - sigma)
    best = sympy.log(p) - sympy.log(q)
    proved(sympy.diff(integrand, f).subs(f, best))
    proved(sympy.diff(integrand, f, 2) + (p + q) * sigma * (1 - sigma))  # negative everywhere: one maximum
    proved(sympy.solve(sympy.diff(integrand, f), f)[0] - sympy.log(p / q))
    disproved(sympy.diff(integrand, f).subs(f, -best))
    disproved(sympy.diff(integrand, f).subs(f, sympy.log(p / (p + q))))


@tables
def test_A4_log_ratio_is_the_maximiser(t: Tables) -> None:
    f = t.p.log() - t.q.log()
    same(slope(f, t.n_p, t.n_q), FLAT)
    assert g(f + some_scores(), t.n_p, t.n_q) < g(f, t.n_p, t.n_q)
    if t.generic:
        refuses(slope(-f, t.n_p, t.n_q), FLAT)


@tables
def test_A5_maximised_by_f_1(t: Tables) -> None:
    best = g(t.f_1, t.n_q, t.n_p_product)
    literal = (t.q * logsigmoid(t.f_1)).sum() + (t.p_x * t.p_z * logsigmoid(-t.f_1)).sum()
    same(best, literal)
    same(slope(t.f_1, t.n_q, t.n_p_product), FLAT)
    assert g(t.f_1 + some_scores(), t.n_q, t.n_p_product) < best
    if t.generic:
        refuses(slope(t.f_1, t.n_q, t.n_p), FLAT)  # lowered on joint pairs: f_1 is the answer to another question
        refuses(slope(t.f_1, t.n_q, t.n_q_product), FLAT)
        refuses(slope(t.f_1, t.n_p_product, t.n_q), FLAT)  # labels exchanged


@tables
def test_A6_maximised_by_f_2(t: Tables) -> None:
    best = g(t.f_2, t.n_p, t.n_q_product)
    literal = (t.p * logsigmoid(t.f_2)).sum() + (t.q_x * t.q_z * logsigmoid(-t.f_2)).sum()
    same(best, literal)
    same(slope(t.f_2, t.n_p, t.n_q_product), FLAT)
    assert g(t.f_2 + some_scores(), t.n_p, t.n_q_product) < best
    if t.generic:
        refuses(slope(t.f_2, t.n_p, t.n_q), FLAT)
        refuses(slope(t.f_2, t.n_q_product, t.n_p), FLAT)


@tables
def test_A5_A6_draws_of_one_batch_become_independent_when_shuffled(t: Tables) -> None:
    r"""Every x of a batch of decoder pairs with every z of it: p_θ(x) p(z), as A5 asks; A6 the same."""
    for n, x_marginal, z_marginal in ((t.n_p, t.p_x, t.p_z), (t.n_q, t.q_x, t.q_z)):
        cells = torch.arange(9).repeat_interleave(n.flatten())
        x, z = cells // 3, cells % 3
        shifts = [x * 3 + z.roll(k) for k in range(len(cells))]
        frequency = torch.bincount(torch.cat(shifts), minlength=9).view(3, 3).double() / len(cells) ** 2
        same(frequency, x_marginal * z_marginal)
    if t.generic:
        refuses(t.p, t.p_x * t.p_z)


@worlds
def test_A7_optimal_critics_from_their_densities(w: World) -> None:
    x, z = points(w)
    q_x, q_z_given_x, p_z, p_x_given_z = four(w, x, z)
    same(w.f_1(x, z), q_x + q_z_given_x - w.p_x.log_prob(x) - p_z)
    same(w.f_2(x, z), p_z + p_x_given_z - q_x - w.q_z.log_prob(z))
    refuses(w.f_1(x, z), -w.log_ratio(x, z), w.f_2(x, z), q_z_given_x - p_z)
    refuses(w.f_2(x, z), w.log_ratio(x, z), -w.f_1(x, z), p_x_given_z - q_x)


@worlds
def test_A7_critics_are_the_ratio_of_paper_S_and_a_mutual_information(w: World) -> None:
    r"""f_1 = i_p − f*, f_2 = i_q + f*: pointwise mutual informations of the decoder's and the encoder's joint."""
    x, z = points(w)
    i_p = w.p_z_given_x.at(x).log_prob(z) - w.p_z.log_prob(z)
    i_q = w.encoder()(x).log_prob(z) - w.q_z.log_prob(z)
    same(w.f_1(x, z), i_p - w.log_ratio(x, z))
    same(w.f_2(x, z), i_q + w.log_ratio(x, z))
    refuses(w.f_1(x, z), i_q - w.log_ratio(x, z), i_p + w.log_ratio(x, z))


@tables
def test_A7_erratum_reference_of_the_second_critic(t: Tables) -> None:
    r"""A7 prints q_φ(z|x) q(x) where A6 draws x and z independently; A18 has q_φ(z) q(x), which is right."""
    same(slope(t.f_2, t.n_p, t.n_q_product), FLAT)
    same(t.f_2_printed, t.p.log() - t.q.log())  # as printed it is S's f*
    if t.generic:
        refuses(slope(t.f_2_printed, t.n_p, t.n_q_product), FLAT)


@worlds
def test_A7_erratum_makes_A10_false(w: World) -> None:
    log_encoder = w.expected_log_encoder(w.p)
    f_2 = KL(w.p, w.q) + expected_log_prob(w.p, w.q)  # E_pθ log p_θ(x, z)
    f_2 = f_2 - expected_log_prob(w.p_x, w.q_x) - expected_log_prob(w.p_z, w.q_z)
    same(log_encoder - f_2, w.L_VAEz())
    refuses(log_encoder - KL(w.p, w.q), w.L_VAEz())  # E_pθ of the printed critic is KL(p_θ ‖ q_φ)


@worlds
def test_A7_erratum_turns_the_second_half_into_that_of_S29(w: World) -> None:
    r"""With the printed critic the second half of A10 is −E_pθ[f* − λ log q_φ(z|x)] of S29, λ = 1."""
    w = w.with_grad()
    (x_q, z_q), (x_p, z_p) = batches(w)
    f, zero, critic = torch.zeros(len(x_q)).double(), torch.zeros(len(x_q)).double(), w.frozen()
    f_p, log_q = critic.log_ratio(x_p, z_p), w.encoder()(x_p).log_prob(z_p)
    printed = adversarial_symmetric(zero, f, log_q, f_p)
    same(printed, symmetric_with_reconstruction(f, f_p, zero, log_q, 1.0))
    corrected = adversarial_symmetric(zero, f, log_q, critic.f_2(x_p, z_p))
    refuses(gradient(printed, w), gradient(corrected, w))


# The proof of Corollary 1.1, line by line --------------------------------------------------------------


def test_A13_by_drawing() -> None:
    r"""z′ ~ p(z), x ~ p_θ(x|z′), z ~ p(z), all drawn; the mean score is the sum A16."""
    t = Tables([3, 1, 2, 1, 4, 1, 1, 2, 3], [1, 4, 1, 2, 1, 3, 1, 1, 2])
    lowered, generator = logsigmoid(-some_scores()), torch.Generator().manual_seed(0)
    prior, n = t.p_z.squeeze(0), 200_000
    z_prime, z = torch.multinomial(prior, 2 * n, True, generator=generator).view(2, n)
    x = torch.multinomial(t.p_x_given_z.T[z_prime], 1, generator=generator).squeeze(1)
    estimates(lowered[x, z], (t.p_x * t.p_z * lowered).sum())
    refuses_estimates(lowered[x, z], (t.p * lowered).sum(), (t.q_x * t.q_z * lowered).sum())
    refuses_estimates(lowered[x, z_prime], (t.p_x * t.p_z * lowered).sum())  # z′ is not z


@tables
def test_A13_A14_expectation_as_a_sum_over_x_z_and_z_prime(t: Tables) -> None:
    r"""A13 counted: every draw of (x, z′) with every independent draw of z."""
    lowered = logsigmoid(-some_scores())
    cells = torch.arange(9).repeat_interleave(t.n_p.flatten())
    x, z = torch.cartesian_prod(cells // 3, cells % 3).T
    triple = torch.einsum("xj,j,z,xz->", t.p_x_given_z, t.p_z[0], t.p_z[0], lowered)  # j is z′
    same(lowered[x, z].mean(), triple)
    if t.generic:
        refuses(triple, torch.einsum("xz,z,xz->", t.p_x_given_z, t.p_z[0], lowered))  # z′ = z


@tables
def test_A14_A15_A16_the_inner_sum_is_the_model_marginal(t: Tables) -> None:
    lowered = logsigmoid(-some_scores())
    triple = torch.einsum("xj,j,z,xz->", t.p_x_given_z, t.p_z[0], t.p_z[0], lowered)
    inner = t.p_x_given_z @ t.p_z[0]  # ∫ p_θ(x|z′) p(z′) dz′, the braces of A15
    same(triple, (inner[:, None] * t.p_z * lowered).sum())
    same(inner[:, None], t.p_x)
    same(triple, (t.p_x * t.p_z * lowered).sum())
    if t.generic:
        refuses(triple, (t.p * lowered).sum(), (t.q_x * t.p_z * lowered).sum())


@tables
def test_A17_one_sum_of_one_integrand(t: Tables) -> None:
    f = some_scores()
    integrand = t.q * logsigmoid(f) + t.p_x * t.p_z * logsigmoid(-f)
    same(g(f, t.n_q, t.n_p_product), (t.q_x * t.q_z_given_x * logsigmoid(f)).sum() + g_lowered(t, f))
    same(g(f, t.n_q, t.n_p_product), integrand.sum())
    if t.generic:
        refuses(integrand.sum(), (t.p * logsigmoid(f) + t.q_x * t.q_z * logsigmoid(-f)).sum())


def g_lowered(t: Tables, f: Tensor) -> Tensor:
    r"""A16."""
    return (t.p_x * t.p_z * logsigmoid(-f)).sum()


def test_A18_maximum_of_a_log_s_plus_b_log_one_minus_s() -> None:
    a, b, s = sympy.symbols("a b s", positive=True)
    value = a * sympy.log(s) + b * sympy.log(1 - s)
    proved(sympy.diff(value, s).subs(s, a / (a + b)))
    proved(sympy.diff(value, s, 2) + a / s**2 + b / (1 - s) ** 2)  # negative on (0, 1)
    disproved(sympy.diff(value, s).subs(s, b / (a + b)))


@tables
def test_A18_optimal_critics_of_the_tables(t: Tables) -> None:
    same(t.f_1.sigmoid(), t.q / (t.q + t.p_x * t.p_z))
    same(t.f_2.sigmoid(), t.p / (t.p + t.q_x * t.q_z))
    for f, raised, lowered in ((t.f_1, t.q, t.p_x * t.p_z), (t.f_2, t.p, t.q_x * t.q_z)):
        integrand = lambda f, a=raised, b=lowered: a * logsigmoid(f) + b * logsigmoid(-f)  # noqa: E731
        assert (integrand(f + some_scores()) < integrand(f)).all()  # at every cell, not only in the sum
    if t.generic:
        refuses(t.f_1.sigmoid(), t.q / (t.q + t.p), t.p_x * t.p_z / (t.q + t.p_x * t.p_z))


# A8, A9 and what they add to paper S ---------------------------------------------------------------------


@worlds
def test_A8_bound_on_data(w: World) -> None:
    evidence = expected_log_prob(w.q_x, w.p_x)
    same(w.L_VAEx(), w.L_x() - KL(w.q_x, w.p_x))  # looser than S1 by a divergence
    assert w.L_VAEx() <= w.L_x() <= evidence
    refuses(w.L_VAEx(), w.L_x(), evidence - KL(w.p, w.q), w.L_x() - KL(w.p_x, w.q_x))


@worlds
def test_A9_bound_on_codes(w: World) -> None:
    evidence = expected_log_prob(w.p_z, w.q_z)
    same(w.L_VAEz(), w.L_z() - KL(w.p_z, w.q_z))
    assert w.L_VAEz() <= w.L_z() <= evidence
    refuses(w.L_VAEz(), w.L_z(), evidence - KL(w.q, w.p), w.L_z() - KL(w.q_z, w.p_z))


@worlds
def test_A9_erratum_code_likelihood_in_the_text(w: World) -> None:
    r"""The text has E_p(z) log p_θ(z) = −KL(p(z) ‖ q_φ(z)) + const; it is E_p(z) log q_φ(z)."""
    same(expected_log_prob(w.p_z, w.q_z), -KL(w.p_z, w.q_z) + w.C_z)
    same(expected_log_prob(w.q_x, w.p_x), -KL(w.q_x, w.p_x) + w.C_x)  # the text's other identity is right
    refuses(expected_log_prob(w.p_z, w.p_z), -KL(w.p_z, w.q_z) + w.C_z)


@worlds
def test_A19_A20_data_bound_as_two_divergences(w: World) -> None:
    x, z = batches(w)[0]
    bound = w.p_x.log_prob(x).mean() + w.log_ratio(x, z).mean()  # E_qφ log p_θ(x) + E_qφ log [p_θ(x, z) / q_φ(x, z)]
    same(w.L_VAEx(), bound)
    same(bound, w.C_x - KL(w.q, w.p) - KL(w.q_x, w.p_x))
    refuses(bound, w.C_x - KL(w.q, w.p), w.C_x - KL(w.q, w.p) - KL(w.p_x, w.q_x))


@worlds
def test_A21_A22_code_bound_as_two_divergences(w: World) -> None:
    x, z = batches(w)[1]
    bound = w.q_z.log_prob(z).mean() - w.log_ratio(x, z).mean()  # E_pθ log q_φ(z) + E_pθ log [q_φ(x, z) / p_θ(x, z)]
    same(w.L_VAEz(), bound)
    same(bound, w.C_z - KL(w.p, w.q) - KL(w.p_z, w.q_z))
    refuses(bound, w.C_z - KL(w.p, w.q), w.C_z - KL(w.p, w.q) - KL(w.q_z, w.p_z))


# A10, A11: the cumulative objective ------------------------------------------------------------------------


def terms(w: World, critic: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The four arguments of `adversarial_symmetric` on a batch of world w, the critics exact for another."""
    (log_p, log_q), (encoder_pairs, decoder_pairs) = logs(w, w), batches(w)
    return log_p, critic.f_1(*encoder_pairs), log_q, critic.f_2(*decoder_pairs)


@worlds
def test_A10_value_with_exact_critics(w: World) -> None:
    log_p, f_1, log_q, f_2 = terms(w, w)
    same((log_p - f_1).mean(), w.L_VAEx())
    same((log_q - f_2).mean(), w.L_VAEz())
    value = adversarial_symmetric(log_p, f_1, log_q, f_2)
    same(value, w.L_VAEx() + w.L_VAEz())
    same(value, w.L_VAExz(w))
    for wrong in ((log_p, -f_1, log_q, f_2), (log_p, f_1, log_q, -f_2), (-log_p, f_1, log_q, f_2)):
        refuses(value, adversarial_symmetric(*wrong))


@worlds
def test_A10_is_not_the_objective_of_paper_S(w: World) -> None:
    r"""A10 subtracts KL(q(x) ‖ p_θ(x)) + KL(p(z) ‖ q_φ(z)) from S7."""
    likelihoods = expected_log_prob(w.q_x, w.p_x) + expected_log_prob(w.p_z, w.q_z)
    same(w.L_VAExz(w), likelihoods - w.kl_s())
    same(w.L_VAExz(w), w.L_xz() - KL(w.q_x, w.p_x) - KL(w.p_z, w.q_z))
    assert w.L_VAExz(w) <= w.L_xz()
    refuses(w.L_VAExz(w), w.L_xz(), -w.kl_s(), w.L_xz() - KL(w.p_x, w.q_x) - KL(w.q_z, w.p_z))


@worlds(other=SEEDS)
def test_A10_with_frozen_critics_is_minus_kl_s_plus_what_drives_away_from_the_critics(w: World, other: int) -> None:
    r"""Critics exact at (θ, φ), players at (θ′, φ′), primes on their joints:

    L = −KL_s(q′ ‖ p′) + KL(q′ ‖ q_φ) + KL(p′ ‖ p_θ) + E_q(x) log p_θ(x) + E_p(z) log q_φ(z).
    """
    v = elsewhere(w, other)
    constant = expected_log_prob(w.q_x, w.p_x) + expected_log_prob(w.p_z, w.q_z)
    same(v.L_VAExz(w), -v.kl_s() + KL(v.q, w.q) + KL(v.p, w.p) + constant)
    refuses(v.L_VAExz(w), -v.kl_s() + constant, -v.kl_s() + KL(w.q, v.q) + KL(w.p, v.p) + constant)


@worlds(other=SEEDS)
def test_A10_with_anchored_players_is_minus_kl_s_however_old_the_critics(w: World, other: int) -> None:
    r"""Subtract both divergences from where the critics are exact, in closed form: value and gradient of −KL_s."""
    v = elsewhere(w, other).with_grad()
    drift = expected_kl(v.q_z_given_x, w.q_z_given_x, w.q_x) + expected_kl(v.p_x_given_z, w.p_x_given_z, w.p_z)
    same(drift, KL(v.q, w.q) + KL(v.p, w.p))
    (x, _), (_, z) = batches(v)
    per_pair = v.encoder()(x).kl(w.encoder()(x)).mean() + v.decoder()(z).kl(w.decoder()(z)).mean()
    same(per_pair, drift)
    anchored = adversarial_symmetric(*terms(v, w)) - per_pair
    same(anchored, -v.kl_s() + expected_log_prob(w.q_x, w.p_x) + expected_log_prob(w.p_z, w.q_z))
    same(gradient(anchored, v), gradient(-v.kl_s(), v))
    refuses(gradient(anchored, v), gradient(v.L_VAExz(w), v))


@worlds
def test_A10_gradient_with_frozen_critics_is_that_of_minus_kl_s(w: World) -> None:
    r"""The algorithm follows paper S's objective; the likelihoods it adds are hidden inside the critics."""
    w = w.with_grad()
    frozen = gradient(w.L_VAExz(w.frozen()), w)
    same(frozen, gradient(-w.kl_s(), w))
    same(frozen, gradient(adversarial_symmetric(*terms(w, w.frozen())), w))  # the batch's own gradient
    refuses(frozen, gradient(w.L_VAExz(w), w), gradient(w.ell(w.frozen()), w), -frozen)
    hidden = KL(w.q_x, w.p_x) + KL(w.p_z, w.q_z)
    same(gradient(w.L_VAExz(w), w), frozen - gradient(hidden, w))  # the stated objective's gradient


@worlds
def test_A11_first_half_alone_follows_the_evidence_lower_bound(w: World) -> None:
    r"""AS-VAE-r: the gradient of −KL(q_φ ‖ p_θ), hence that of L_x (S1), in θ and in φ."""
    w = w.with_grad()
    log_p, f_1, _, _ = terms(w, w.frozen())
    half = (log_p - f_1).mean()
    same(gradient(half, w), gradient(-KL(w.q, w.p), w))
    same(gradient(half, w), gradient(w.L_x(), w))
    refuses(gradient(half, w), gradient(w.L_VAEx(), w), gradient(-KL(w.p, w.q), w), gradient(log_p.mean(), w))


@worlds
def test_A11_second_half_alone_follows_the_other_direction(w: World) -> None:
    r"""AS-VAE-g: the gradient of −KL(p_θ ‖ q_φ), hence that of L_z (S5), in θ and in φ."""
    w = w.with_grad()
    _, _, log_q, f_2 = terms(w, w.frozen())
    half = (log_q - f_2).mean()
    same(gradient(half, w), gradient(-KL(w.p, w.q), w))
    same(gradient(half, w), gradient(w.L_z(), w))
    refuses(gradient(half, w), gradient(w.L_VAEz(), w), gradient(-KL(w.q, w.p), w), gradient(log_q.mean(), w))


@worlds
def test_A11_first_half_is_adversarial_variational_bayes(w: World) -> None:
    r"""T = log q_φ(z|x) − log p(z) differs from f_1 by a function of x alone: other value, same gradient."""
    w = w.with_grad()
    (x, z), _ = batches(w)
    log_p, f_1, _, _ = terms(w, w.frozen())
    T = w.frozen().encoder()(x).log_prob(z) - w.p_z.log_prob(z)
    same((log_p - T).mean(), w.L_x())
    same(gradient((log_p - f_1).mean(), w), gradient((log_p - T).mean(), w))
    refuses((log_p - f_1).mean(), (log_p - T).mean())


@worlds
def test_A11_reparameterised_draws_have_the_joints_moments(w: World) -> None:
    r"""(x, z_φ(x, ε)) ~ q_φ(x, z) and (x_θ(z, ξ), z) ~ p_θ(x, z): first and second moments, exactly."""
    for pairs, joint in zip(batches(w), (w.q, w.p), strict=True):
        xz = torch.cat(pairs, 1)
        centred = xz - xz.mean(0)
        same(xz.mean(0), joint.mean)
        same(centred.mT @ centred / len(xz), joint.covariance_matrix)
    refuses(torch.cat(batches(w)[0], 1).mean(0), w.p.mean)


@worlds
def test_A11_value_and_pathwise_gradient(w: World) -> None:
    r"""With any other world's critics, too: the batch is the expectation, its gradient the gradient."""
    w, critic = w.with_grad(), replace(w, W=2 * w.W, c=w.c + 1)
    value = adversarial_symmetric(*terms(w, critic))
    same(value, w.L_VAExz(critic))
    same(gradient(value, w), gradient(w.L_VAExz(critic), w))
    log_p, f_1, log_q, f_2 = terms(w, critic)
    detached = adversarial_symmetric(log_p, f_1.detach(), log_q, f_2.detach())
    refuses(gradient(value, w), gradient(detached, w))  # without the path through the critic


def gauss_hermite(n: int = 8) -> tuple[Tensor, Tensor]:
    r"""Points (n², 2) and weights (n²,) that integrate polynomials of degree 2n − 1 per axis under N(0, I)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)


def per_sample(w: World, noise: Tensor, pathwise: bool) -> dict[str, Tensor]:
    r"""Per draw, the gradient of A11 in each parameter of a 1-D world: by reparameterisation, or as A10's
    E[∇h + h ∇log density] with the draws held fixed."""
    critic = w.frozen()

    def value(parameters: dict[str, Tensor], eps: Tensor) -> Tensor:
        v = replace(critic, **parameters)
        drawn = v if pathwise else critic
        (x_q, z_q), (x_p, z_p) = drawn.encoder_pairs(eps[None]), drawn.decoder_pairs(eps[None])
        log_p, log_q = v.decoder()(z_q).log_prob(x_q), v.encoder()(x_p).log_prob(z_p)
        h_q, h_p = log_p - critic.f_1(x_q, z_q), log_q - critic.f_2(x_p, z_p)
        if pathwise:
            return (h_q + h_p).squeeze()
        score_q, score_p = v.encoder()(x_q).log_prob(z_q), v.decoder()(z_p).log_prob(x_p)
        return (h_q + h_p + h_q.detach() * score_q + h_p.detach() * score_p).squeeze()

    gradients = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(critic.parameters, noise)
    return {k: v.flatten(1).squeeze(1) for k, v in gradients.items()}


@pytest.mark.parametrize("seed", range(4))
def test_A11_pathwise_and_score_function_gradients_agree_by_quadrature(seed: int) -> None:
    w = World.random(1, 1, seed).with_grad()
    noise, weights = gauss_hermite()
    pathwise, score = (per_sample(w, noise, how) for how in (True, False))
    for name in THETA + PHI:
        exact = gradient(-w.kl_s(), w, (name,)).squeeze()
        same((weights * pathwise[name]).sum(), exact)
        same((weights * score[name]).sum(), exact)
        assert difference(pathwise[name], score[name]) > 1e-3  # equal in the mean, not draw by draw
        refuses((weights * pathwise[name]).sum(), -exact)


def test_A11_pathwise_and_score_function_gradients_agree_by_monte_carlo() -> None:
    w = World.random(1, 1, seed=2).with_grad()
    noise = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stated = w.L_VAExz(w)
    for how in (True, False):
        samples = per_sample(w, noise, how)
        for name in THETA + PHI:
            estimates(samples[name], gradient(-w.kl_s(), w, (name,)).squeeze())
        refuses_estimates(samples["b"], gradient(stated, w, ("b",)).squeeze())


# A12 and Proposition 1 ---------------------------------------------------------------------------------------


@worlds(shift=st.floats(1.0, 1e6))
def test_A12_erratum_maximum_over_the_critics_is_unbounded(w: World, shift: float) -> None:
    r"""−L rises with any constant added to the critics; A5, A6 do not, and they are what ψ maximises."""
    log_p, f_1, log_q, f_2 = terms(w, w)
    value = -adversarial_symmetric(log_p, f_1, log_q, f_2)
    same(-adversarial_symmetric(log_p, f_1 + shift, log_q, f_2 + shift), value + 2 * shift)
    assert max(critic_lrt(f_1 + c, f_2 + c) for c in (-shift, shift)) < 0  # for any scores whatever
    refuses(-adversarial_symmetric(log_p, f_1 + shift, log_q, f_2 + shift), value)


@worlds(w=ONE_CODE)
def test_A12_agreement_is_stationary_and_the_critics_are_equal(w: World) -> None:
    e = agreed(w).with_grad()
    for critic in (e.frozen(), e):
        found = gradient(e.L_VAExz(critic), e)
        same(found, torch.zeros_like(found))
    same(e.L_VAExz(e), e.C_x + e.C_z)  # the largest value there is
    same(e.f_1(*points(e)), e.f_2(*points(e)))
    assert w.L_VAExz(w) < w.C_x + w.C_z - 1e-6
    refuses(w.f_1(*points(w)), w.f_2(*points(w)))


@worlds(w=ONE_CODE, other=SEEDS)
def test_A12_neither_player_alone_improves_on_agreement(w: World, other: int) -> None:
    r"""Critics fixed at agreement on π: a decoder that moves alone loses KL(π ‖ p′), an encoder KL(π ‖ q′)."""
    e, v = agreed(w), elsewhere(w, other)
    decoder, encoder = replace(e, W=v.W, b=v.b, s=v.s), replace(e, V=v.V, c=v.c, t=v.t)
    same(decoder.L_VAExz(e) - e.L_VAExz(e), -KL(e.p, decoder.p))
    same(encoder.L_VAExz(e) - e.L_VAExz(e), -KL(e.q, encoder.q))
    refuses(decoder.L_VAExz(e) - e.L_VAExz(e), -KL(decoder.p, e.p), ZERO)


@pytest.mark.parametrize(("here", "there"), [(0.5, 0.7), (0.5, 0.2), (0.0, 0.3), (0.9, 0.99)])
def test_A12_both_players_together_improve_on_agreement(here: float, there: float) -> None:
    r"""Agreeing elsewhere, on π′, gains 2 KL(π′ ‖ π) while the critics stand still: no equilibrium of a team."""
    e, team = correlated(here), correlated(there)
    same(e.kl_s(), ZERO)
    same(team.kl_s(), ZERO)
    same(team.L_VAExz(e) - e.L_VAExz(e), 2 * KL(team.q, e.q))
    assert team.L_VAExz(e) > e.L_VAExz(e) + 1e-3
    same(team.ell(e), e.ell(e))  # S14 gives nothing for it
    same(team.L_VAExz(team), e.L_VAExz(e))  # nor do critics that follow
    refuses(team.L_VAExz(e) - e.L_VAExz(e), KL(team.q, e.q), 2 * KL(e.q, team.q))


def test_A12_trained_to_equilibrium_all_divergences_vanish() -> None:
    r"""Proposition 1 where agreement is possible: quasi-Newton ascent of the gradient that A11 follows."""
    e, w = agreed(World.random(2, 1, seed=3)), World.random(2, 1, seed=4)
    w = replace(w, m=e.m, S=e.S).with_grad()
    start = KL(w.q, w.p), KL(w.p, w.q), KL(w.q_x, w.p_x), KL(w.p_z, w.q_z)
    assert min(start) > 0.05

    def loss() -> Tensor:
        return -w.L_VAExz(w.frozen()) + w.frozen().L_VAExz(w.frozen()) + w.frozen().kl_s()

    minimise(loss, w.parameters.values(), steps=150)  # value KL_s, gradient of the frozen objective
    for divergence in (KL(w.q, w.p), KL(w.p, w.q), KL(w.q_x, w.p_x), KL(w.p_z, w.q_z)):
        about(divergence, 0.0, 1e-6)
    x, z = points(w)
    about(w.f_1(x, z), w.f_2(x, z), 1e-2)
