r"""The statements that proofs are made of; each is recorded for the claims ledger (`svae verify`).

A test called `test_S14_...` belongs to equation S14, `test_S16_S17_...` to both. Comparisons are in
float64 and relative to 1e-8, gradients too; round-off is near 1e-12, so a wrong sign or a missing
term cannot pass, and `refuses` shows that it does not.
"""

from __future__ import annotations

from functools import partial

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svae_lib.exact import PHI, THETA, World

RTOL = 1e-8
STANDARD_ERRORS = 4
OBSERVED: list[tuple[str, float]] = []  # of the test that is running: kind of statement, observed error


def difference(a: Tensor, b: Tensor) -> float:
    r"""The largest |a − b| relative to 1 + the largest |b|."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / (1 + b.detach().abs().max()))


def same(a: Tensor, b: Tensor) -> None:
    r"""a = b to a relative error of 1e-8."""
    error = difference(a, b)
    OBSERVED.append(("exact", error))
    assert error <= RTOL, f"they differ by {error:.2g}"


def refuses(a: Tensor, *wrong: Tensor) -> None:
    r"""`same` would reject each of these."""
    for b in wrong:
        assert difference(a, b) > RTOL


def standard_errors(samples: Tensor, truth: Tensor | float) -> float:
    r"""|mean of the samples − truth| in standard errors of the mean."""
    return float((samples.mean() - truth).abs() / (samples.std() / len(samples) ** 0.5))


def estimates(samples: Tensor, truth: Tensor | float) -> None:
    r"""The mean of independent samples is `truth` within four standard errors; (B,)."""
    error = standard_errors(samples, truth)
    OBSERVED.append(("Monte Carlo", error))
    assert error <= STANDARD_ERRORS, f"{error:.1f} standard errors away"


def refuses_estimates(samples: Tensor, *wrong: Tensor | float) -> None:
    r"""`estimates` would reject each of these."""
    for value in wrong:
        assert standard_errors(samples, value) > STANDARD_ERRORS


def about(value: Tensor | float, truth: Tensor | float, tolerance: float) -> None:
    r"""A trained or numerically integrated value is `truth` up to a stated absolute tolerance."""
    error = float((torch.as_tensor(value) - torch.as_tensor(truth)).detach().abs().max())
    OBSERVED.append(("empirical", error))
    assert error <= tolerance, f"{error:.2g} away, allowed is {tolerance:.2g}"


def proved(expression: sympy.Expr) -> None:
    r"""The symbolic expression is identically zero."""
    assert sympy.simplify(expression) == 0, expression
    OBSERVED.append(("proved", 0.0))


def disproved(expression: sympy.Expr) -> None:
    r"""The symbolic expression is not identically zero."""
    assert sympy.simplify(expression) != 0, expression


DIMS, SEEDS = st.integers(1, 8), st.integers(0, 2**31 - 1)
WORLDS = st.builds(World.random, x_dim=DIMS, z_dim=DIMS, seed=SEEDS)
PROOF = settings(derandomize=True, deadline=None, max_examples=30)


def worlds(test=None, **others):
    r"""Run a proof at 30 random worlds `w`, the same ones every time; `others` are further strategies."""
    if test is None:
        return partial(worlds, **others)
    return PROOF(given(**{"w": WORLDS} | others)(test))


def gradient(value: Tensor, w: World, names: tuple[str, ...] = THETA + PHI) -> Tensor:
    r"""The gradient of a scalar in parameters of the world, as one vector."""
    parameters = [w.parameters[k] for k in names]
    grads = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])
