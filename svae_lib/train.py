r"""The one alternating update, and the loop around it: checkpoint, resume, EMA, diagnostics, progress."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from svae_lib.data import Split, grey
from svae_lib.densities import Point
from svae_lib.draws import Draws, Method, Model, mean_squared_slope
from svae_lib.errors import UserError
from svae_lib.ipm import clip_weights

CHECKPOINT_SECONDS = 60  # how much work an interruption may cost


@dataclass(frozen=True)
class Training:
    r"""Everything the loop needs to know. One update = `critic_steps` critic steps and one player step."""

    updates: int = 1000
    batch: int = 64
    lr: float = 1e-4  # Adam, players (S §6)
    critic_lr: float = 1e-4  # Adam, critic (S §6)
    beta1: float = 0.9  # Adam's default: unstated in the papers
    beta2: float = 0.999  # likewise
    critic_steps: int = 1
    weight: float = 0.3  # λ of the method; S29: S §6
    penalty: float = 0.0  # weight of E‖∇f‖² on all that the critics are shown
    decay: bool = False  # both step sizes fall linearly to zero
    clip: float = 0.0  # critic weights are kept in [−clip, clip]; 0: free
    ema: float = 0.0  # decay of the averaged players that are evaluated; 0: the last ones
    precision: str = "fp32"  # or bf16: autocast in training, never in evaluation
    log_every: int = 100

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "critic_steps", "log_every", "lr", "critic_lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision must be fp32 or bf16, not '{self.precision}'")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be at least 0 and below 1, not {self.ema}")


class Diverged(UserError):
    r"""Training produced numbers that are not finite."""


class Trainer:
    r"""Trains `model` by `method` on `data`; `held_out` is only looked at for diagnostics.

    Initial weights are the caller's; `seed` starts the stream of batches and noise. The whole state is
    one dictionary: a run that was stopped and resumed ends in the same bits as one that was not.
    Everything lives on the device of `data`. `identity` names the experiment in its checkpoints. `runs` > 1 says
    that the nets are stacked (`svae_lib.ensembles`): the batch is for each of them, the diagnostics for all together.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        training: Training,
        data: Split,
        held_out: Split,
        seed: int,
        identity: str = "",
        runs: int = 1,
    ) -> None:
        self.model, self.method, self.training = model, method, training
        self.data, self.held_out, self.seed, self.runs = data, held_out, seed, runs
        self.device = data.images.device
        self.identity, self.done, self.seconds = identity, 0, 0.0
        self.writes = True  # checkpoints and progress; of several processes only the first does
        self.history: list[dict[str, float]] = []
        self.player_optimiser = self._adam(model.players, training.lr)
        self.critics = torch.nn.ModuleList(model.critics)
        self.critic_optimiser = self._adam(self.critics, training.critic_lr) if model.critics else None
        self.average = None
        if training.ema:
            self.average = AveragedModel(model.players, multi_avg_fn=self._follow, use_buffers=True)

    def _adam(self, net: torch.nn.Module, lr: float) -> torch.optim.Adam:
        fused = self.device.type != "mps"
        return torch.optim.Adam(net.parameters(), lr=lr, betas=(self.training.beta1, self.training.beta2), fused=fused)

    def _follow(self, average: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        r"""EMA whose decay grows to `ema`, so that the initial weights are forgotten in short runs too."""
        decay = min(self.training.ema, (1 + self.done) / (10 + self.done))
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - decay)
        else:  # the batch counters of BatchNorm
            torch._foreach_copy_(average, current)

    # One update ---------------------------------------------------------------------------

    def update(self) -> None:
        r"""One alternating update: the critic climbs its objective, then the players climb theirs."""
        if self.training.decay:
            left = 1 - self.done / self.training.updates
            self.player_optimiser.param_groups[0]["lr"] = left * self.training.lr
            if self.critic_optimiser is not None:
                self.critic_optimiser.param_groups[0]["lr"] = left * self.training.critic_lr
        draws = self.draw(self.data)
        if self.method.critic is not None:
            for step in range(self.training.critic_steps):
                draws = self.draw(self.data) if step else draws
                self.critic_step(draws)
        self.player_step(draws)
        if self.average is not None:
            self.average.update_parameters(self.model.players)
        self.done += 1

    def draw(self, split: Split, parts: int = 1) -> Draws:
        r"""A batch of data and of prior codes, or one of its `parts`; both joints follow when asked for."""
        size = self.runs * self.training.batch // parts
        rows = torch.randint(len(split), (size,), device=self.device)
        z_p = torch.randn(size, self.model.z_dim, device=self.device)
        return Draws(self.model, grey(split.take(rows)), z_p, self.training.weight, runs=self.runs)

    def critic_step(self, draws: Draws) -> None:
        r"""ψ climbs g(ψ) with (θ, φ) fixed: the gradient stops at the draws (S10)."""
        draws.scored = [] if self.training.penalty else None
        with self._autocast():
            loss = -self.method.critic(draws)
            for scores, pair in draws.scored or ():
                loss = loss + self.training.penalty * mean_squared_slope(scores, pair)
        draws.scored = None
        self._descend(loss, self.critic_optimiser)
        if self.training.clip:
            clip_weights(self.critics, self.training.clip)
        if self.method.after_critic is not None:
            self.method.after_critic(draws)

    def player_step(self, draws: Draws) -> None:
        r"""θ and φ climb the player objective with ψ fixed: gradients pass through f, not into it (S14)."""
        with self._autocast():
            loss = -self.method.player(draws)
        self._descend(loss, self.player_optimiser)

    def _descend(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        r"""One step of the optimiser's own parameters; no other parameter gets a gradient."""
        optimiser.zero_grad()
        (self.runs * loss).backward(inputs=optimiser.param_groups[0]["params"])
        optimiser.step()

    def _autocast(self):
        if self.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # The loop -----------------------------------------------------------------------------

    def fit(self, checkpoint: Path | None = None, on_log: Callable[[dict], None] | None = None) -> None:
        r"""Update until `training.updates` are done. `checkpoint` is resumed from, if it exists, and kept.

        `on_log` receives the diagnostics every `log_every` updates. Raises Diverged when they are not finite.
        """
        torch.manual_seed(self.seed)
        if checkpoint is not None and checkpoint.exists():
            self.load_state(read_checkpoint(checkpoint))
        nets = (self.model.players, self.critics)
        start = saved = time.perf_counter()
        shown = {"disable": None if self.writes else True, "file": sys.stderr}
        with tqdm(total=self.training.updates, initial=self.done, **shown) as bar:
            while self.done < self.training.updates:
                for net in nets:
                    net.train()
                self.update()
                bar.update()
                now = time.perf_counter()
                if self.done % self.training.log_every == 0 or self.done == self.training.updates:
                    self.seconds, start = self.seconds + now - start, now
                    self.history.append(self.diagnose())
                    if on_log is not None:
                        on_log(self.history[-1])
                if checkpoint is not None and self.writes and now - saved > CHECKPOINT_SECONDS:
                    self.seconds, start, saved = self.seconds + now - start, now, now
                    write_checkpoint(self.state(), checkpoint)
        if checkpoint is not None and self.writes:
            write_checkpoint(self.state(), checkpoint)

    def evaluated_players(self) -> torch.nn.ModuleDict:
        r"""Encoder and decoder to evaluate, in eval mode: the averaged ones if there is an average."""
        players = self.model.players if self.average is None else self.average.module
        return players.eval()

    def diagnose(self) -> dict[str, float]:
        r"""Where training stands, on held-out pairs: the player objective, and for a critic its loss
        −g(ψ), accuracy, mean and std of f on both joints, and the rms slope of f in x and in z.

        The random stream of training is left untouched, so logging more often changes nothing.
        """
        for net in (self.model.players, self.critics):
            net.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.done)
            with torch.no_grad():
                draws = self.draw(self.held_out)
                row = {"update": self.done, "seconds": round(self.seconds, 2)}
                row["objective"] = self.method.player(draws).item()
                if self.method.codes and not isinstance(draws.p_x_given_z_q, Point):
                    row["reconstruction"] = draws.log_p_x_given_z.mean().item()
                if self.method.codes and not isinstance(draws.q_z_given_x, Point):
                    row["kl"] = draws.kl_to_prior.mean().item()
            if self.method.critic is not None:
                row |= self._diagnose_critic(draws)
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        if self.runs > 1:  # one of them may have diverged; its own numbers will say so
            return finite
        if finite != row:
            raise Diverged(f"training diverged at update {self.done}; lower lr or raise penalty")
        return row

    def _diagnose_critic(self, draws: Draws) -> dict[str, float]:
        draws.scored = []
        row = {"critic_loss": -self.method.critic(draws).item()}
        (f_q, q), (f_p, p) = draws.scored[:2]  # of the first critic
        if f_q.dim() > 1:  # features, not scores
            return row
        row["accuracy"] = 0.5 * ((f_q < 0).float().mean() + (f_p > 0).float().mean()).item()
        for joint, scores, pair in (("q", f_q, q), ("p", f_p, p)):
            slopes = torch.autograd.grad(scores.sum(), pair)
            row |= {f"f_{joint}_mean": scores.mean().item(), f"f_{joint}_std": scores.std().item()}
            for name, slope in zip("xz", slopes, strict=False):  # no z without codes
                row[f"slope_{joint}_{name}"] = slope.flatten(1).square().sum(1).mean().sqrt().item()
        return row

    # State --------------------------------------------------------------------------------

    def _parts(self) -> dict[str, object]:
        parts = {"players": self.model.players, "player_optimiser": self.player_optimiser}
        if self.method.critic is not None:
            parts |= {"critics": self.critics, "critic_optimiser": self.critic_optimiser}
        if self.average is not None:
            parts["average"] = self.average
        return parts

    def state(self) -> dict:
        r"""Everything that the next update depends on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"identity": self.identity, "done": self.done, "seconds": self.seconds, "history": self.history}
        state["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict) -> None:
        r"""Continue from `state`. Raises UserError if it belongs to other nets or another method."""
        if state.get("identity") != self.identity:
            raise UserError("the checkpoint belongs to another experiment; delete it to start afresh")
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.done, self.seconds, self.history = state["done"], state["seconds"], state["history"]
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random"], self.device)
        except (KeyError, RuntimeError, ValueError):
            raise UserError("the checkpoint does not fit these nets; delete it to start afresh") from None


def write_checkpoint(state: dict, path: Path) -> None:
    r"""Write `state` to `path` so that the file is always whole: the old one, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def read_checkpoint(path: Path) -> dict:
    r"""The state in `path`, on the CPU. Raises UserError if the file is not a checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds here, all meaning the same
        raise UserError(f"{path} is not a readable checkpoint; delete it to start afresh") from None
