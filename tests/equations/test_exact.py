r"""The linear-Gaussian world: the papers' equations S1–S9 and S12–S15 as short proofs.

Every identity is asked of random worlds with x and z of 1 to 8 dimensions. Each proof ends with
wrong variants, which the same comparison must refuse. That the quantities mean what they are
called is shown by integrals on a grid and by Monte Carlo.
"""

from __future__ import annotations

import pytest
import torch
from proof import ONE_CODE, as_conditional, best_encoder, estimates, four, gradient, points, refuses, same, worlds
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from svae_lib.exact import PHI, THETA, World, conditional, cubature, expected_kl, expected_log_prob

# The equations ------------------------------------------------------------------------------


@worlds
def test_S1_evidence_lower_bound(w: World) -> None:
    evidence = expected_log_prob(w.q_x, w.p_x)  # E_q(x) log p_θ(x)
    gap = expected_kl(w.q_z_given_x, w.p_z_given_x, w.q_x)
    same(w.L_x(), evidence - gap)
    assert gap >= 0
    refuses(w.L_x(), evidence, evidence + gap)


@worlds
def test_S1_is_reconstruction_minus_kl_to_the_prior(w: World) -> None:
    regulariser = expected_kl(w.q_z_given_x, as_conditional(w.p_z, len(w.m)), w.q_x)
    same(w.L_x(), w.expected_log_decoder(w.q) - regulariser)
    refuses(w.L_x(), w.expected_log_decoder(w.q) + regulariser, w.expected_log_decoder(w.p) - regulariser)


@worlds(w=ONE_CODE)
def test_S1_bound_is_tight_at_the_posterior(w: World) -> None:
    r"""With a 1-D code the encoder family contains p_θ(z|x), and there the gap closes."""
    tight = best_encoder(w)
    same(tight.L_x(), expected_log_prob(w.q_x, w.p_x))
    refuses(w.L_x(), tight.L_x())


@worlds
def test_S2_joint_kl_form(w: World) -> None:
    kl = kl_divergence(w.q, w.p)
    same(w.L_x(), -kl + w.C_x)
    refuses(w.L_x(), -kl, -kl - w.C_x, -kl_divergence(w.p, w.q) + w.C_x)


@worlds
def test_S3_joint_kl_seen_from_x(w: World) -> None:
    kl = kl_divergence(w.q, w.p)
    posteriors = expected_kl(w.q_z_given_x, w.p_z_given_x, w.q_x)
    marginals = kl_divergence(w.q_x, w.p_x)
    same(kl, posteriors + marginals)
    refuses(kl, posteriors - marginals, marginals, posteriors + kl_divergence(w.p_x, w.q_x))


@worlds
def test_S4_joint_kl_seen_from_z(w: World) -> None:
    kl = kl_divergence(w.q, w.p)
    likelihoods = expected_kl(w.q_x_given_z, w.p_x_given_z, w.q_z)
    codes = kl_divergence(w.q_z, w.p_z)
    same(kl, likelihoods + codes)
    refuses(kl, likelihoods - codes, expected_kl(w.q_x_given_z, w.p_x_given_z, w.p_z) + codes)


@worlds
def test_S5_reversed_expression(w: World) -> None:
    r"""L_z = E_pθ [log q_φ(z|x) + log q(x) − log p_θ(x|z)], term by term."""
    log_data = expected_log_prob(w.p_x, w.q_x)
    terms = w.expected_log_encoder(w.p) + log_data - w.expected_log_decoder(w.p)
    same(w.L_z(), terms)
    refuses(w.L_z(), -terms, terms - log_data, w.expected_log_encoder(w.q) + log_data - w.expected_log_decoder(w.q))


@worlds
def test_S5_is_code_fit_minus_kl_to_the_data(w: World) -> None:
    r"""The mirror image of the VAE: L_z = E_pθ log q_φ(z|x) − E_p(z) KL(p_θ(x|z) ‖ q(x))."""
    regulariser = expected_kl(w.p_x_given_z, as_conditional(w.q_x, len(w.c)), w.p_z)
    same(w.L_z(), w.expected_log_encoder(w.p) - regulariser)
    refuses(w.L_z(), w.expected_log_encoder(w.p) + regulariser)


@worlds
def test_S6_reversed_joint_kl_form(w: World) -> None:
    kl = kl_divergence(w.p, w.q)
    same(w.L_z(), -kl + w.C_z)
    refuses(w.L_z(), -kl, -kl - w.C_z, -kl_divergence(w.q, w.p) + w.C_z)


@worlds
def test_S7_symmetric_expression(w: World) -> None:
    L_xz, K = w.L_xz(), w.C_x + w.C_z
    same(L_xz, -w.kl_s() + K)
    refuses(L_xz, -w.kl_s(), -0.5 * w.kl_s() + K, -w.kl_s() - K)


@worlds
def test_S8_symmetric_kl_seen_from_z(w: World) -> None:
    under_p = expected_kl(w.p_x_given_z, w.q_x_given_z, w.p_z)
    under_q = expected_kl(w.q_x_given_z, w.p_x_given_z, w.q_z)
    codes = kl_divergence(w.p_z, w.q_z) + kl_divergence(w.q_z, w.p_z)
    same(w.kl_s(), under_p + under_q + codes)
    refuses(w.kl_s(), under_p + under_q, under_p + under_q + kl_divergence(w.p_z, w.q_z))


@worlds
def test_S9_symmetric_kl_seen_from_x(w: World) -> None:
    under_p = expected_kl(w.p_z_given_x, w.q_z_given_x, w.p_x)
    under_q = expected_kl(w.q_z_given_x, w.p_z_given_x, w.q_x)
    data = kl_divergence(w.p_x, w.q_x) + kl_divergence(w.q_x, w.p_x)
    same(w.kl_s(), under_p + under_q + data)
    refuses(w.kl_s(), under_p + under_q, under_p - under_q + data)


@worlds
def test_S9_marginal_symmetric_kl_as_cross_entropies(w: World) -> None:
    data = kl_divergence(w.p_x, w.q_x) + kl_divergence(w.q_x, w.p_x)
    crossed = expected_log_prob(w.q_x, w.p_x) + expected_log_prob(w.p_x, w.q_x)
    same(-data, crossed + w.p_x.entropy() - w.C_x)
    refuses(-data, crossed + w.p_x.entropy() + w.C_x, crossed - w.p_x.entropy() - w.C_x, crossed)


def expected_log_ratio(w: World, under: MultivariateNormal) -> Tensor:
    r"""E_under f* with f* = log p_θ(x, z) − log q_φ(x, z) (S11)."""
    return expected_log_prob(under, w.p) - expected_log_prob(under, w.q)


@worlds
def test_S12_L_x_from_the_critic(w: World) -> None:
    f_q = expected_log_ratio(w, w.q)
    same(w.L_x(), f_q + w.C_x)
    refuses(w.L_x(), -f_q + w.C_x, f_q, expected_log_ratio(w, w.p) + w.C_x)


@worlds
def test_S13_L_z_from_the_critic(w: World) -> None:
    f_p = expected_log_ratio(w, w.p)
    same(w.L_z(), -f_p + w.C_z)
    refuses(w.L_z(), f_p + w.C_z, -f_p, -expected_log_ratio(w, w.q) + w.C_z)


@worlds
def test_S15_critic_objective_is_minus_the_symmetric_kl(w: World) -> None:
    ell = w.ell(w)
    same(ell, -w.kl_s())
    assert ell <= 0
    refuses(ell, w.kl_s(), -kl_divergence(w.q, w.p), -kl_divergence(w.p, w.q))


# Which gradient S14 follows when f* is frozen (open point 13) -----------------------------------


@worlds
def test_S14_frozen_gradient_follows_one_direction_per_player(w: World) -> None:
    w = w.with_grad()
    ell = w.ell(w.frozen())
    same(gradient(ell, w, THETA), gradient(-kl_divergence(w.p, w.q), w, THETA))
    same(gradient(ell, w, PHI), gradient(-kl_divergence(w.q, w.p), w, PHI))
    refuses(gradient(ell, w, THETA), gradient(-kl_divergence(w.q, w.p), w, THETA), gradient(-w.kl_s(), w, THETA))
    refuses(gradient(ell, w, PHI), gradient(-kl_divergence(w.p, w.q), w, PHI), gradient(-w.kl_s(), w, PHI))


@worlds
def test_S14_missing_halves_complete_the_symmetric_gradient(w: World) -> None:
    r"""∇ℓ(frozen) + ∇E_qφ log p_θ(x|z) + ∇E_pθ log q_φ(z|x), draws detached, is −∇KL_s."""
    w = w.with_grad()
    drawn = w.frozen()  # the expectations are taken here: draws carry no gradient
    detached = w.expected_log_decoder(drawn.q) + w.expected_log_encoder(drawn.p)
    attached = w.expected_log_decoder(w.q) + w.expected_log_encoder(w.p)  # S29 as printed, λ = 1
    for names in (THETA, PHI):
        target = gradient(-w.kl_s(), w, names)
        same(gradient(w.ell(drawn) + detached, w, names), target)
        refuses(gradient(w.ell(drawn) + attached, w, names), target)
        refuses(gradient(w.ell(drawn), w, names), target)


@worlds
def test_S15_gradient_through_the_critic_is_the_symmetric_gradient(w: World) -> None:
    w = w.with_grad()
    same(gradient(w.ell(w), w, THETA + PHI), gradient(-w.kl_s(), w, THETA + PHI))


def test_gradients_agree_with_finite_differences() -> None:
    w = World.random(2, 2, seed=3)

    def quantities(*theta_phi: Tensor) -> tuple[Tensor, ...]:
        v = World(w.m, w.S, *theta_phi)
        return v.L_x(), v.L_z(), v.kl_s(), v.ell(w)

    leaves = tuple(t.clone().requires_grad_() for t in w.parameters.values())
    assert torch.autograd.gradcheck(quantities, leaves)


# The world means what it says: Bayes' rule, integrals, Monte Carlo -------------------------------


@worlds
def test_joints_factorise_both_ways(w: World) -> None:
    x, z = points(w)
    xz = torch.cat([x, z], 1)
    log_p = w.p_z.log_prob(z) + w.p_x_given_z.at(z).log_prob(x)
    log_q = w.q_x.log_prob(x) + w.q_z_given_x.at(x).log_prob(z)
    same(w.p.log_prob(xz), log_p)
    same(w.p.log_prob(xz), w.p_x.log_prob(x) + w.p_z_given_x.at(x).log_prob(z))
    same(w.q.log_prob(xz), log_q)
    same(w.q.log_prob(xz), w.q_z.log_prob(z) + w.q_x_given_z.at(z).log_prob(x))
    same(w.log_ratio(x, z), log_p - log_q)
    refuses(w.log_ratio(x, z), log_q - log_p)


@worlds
def test_networks_are_the_same_world(w: World) -> None:
    x, z = points(w)
    same(w.encoder()(x).log_prob(z), w.q_z_given_x.at(x).log_prob(z))
    same(w.decoder()(z).log_prob(x), w.p_x_given_z.at(z).log_prob(x))


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_cubature_integrates_cubics(dim: int) -> None:
    points, eye = cubature(dim), torch.eye(dim, dtype=torch.float64)
    assert_close(points.mean(0), torch.zeros(dim).double())
    assert_close(points.mT @ points / len(points), eye)
    assert_close(torch.einsum("ni,nj,nk->ijk", points, points, points), torch.zeros(dim, dim, dim).double())


class Grid:
    r"""The 1-D × 1-D world as tables on a grid, from the four given densities and nothing else."""

    def __init__(self, w: World, n: int = 801) -> None:
        x, z = self.line(w.q_x, w.p_x, n), self.line(w.q_z, w.p_z, n)
        self.dx, self.dz = x[1] - x[0], z[1] - z[0]
        self.x, self.z = x[:, None], z[None, :]
        self.log_q_x = Normal(w.m, w.S.squeeze().sqrt()).log_prob(self.x)
        self.log_p_z = Normal(0.0, 1.0).log_prob(self.z)
        self.log_q_z_x = Normal(w.V * self.x + w.c, (w.t / 2).exp()).log_prob(self.z)
        self.log_p_x_z = Normal(w.W * self.z + w.b, (w.s / 2).exp()).log_prob(self.x)
        self.log_q, self.log_p = self.log_q_x + self.log_q_z_x, self.log_p_z + self.log_p_x_z
        self.q, self.p = self.log_q.exp(), self.log_p.exp()

    @staticmethod
    def line(a: MultivariateNormal, b: MultivariateNormal, n: int) -> Tensor:
        ends = [float(d.mean + k * d.stddev) for d in (a, b) for k in (-9, 9)]
        return torch.linspace(min(ends), max(ends), n, dtype=torch.float64)

    def E(self, under: Tensor, values: Tensor) -> Tensor:
        return (under * values).sum() * self.dx * self.dz

    def log_x(self, joint: Tensor) -> Tensor:
        return (joint.sum(1, keepdim=True) * self.dz).log()

    def log_z(self, joint: Tensor) -> Tensor:
        return (joint.sum(0, keepdim=True) * self.dx).log()


@pytest.mark.parametrize("seed", range(4))
def test_S1_S2_S5_S6_S7_S14_by_integrals_on_a_grid(seed: int) -> None:
    w, critic = World.random(1, 1, seed), World.random(1, 1, seed + 100)
    g, h = Grid(w), Grid(w)
    h.log_q, h.log_p = (d.log_prob(torch.stack(torch.broadcast_tensors(g.x, g.z), -1)) for d in (critic.q, critic.p))
    q, p, E = g.q, g.p, g.E
    tiny = torch.finfo(torch.float64).tiny  # 0 log 0 = 0 far outside
    log_p_x, log_q_z = g.log_x(p + tiny), g.log_z(q + tiny)
    f, frozen = g.log_p - g.log_q, h.log_p - h.log_q
    same(E(q, torch.ones_like(q)), torch.ones(()).double())
    same(E(p, torch.ones_like(p)), torch.ones(()).double())
    same(w.L_x(), E(q, g.log_p - g.log_q_z_x))
    same(w.L_z(), E(p, g.log_q - g.log_p_x_z))
    same(w.C_x, E(q, g.log_q_x))
    same(w.C_z, E(p, g.log_p_z))
    same(w.kl_s(), E(p, f) - E(q, f))
    same(w.ell(critic), E(q, frozen) - E(p, frozen))
    same(expected_log_prob(w.q_x, w.p_x), E(q, log_p_x))
    same(kl_divergence(w.q_z, w.p_z), E(q, log_q_z - g.log_p_z))
    same(expected_kl(w.q_z_given_x, w.p_z_given_x, w.q_x), E(q, g.log_q_z_x - g.log_p + log_p_x))
    same(expected_kl(w.q_x_given_z, w.p_x_given_z, w.q_z), E(q, g.log_q - log_q_z - g.log_p_x_z))


@pytest.mark.parametrize(("x_dim", "z_dim"), [(1, 1), (3, 2), (2, 5)])
def test_S1_S2_S5_S6_S7_S12_S13_by_monte_carlo(x_dim: int, z_dim: int) -> None:
    r"""Ancestral draws from the four given densities; four standard errors, fixed seed."""
    w, generator = World.random(x_dim, z_dim, seed=5), torch.Generator().manual_seed(0)
    noise_q, noise_p = torch.randn(2, 200_000, x_dim + z_dim, generator=generator, dtype=torch.float64)
    (x_q, z_q), (x_p, z_p) = w.encoder_pairs(noise_q), w.decoder_pairs(noise_p)
    (qx, qzx, pz, pxz), (qx_, qzx_, pz_, pxz_) = four(w, x_q, z_q), four(w, x_p, z_p)
    for exact, sample in [
        (w.L_x(), pz + pxz - qzx),
        (w.L_z(), qx_ + qzx_ - pxz_),
        (w.C_x, qx),
        (w.C_z, pz_),
        (w.kl_s(), (qx + qzx - pz - pxz) + (pz_ + pxz_ - qx_ - qzx_)),
        (w.L_x(), w.log_ratio(x_q, z_q) + w.C_x),  # S12
        (w.L_z(), -w.log_ratio(x_p, z_p) + w.C_z),  # S13
        (expected_log_prob(w.q_x, w.p_x), w.p_x.log_prob(x_q)),
    ]:
        estimates(sample, exact)


def test_conditional_is_bayes_rule() -> None:
    w = World.random(2, 3, seed=1)
    back = conditional(w.q, w.z, w.x)  # the encoder, recovered from its joint
    for mine, given_ in [(back.gain, w.V), (back.offset, w.c), (back.cov, w.t.exp().diag())]:
        same(mine, given_)
