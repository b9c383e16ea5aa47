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


def wgan_gp_critic(d: Draws) -> Tensor:
    r"""S25 minus λ E(‖∇f‖ − 1)² between data and draws. Source: Gulrajani et al. 2017."""
    mix = torch.rand(len(d.x), device=d.x.device)
    penalty = ipm.gradient_penalty(d.model.critics[0], (d.x,), (d.x_p.detach(),), mix)
    return of_x(objectives.ipm)(d) - d.weight * penalty


def without_codes(name: str, summary: str, equations: tuple[str, str], player, critic, **defaults) -> Method:
    r"""A row whose decoder is a generator without a density."""
    published = {"decoder": "point"} | defaults
    return Method(name, summary, *equations, player, critic, ("x",), codes=False, defaults=published)


gan_critic, descend = of_x(objectives.critic_lrt), of_x(objectives.symmetric)

ROWS = (
    without_codes("gan", "GAN, labels exchanged", ("S22", "S24"), of_x(objectives.non_saturating), gan_critic),
    without_codes("gan-saturating", "GAN as a zero-sum game", ("S22", "S18"), of_x(objectives.saturating), gan_critic),
    without_codes("gan-symmetric", "GAN whose generator lowers f itself", ("S22", "S23"), descend, gan_critic),
    without_codes(
        "wgan", "Wasserstein GAN, weights clipped", ("S25", "S25"), descend, of_x(objectives.ipm),
        clip=0.01, critic_steps=5,
    ),
    without_codes(
        "wgan-gp", "Wasserstein GAN, slope penalised", ("S25", "S25"), descend, wgan_gp_critic,
        weight=10.0, critic_steps=5, beta1=0.5,
    ),
)  # fmt: skip
