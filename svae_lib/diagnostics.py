r"""What is logged of a method besides its own objectives, from draws that the training did not see."""

from __future__ import annotations

import torch

from svae_lib.densities import Point
from svae_lib.draws import Draws, Method


@torch.no_grad()
def of_players(method: Method, draws: Draws) -> dict[str, float]:
    r"""The player objective, and with codes the reconstruction E log p_θ(x|z̃) and the KL to the prior, in nats."""
    row = {"objective": method.player(draws).item()}
    if method.codes and not isinstance(draws.p_x_given_z_q, Point):
        row["reconstruction"] = draws.log_p_x_given_z.mean().item()
    if method.codes and not isinstance(draws.q_z_given_x, Point):
        row["kl"] = draws.kl_to_prior.mean().item()
    return row


def of_critics(method: Method, draws: Draws) -> dict[str, float]:
    r"""−g(ψ), and of the first critic: accuracy, mean and std of f on both kinds of pairs, rms slopes of f in x and z.

    q are the pairs on which f is lowered and p those on which it is raised: of S10 the encoder's and the decoder's, of
    A5 independent pairs and the encoder's.
    """
    if method.critic is None:
        return {}
    draws.scored = []
    row = {"critic_loss": -method.critic(draws).item()}
    (f_q, q), (f_p, p) = draws.scored[:2]
    if f_q.dim() > 1:  # features, not scores
        return row
    row["accuracy"] = 0.5 * ((f_q < 0).float().mean() + (f_p > 0).float().mean()).item()
    for joint, scores, pair in (("q", f_q, q), ("p", f_p, p)):
        slopes = torch.autograd.grad(scores.sum(), pair)
        row |= {f"f_{joint}_mean": scores.mean().item(), f"f_{joint}_std": scores.std().item()}
        for name, slope in zip("xz", slopes, strict=False):  # no z without codes
            row[f"slope_{joint}_{name}"] = slope.flatten(1).square().sum(1).mean().sqrt().item()
    return row
