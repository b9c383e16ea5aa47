r"""The methods without an encoder: a generator, and a critic of data alone.

The critic sees f_q = f_ψ(x) and f_p = f_ψ(x̃); everything else is as with codes (`svae_lib.methods`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svae_lib import ipm, objectives
from svae_lib.draws import Draws, Method

Scores = Callable[[Tensor, Tensor], Tensor]


def of_x(objective: Scores) -> Callable[[Draws], Tensor]:
    r"""An objective of (f_q, f_p) as one of draws."""
    return lambda d: objective(d.score(d.x), d.score(d.x_p))


def of_features(metric: Scores) -> Scores:
    r"""A metric of features (φ_q, φ_p), both (B, m), as one of scores: a single feature comes as (B,)."""
    return lambda phi_q, phi_p: metric(phi_q.reshape(len(phi_q), -1), phi_p.reshape(len(phi_p), -1))


def lowered(objective: Callable[[Draws], Tensor]) -> Callable[[Draws], Tensor]:
    r"""The players' side of a metric: they minimise what the critic maximises."""
    return lambda d: -objective(d)


# Wasserstein -------------------------------------------------------------------------------------------


def wgan_gp_critic(d: Draws) -> Tensor:
    r"""S25 minus λ E(‖∇f‖ − 1)² between data and draws. Source: Gulrajani et al. 2017."""
    mix = torch.rand(len(d.x), device=d.x.device)
    penalty = ipm.gradient_penalty(d.model.critics[0], (d.x,), (d.x_p.detach(),), mix)
    return of_x(objectives.ipm)(d) - d.weight * penalty


def mix_wgan(d: Draws) -> Tensor:
    r"""S25 for a mixture Σ_i w_i p_i of T generators: E_q f − Σ_i w_i E_{p_i} f + (λ/T) Σ_i log w_i.

    The last term is largest for equal weights and keeps each of them positive. Arora et al. mix critics too; S25
    is linear in f, so a mixture Σ_j v_j f_j of critics is one critic, and one is what is trained here, on draws
    of the mixture. Every component meets every z, so that the weights get a gradient without a score-function
    estimate. With one component it is WGAN. Source: Arora et al. 2017.
    """
    generator = d.model.decoder
    f_p = torch.stack([d.score(x).mean() for x in generator.components(d.z_p)])
    log_w = generator.log_weights
    return d.score(d.x).mean() - (log_w.exp() * f_p).sum() + d.weight * log_w.mean()


# Other classes of critics ----------------------------------------------------------------------------------


def mmd(phi_q: Tensor, phi_p: Tensor) -> Tensor:
    r"""S25 with F = {g ∘ φ_ψ : ‖g‖_k ≤ 1}: MMD² of the critic's features, k a sum of Gaussian kernels.

    Li et al. also train a decoder of φ_ψ, so that φ_ψ loses nothing, and keep E φ_ψ(x) ≥ E φ_ψ(x̃); here the
    clipped weights of φ_ψ are the only constraint. Source: Li et al. 2017 (MMD GAN).
    """
    return ipm.mmd2(phi_q, phi_p, ipm.gaussian_mixture_kernel)


def fisher_critic(d: Draws) -> Tensor:
    r"""S25 with F = {f : ½ E_q f² + ½ E_p f² = 1}: the augmented Lagrangian, ρ = λ. Source: Mroueh & Sercu 2017."""
    multiplier = d.model.critics[0].multiplier
    return of_x(lambda f_q, f_p: ipm.fisher_lagrangian(f_q, f_p, multiplier, rho=d.weight))(d)


@torch.no_grad()
def fisher_multiplier(d: Draws) -> None:
    r"""λ ← λ + ρ(½ E_q f² + ½ E_p f² − 1), after each critic step; it is saved with the critic."""
    f_q, f_p = d.score(d.x), d.score(d.x_p)
    d.model.critics[0].multiplier += d.weight * (0.5 * (f_q.square().mean() + f_p.square().mean()) - 1)


def eb_critic(d: Draws) -> Tensor:
    r"""S25 with F = {f : 0 ≤ f ≤ m}: low energy at data, m = λ or more at draws. Source: Zhao et al. 2017."""
    return of_x(lambda f_q, f_p: ipm.energy_margin(f_q, f_p, margin=d.weight))(d)


def eb_player(d: Draws) -> Tensor:
    r"""−E_pθ f: the players lower the energy of draws. Source: Zhao et al. 2017."""
    return -d.score(d.x_p).mean()


# The rows ----------------------------------------------------------------------------------------------


def without_codes(
    name: str, summary: str, equations: tuple[str, str], player, critic, /,
    critics=("x",), after_critic=None, data=("images", "points"), on_points=None, separable=True, **defaults,
) -> Method:  # fmt: skip
    r"""A row whose decoder is a generator without a density."""
    return Method(
        name, summary, *equations, player, critic, critics, codes=False, after_critic=after_critic, data=data,
        defaults={"decoder": "point"} | defaults, on_points=on_points or {}, separable=separable,
    )  # fmt: skip


gan_critic, descend = of_x(objectives.critic_lrt), of_x(objectives.symmetric)
non_saturating = of_x(objectives.non_saturating)
mmd_features, mean_features = of_x(of_features(mmd)), of_x(of_features(ipm.mean_matching))
covariance_features = of_x(of_features(ipm.covariance_matching))

# Clipped critics were published with RMSProp, which is Adam with β1 = 0: they do not bear momentum.
CLIPPED = {"clip": 0.01, "critic_steps": 5, "beta1": 0.0, "beta2": 0.99}
FEATURES = CLIPPED | {"critic_outputs": 16, "separable": False}

ROWS = (
    without_codes("gan", "GAN, labels exchanged", ("S22", "S24"), non_saturating, gan_critic),
    without_codes("gan-saturating", "GAN as a zero-sum game", ("S22", "S18"), of_x(objectives.saturating), gan_critic),
    without_codes("gan-symmetric", "GAN whose generator lowers f itself", ("S22", "S23"), descend, gan_critic),
    without_codes(
        "dcgan", "GAN with deep convolutional nets; images only", ("S22", "S24"), non_saturating, gan_critic,
        data=("images",), architecture="dcgan", z_dim=100, critic_dropout=0.0, batch=128,
        lr=2e-4, critic_lr=2e-4, beta1=0.5,
    ),
    without_codes(
        "wgan", "Wasserstein GAN: the critic's weights are clipped", ("S25", "S25"), descend, of_x(objectives.ipm),
        **CLIPPED,
    ),
    without_codes(  # no BatchNorm: the penalty is on the slope at one sample
        "wgan-gp", "Wasserstein GAN: the critic's slope is held at one by a penalty", ("S25", "S25"),
        descend, wgan_gp_critic, weight=10.0, on_points={"weight": 0.1},
        critic_steps=5, beta1=0.5, beta2=0.9, critic_norm="none", critic_dropout=0.0,
    ),
    without_codes(
        "mix-wgan", "Wasserstein GAN: several generators with learned weights", ("S25", "S25"),
        mix_wgan, of_x(objectives.ipm), components=5, weight=1e-3, separable=False, **CLIPPED,
    ),
    without_codes(
        "mmd-gan", "maximum mean discrepancy of learned, bounded features", ("S25", "S25"),
        lowered(mmd_features), mmd_features, **FEATURES,
    ),
    without_codes(  # ρ is the paper's, for some 10⁵ updates; points are done in fewer
        "fisher-gan", "the critic's second moment is held at one by a multiplier", ("S25", "S25"),
        descend, fisher_critic, after_critic=fisher_multiplier, weight=1e-6, on_points={"weight": 0.1},
        critic_steps=2, beta1=0.5, separable=False,
    ),
    without_codes(
        "mcgan-mean", "distance between the means of learned, bounded features", ("S25", "S25"),
        lowered(mean_features), mean_features, **FEATURES,
    ),
    without_codes(
        "mcgan-cov", "nuclear norm between the covariances of learned, bounded features", ("S25", "S25"),
        lowered(covariance_features), covariance_features, **FEATURES,
    ),
    without_codes(  # a margin that the error of the autoencoder on data falls well below
        "eb-gan", "energy-based GAN: the critic is the error of an autoencoder", ("S25", "S25"),
        eb_player, eb_critic, critics=("energy",), weight=10.0, on_points={"weight": 0.3}, beta1=0.5,
    ),
)  # fmt: skip
