r"""The one alternating update, and the loop around it: checkpoint, resume, EMA, diagnostics, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from svae_lib import device as devices
from svae_lib import diagnostics, memory
from svae_lib.checkpoints import read_checkpoint, write_checkpoint
from svae_lib.data import Split
from svae_lib.draws import Draws, Method, Model, mean_squared_slope
from svae_lib.engine import Average, Graph
from svae_lib.errors import UserError
from svae_lib.ipm import clip_weights
from svae_lib.stopping import EarlyStop, cycle_loss

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
    precision: str = "fp32"  # or tf32, or bf16 by autocast; in training, never in evaluation
    log_every: int = 100
    patience: int = 0  # logs without a better reconstruction of validation data, then stop (A §5); 0: never
    engine: str = "auto"  # or eager; no part of the experiment, for it changes nothing but rounding

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "critic_steps", "log_every", "lr", "critic_lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("weight", "penalty", "clip", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        for name, known in (("precision", devices.PRECISIONS), ("engine", devices.ENGINES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")
        for name in ("ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


class Diverged(UserError):
    r"""Training produced numbers that are not finite."""


class Trainer:
    r"""Trains `model` by `method` on `data`; `held_out` is only looked at for diagnostics.

    Initial weights are the caller's; `seed` starts the stream of batches and noise. The whole state is
    one dictionary: on the CPU a run that was stopped and resumed ends in the same bits as one that was not, and on CUDA
    too where cuDNN chooses the same algorithms again; images that are streamed are an exception (`svae_lib.arrays`).
    Everything lives on the device of the nets, and so do the images unless there are too many. `identity` names the
    experiment in its checkpoints. `runs` > 1 says that the nets are stacked (`svae_lib.ensembles`): the batch is for
    each of them, the diagnostics for all together.
    """

    alone = True  # no other process takes part in an update

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
        self.device = next(model.players.parameters()).device
        self.identity, self.done, self.seconds = identity, 0, 0.0
        self.environment: dict[str, str] = {}  # in which training began, for the record
        self.writes = True  # checkpoints and progress; of several processes only the first does
        self.history: list[dict[str, float]] = []
        resident = data.images.device == self.device  # a graph cannot fetch what is elsewhere
        self.replays = self.alone and resident and devices.replays(training.engine, self.device)
        self.players, self.critics = model.players, torch.nn.ModuleList(model.critics)
        self.player_optimiser = self._adam(self.players, training.lr)
        self.critic_optimiser = self._adam(self.critics, training.critic_lr) if model.critics else None
        self.average = Average(self.players) if training.ema else None
        self.stop = EarlyStop(training.patience) if training.patience else None
        if self.stop and (runs > 1 or not method.codes):
            raise UserError("patience looks at the codes of one run; set patience=0 for several, or for a GAN")
        self.share = self._number(1.0)  # of the new weights in the average
        self._start_engine()

    def _start_engine(self) -> None:
        self.advance = Graph(self.alternate, self.device) if self.replays else self.alternate

    @property
    def engine(self) -> str:
        r"""graph or eager: how updates are done."""
        return "graph" if self.replays and not self.advance.waits else "eager"

    def _number(self, value: float) -> float | Tensor:
        r"""A number that changes from update to update; for a graph, in memory that it reads."""
        return torch.tensor(value, device=self.device) if self.replays else value

    def _adam(self, net: torch.nn.Module, lr: float) -> torch.optim.Adam:
        betas, fused = (self.training.beta1, self.training.beta2), self.device.type != "mps"
        return torch.optim.Adam(net.parameters(), self._number(lr), betas, fused=fused, capturable=self.replays)

    @property
    def samples(self) -> int:
        r"""In a batch, of all runs together."""
        return self.runs * self.training.batch

    # One update ---------------------------------------------------------------------------

    def update(self) -> None:
        r"""One alternating update: `alternate`, as it stands or as a CUDA graph that repeats it (`svae_lib.engine`)."""
        self._set_paces()
        with devices.tf32(self.training.precision == "tf32" and self.device.type == "cuda"):
            self.advance()
        self.done += 1

    def alternate(self) -> None:
        r"""The critic climbs its objective, then the players climb theirs."""
        draws = self.draw(self.data)
        if self.method.critic is not None:
            for step in range(self.training.critic_steps):
                draws = self.draw(self.data) if step else draws
                self.critic_step(draws)
        self.player_step(draws)
        if self.average is not None:
            self.average.follow(self.share)

    def _set_paces(self) -> None:
        r"""The step sizes, and an EMA whose decay grows to `ema`, so that a short run forgets its first weights too."""
        if self.training.decay:
            left = 1 - self.done / self.training.updates
            self._set_lr(self.player_optimiser, left * self.training.lr)
            if self.critic_optimiser is not None:
                self._set_lr(self.critic_optimiser, left * self.training.critic_lr)
        if self.average is not None:
            share = 1 - min(self.training.ema, (1 + self.done) / (10 + self.done))
            self.share = _put(self.share, share if self.done else 1.0)

    @staticmethod
    def _set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
        group = optimiser.param_groups[0]
        group["lr"] = _put(group["lr"], lr)

    def draw(self, split: Split, parts: int = 1) -> Draws:
        r"""A batch of data and of prior codes, or one of its `parts`; both joints follow when asked for."""
        size = self.samples // parts
        images = split.draw(size)
        z_p = torch.randn(size, self.model.z_dim, device=self.device)
        return Draws(self.model, self.model.axis.draw(images), z_p, self.training.weight, runs=self.runs)

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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    # The loop -----------------------------------------------------------------------------

    def fit(self, checkpoint: Path | None = None, on_log: Callable[[dict], None] | None = None) -> None:
        r"""Update until `training.updates` are done. `checkpoint` is resumed from, if it exists, and kept.

        `on_log` receives the diagnostics, and the pace, every `log_every` updates. Raises Diverged when they are not
        finite, and UserError with a batch that would fit when memory runs out.
        """
        torch.manual_seed(self.seed)
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self._set_mode(True)
        start = saved = time.perf_counter()
        with self._progress() as bar:
            while self.done < self.training.updates and not (self.stop and self.stop.over):
                self._update_or_say_what_fits()
                bar.update(self.samples)
                logs = self.done % self.training.log_every == 0 or self.done == self.training.updates
                keeps = checkpoint is not None and self.writes and time.perf_counter() - saved > CHECKPOINT_SECONDS
                if logs or keeps:
                    devices.synchronise(self.device)
                    now = time.perf_counter()
                    self.seconds, start = self.seconds + now - start, now
                if logs:
                    self.history.append(self.diagnose())
                    if self.stop:
                        self.stop.look(self.history[-1]["cycle"], self.evaluated_players())
                    if on_log is not None:
                        on_log(self.history[-1] | self._pace())
                    self._set_mode(True)  # whoever reads the log may evaluate
                if keeps:
                    saved = now
                    write_checkpoint(self.state(), checkpoint)
        if checkpoint is not None and self.writes:
            write_checkpoint(self.state(), checkpoint)
        if self.stop:
            self.evaluated_players().load_state_dict(self.stop.best)

    @property
    def _unit(self) -> str:
        return "points" if self.data.images.dim() == 2 else "images"

    def _progress(self) -> tqdm:
        r"""A bar with images per second and the time left, where there is a terminal."""
        total, done = self.training.updates * self.samples, self.done * self.samples
        disable = None if self.writes else True
        return tqdm(total=total, initial=done, unit=f" {self._unit}", unit_scale=True, disable=disable, file=sys.stderr)

    def _pace(self) -> dict[str, float]:
        r"""The same for a log; a batch that several critic steps draw anew counts once."""
        seconds = self.seconds / self.done
        left = (self.training.updates - self.done) * seconds / 60
        return {f"{self._unit}/s": self.samples / seconds, "minutes left": left}

    def _set_mode(self, training: bool) -> None:
        for net in (self.players, self.critics):
            net.train(training)

    def _update_or_say_what_fits(self) -> None:
        try:
            self.update()
            return
        except RuntimeError as error:
            if not (self.alone and memory.ran_out(error)):
                raise
        # out here, where the failed update holds no memory any more, and its graph neither
        self._start_engine()
        raise UserError(memory.advice(self._try, self.training.batch, self.device))

    def _try(self, batch: int) -> None:
        r"""An update with that batch; what becomes of the weights does not matter any more."""
        whole, self.training = self.training, replace(self.training, batch=batch)
        try:
            self.alternate()
        finally:
            self.training = whole

    def evaluated_players(self) -> torch.nn.ModuleDict:
        r"""Encoder and decoder to evaluate, in eval mode: the averaged ones if there is an average."""
        players = self.players if self.average is None else self.average.module
        return players.eval()

    def diagnose(self) -> dict[str, float]:
        r"""Where training stands, on held-out pairs (`svae_lib.diagnostics`).

        The random stream of training is left untouched on CPU and CUDA, so that logging more often changes nothing.
        """
        self._set_mode(False)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.done)
            with torch.no_grad():
                draws = self.draw(self.held_out)
            row = {"update": self.done, "seconds": round(self.seconds, 2)}
            row |= diagnostics.of_players(self.method, draws) | diagnostics.of_critics(self.method, draws)
            if self.stop:
                judged = replace(self.model, **self.evaluated_players())
                drawn = (replace(self.draw(self.held_out), model=judged) for _ in range(EarlyStop.BATCHES))
                losses = [cycle_loss(draws) for draws in drawn]
                row["cycle"] = sum(losses) / len(losses)
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        if self.runs > 1:  # one of them may have diverged; its own numbers will say so
            return finite
        if finite != row:
            raise Diverged(f"training diverged at update {self.done}; lower lr or raise penalty")
        return row

    # State --------------------------------------------------------------------------------

    def _parts(self) -> dict[str, object]:
        parts = {"players": self.players, "player_optimiser": self.player_optimiser}
        if self.method.critic is not None:
            parts |= {"critics": self.critics, "critic_optimiser": self.critic_optimiser}
        if self.average is not None:
            parts["average"] = self.average
        if self.stop is not None:
            parts["stop"] = self.stop
        return parts

    def state(self) -> dict:
        r"""Everything that the next update depends on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"identity": self.identity, "done": self.done, "seconds": self.seconds, "history": self.history}
        state["environment"] = self.environment
        state["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return state

    def _resume(self, checkpoint: Path) -> None:
        state = read_checkpoint(checkpoint)
        try:
            self.load_state(state)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None

    def load_state(self, state: dict) -> None:
        r"""Continue from `state`. Raises UserError if it belongs to other nets or another method."""
        if state.get("identity") != self.identity:
            raise UserError("the checkpoint belongs to another experiment; delete it to start afresh")
        try:
            for name, part in self._parts().items():
                part.load_state_dict(self._with_own_choices(part, state[name]))
            self.done, self.seconds, self.history = state["done"], state["seconds"], state["history"]
            self.environment = state["environment"]
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random"], self.device)
        except (KeyError, RuntimeError, ValueError):
            raise UserError("the checkpoint does not fit these nets; delete it to start afresh") from None
        self._start_engine()  # a graph would go on with the optimisers' former tensors

    @staticmethod
    def _with_own_choices(part: object, state: dict) -> dict:
        r"""Step sizes and the like are the experiment's, on its device, not the checkpoint's."""
        return state | {"param_groups": part.state_dict()["param_groups"]} if "param_groups" in state else state


def _put(old: float | Tensor, value: float) -> float | Tensor:
    return old.fill_(value) if isinstance(old, Tensor) else value
