r"""The GAN's generator: what a draw is charged, and what a generator descends while the critic is frozen.

Without codes the critic learns f* = log p_θ(x)/q(x) (S21, S22). The generator then minimises E_pθ C(f*) with f*
held fixed; C is the *charge* of a draw. The θ-derivative of E_pθ C(f*) is ∫ C(log p_θ/q) ∂_θ p_θ dx, and so is that of

    ∫ q k(p_θ/q) dx,    k′(r) = C(log r).

If C increases, k is convex and this is an f-divergence, zero for p_θ = q up to a constant of k. Every rule for
training a generator on f* is one charge, hence one divergence (Poole et al. 2016). Tables as in `svae_lib.grid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from svae_lib.grid import kl


@dataclass(frozen=True)
class Rule:
    r"""A charge C(f), elementwise, and the divergence (log p, log q) -> nats whose gradient it gives."""

    charge: Callable[[Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]


def halfway(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Log-masses of M = ½ (p + q)."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""JS = ½ KL(p ‖ M) + ½ KL(q ‖ M), at most log 2."""
    m = halfway(log_p, log_q)
    return 0.5 * (kl(log_p, m) + kl(log_q, m))


def least_squares(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""2 KL(q ‖ M) + ½ − E_q q/(p + q), which is what E_p (1 − D)² descends if D = q/(p + q) is held fixed."""
    return 2 * kl(log_q, halfway(log_p, log_q)) + 0.5 - (log_q.exp() * (log_q - log_p).sigmoid()).sum()


RULES: dict[str, Rule] = {
    "symmetric": Rule(lambda f: f, lambda p, q: kl(p, q)),  # S23
    "saturating": Rule(logsigmoid, lambda p, q: 2 * jensen_shannon(p, q)),  # E log(1 − D)
    "non-saturating": Rule(lambda f: -logsigmoid(-f), lambda p, q: 2 * kl(halfway(p, q), q)),  # S24, −E log D
    "least squares": Rule(lambda f: f.sigmoid().square(), least_squares),  # E (1 − D)²
    "hinge": Rule(lambda f: f.sign(), lambda p, q: (p.exp() - q.exp()).abs().sum()),
    "likelihood": Rule(lambda f: -(-f).exp(), lambda p, q: kl(q, p)),
    "Jeffreys": Rule(lambda f: f - (-f).exp(), lambda p, q: kl(p, q) + kl(q, p)),
}


def frozen(charge: Callable[[Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""S23, S24: E_pθ C(f*) of two tables of log-masses, to be minimised.

    f* = log p − log q (S21) is frozen, so the gradient is that of the rule's divergence.
    """
    f_star = (log_p - log_q).detach()
    return (log_p.exp() * charge(f_star)).sum()
