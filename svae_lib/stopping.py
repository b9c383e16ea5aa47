r"""Early stopping on the reconstruction of validation data, as paper A does (§5); no objective contains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svae_lib.draws import Draws


@torch.no_grad()
def cycle_loss(d: Draws) -> float:
    r"""The average reconstruction loss of x and z: −½ (E log p_θ(x|z̃)/D + E log q_φ(z|x̃)/d), nats for each number.

    x → z̃ → x over D numbers, z → x̃ → z over d. How paper A averages the two is unstated.
    """
    per_x = d.log_p_x_given_z.mean() / d.x[0].numel()
    per_z = d.log_q_z_given_x.mean() / d.z_p[0].numel()
    return -0.5 * (per_x + per_z).item()


class EarlyStop:
    r"""Remembers the players whose loss was least; `over` after `patience` logs that were not better."""

    BATCHES = 16  # of validation data, for each log

    def __init__(self, patience: int) -> None:
        self.patience, self.losses, self.best = patience, [], {}

    def look(self, loss: float, players: nn.Module) -> None:
        r"""Take note of one log."""
        self.losses.append(loss)
        if loss == min(self.losses):
            self.best = {name: value.detach().clone() for name, value in players.state_dict().items()}

    @property
    def over(self) -> bool:
        r"""Whether it is time to stop."""
        return bool(self.losses) and len(self.losses) - 1 - self.losses.index(min(self.losses)) >= self.patience

    def state_dict(self) -> dict[str, Any]:
        r"""For a checkpoint."""
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""From a checkpoint."""
        self.losses, self.best = state["losses"], state["best"]
