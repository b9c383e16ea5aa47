r"""Every objective as a pure function of critic scores and log-densities.

Conventions of paper S, everywhere: f_q = f_ψ(x, z̃) with z̃ ~ q_φ(z|x) is the critic's
score of an encoder pair, f_p = f_ψ(x̃, z) with x̃ ~ p_θ(x|z) that of a decoder pair, and
the optimal critic is f* = log p_θ(x, z) − log q_φ(x, z). Without codes f_q = f_ψ(x) and f_p = f_ψ(x̃):
the GAN. All arguments are (B,); all results but the labels of `likelihood_ratio_test` are scalars
**to be maximised**, in nats. Nothing is detached here: which tensors carry a gradient is decided
where the draws are made (`svae_lib.draws`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def elbo(log_p_x_given_z: Tensor, kl_to_prior: Tensor) -> Tensor:
    r"""S1: L_x = E_q(x) [E_qφ(z|x) log p_θ(x|z) − KL(q_φ(z|x) ‖ p(z))], the VAE."""
    return (log_p_x_given_z - kl_to_prior).mean()


def critic_lrt(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S10, S22, A4: g(ψ) = E_qφ log(1 − σ(f_ψ)) + E_pθ log σ(f_ψ); at its maximum f_ψ = f* (S11).

    A5 and A6 are the same function of other pairs: f_ψ1 is raised on encoder pairs and lowered on pairs
    drawn from p_θ(x) p(z), f_ψ2 is raised on decoder pairs and lowered on pairs from q(x) q_φ(z).
    """
    return logsigmoid(-f_q).mean() + logsigmoid(f_p).mean()


def likelihood_ratio_test(f: Tensor) -> Tensor:
    r"""S16, S17: log p_θ/q_φ > 0 says decoder (True), < 0 says encoder (False); (B,) -> (B,)."""
    return f > 0


def symmetric(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S14, S23: ℓ(θ, φ; ψ) = E_qφ f_ψ − E_pθ f_ψ, which is −KL_s(q_φ ‖ p_θ) at ψ = ψ* (S15, S20)."""
    return f_q.mean() - f_p.mean()


def saturating(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S18, A3: −g(ψ), the players' side of ALI's min_θ,φ max_ψ g(ψ); A3 is the same with f → −f."""
    return -critic_lrt(f_q, f_p)


def non_saturating(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S19, S24: E_qφ log σ(f_ψ) + E_pθ log σ(−f_ψ), which is g(ψ) with its labels exchanged.

    With `saturating` it adds up to `symmetric`. In the GAN (S24) the first term does not depend on θ.
    """
    return critic_lrt(f_q=f_p, f_p=f_q)


def ipm(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S25: E_pθ f_ψ − E_qφ f_ψ, the critic's side of an integral probability metric sup_{f ∈ F}.

    The players' side is `symmetric`; the class F alone decides what is measured (`svae_lib.ipm`).
    S25 has −f_ψ for f_ψ.
    """
    return -symmetric(f_q, f_p)


def symmetric_with_reconstruction(
    f_q: Tensor, f_p: Tensor, log_p_x_given_z: Tensor, log_q_z_given_x: Tensor, weight: float
) -> Tensor:
    r"""S29: ℓ' = E_qφ[f_ψ + λ log p_θ(x|z)] − E_pθ[f_ψ − λ log q_φ(z|x)].

    `log_p_x_given_z` is taken on encoder pairs, `log_q_z_given_x` on decoder pairs, `weight` is λ.
    With λ = 1 and both log-densities taken at *detached* draws the gradient of ℓ' is that of
    −KL_s exactly (proved in tests/equations/test_objectives.py); with the draws attached it is S29 as printed.
    """
    reconstruction = log_p_x_given_z.mean() + log_q_z_given_x.mean()
    return symmetric(f_q, f_p) + weight * reconstruction


def wake_sleep(log_p_x_given_z: Tensor, log_q_z_given_x: Tensor) -> Tensor:
    r"""S14, S15: E_qφ log p_θ(x|z) + E_pθ log q_φ(z|x), the half of −∇KL_s that a frozen critic misses.

    Both log-densities are taken at *detached* draws. Then θ descends KL(q_φ ‖ p_θ) (wake) and φ descends
    KL(p_θ ‖ q_φ) (sleep). Sources: Hinton et al. 1995; as a game of two players, Flach et al. 2024.
    """
    return log_p_x_given_z.mean() + log_q_z_given_x.mean()


def l_z(f_p: Tensor, log_q_z_given_x: Tensor) -> Tensor:
    r"""S13 with the half of its gradient that a frozen critic misses: −E_pθ[f_ψ − log q_φ(z|x)].

    `log_q_z_given_x` is taken on decoder pairs at *detached* draws. At ψ = ψ* the gradient is then that of
    L_z = −KL(p_θ ‖ q_φ) + C_z in θ (through f) and in φ (through log q_φ).
    """
    return log_q_z_given_x.mean() - f_p.mean()


def adversarial_symmetric(log_p_x_given_z: Tensor, f_1: Tensor, log_q_z_given_x: Tensor, f_2: Tensor) -> Tensor:
    r"""A10, A11: E_qφ[log p_θ(x|z) − f_ψ1(x, z)] + E_pθ[log q_φ(z|x) − f_ψ2(x, z)].

    The first two on encoder pairs, the other two on decoder pairs, with paper A's critics:
    f_ψ1* = log q_φ(x, z) − log p_θ(x) p(z) has the other sign than f*, f_ψ2* = log p_θ(x, z) − log q(x) q_φ(z)
    has the same. The first half alone is AS-VAE-r, the second AS-VAE-g.
    """
    return (log_p_x_given_z - f_1).mean() + (log_q_z_given_x - f_2).mean()
