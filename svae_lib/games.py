r"""Learning as a vector field: what a frozen critic and detached draws do to a gradient, in the exact world.

A frozen objective is a function of *two* worlds, o(w, at): w is the one that learns, and `at` is the one in
which the critic was computed and from which detached draws come. Its value is read at at = w. Learning
follows the gradient in w alone,

    F(w) = ∇_w o(w, at) at at = w,

and that need not be the gradient of anything: it is one only if the Jacobian of F is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from svae_lib.exact import PHI, THETA, World

Objective = Callable[[World, World], Tensor]


def svae(w: World, at: World) -> Tensor:
    r"""S14, S15: E_qφ f* − E_pθ f* with the critic f* of `at`: θ descends KL(p_θ ‖ q_φ), φ descends KL(q_φ ‖ p_θ)."""
    return w.ell(at)


def wake_sleep(w: World, at: World) -> Tensor:
    r"""S14, S15: what S14 misses, E_qφ log p_θ(x|z) + E_pθ log q_φ(z|x) over pairs from `at`: θ descends
    KL(q_φ ‖ p_θ), φ descends KL(p_θ ‖ q_φ). Sources: Hinton et al. 1995; as a game, Flach et al. 2024."""
    return w.expected_log_decoder(at.q) + w.expected_log_encoder(at.p)


def svae_exact(w: World, at: World) -> Tensor:
    r"""S15: S14 and wake–sleep together; both players descend KL_s(q_φ ‖ p_θ)."""
    return svae(w, at) + wake_sleep(w, at)


def svae_r(weight: float) -> Objective:
    r"""S29: S14 + λ [E_qφ log p_θ(x|z) + E_pθ log q_φ(z|x)] with the pairs drawn from w itself; `weight` is λ."""
    return lambda w, at: svae(w, at) + weight * wake_sleep(w, w)


def field(objective: Objective, w: World) -> Tensor:
    r"""F(w), the direction in which (W, b, s, V, c, t) move, flattened in this order; (n,)."""
    learning = w.with_grad()
    parameters = list(learning.parameters.values())
    gradients = torch.autograd.grad(objective(learning, w.frozen()), parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def jacobian(objective: Objective, w: World) -> Tensor:
    r"""∂F_i / ∂w_j, through the learning world and through the frozen one; (n, n)."""

    def moving_field(parameters: dict[str, Tensor]) -> Tensor:
        def of_two(learning: dict[str, Tensor], frozen: dict[str, Tensor]) -> Tensor:
            return objective(replace(w, **learning), replace(w, **frozen))

        gradients = torch.func.grad(of_two)(parameters, parameters)  # in the first argument only
        return torch.cat([gradients[k].flatten() for k in THETA + PHI])

    blocks = torch.func.jacrev(moving_field)(w.parameters)
    return torch.cat([blocks[k].flatten(1) for k in THETA + PHI], 1)
