r"""One model trained by N processes: `torchrun --nproc_per_node=N -m svae_lib run …` does what `svae run …` does.

The batch stays the batch of the experiment. Each process holds B/N of its rows and all weights; what a batch shares is
shared between the processes too, so that N of them follow the curve of one. Gradients are averaged before each step of
an optimiser, in one message (`average`). BatchNorm normalises by the statistics of all B rows, differentiably as often
as a penalty on slopes needs (`batch_norm`). Objectives that are no means over samples get the scores of all B rows
(`SharedDraws`). Random numbers are drawn for all B rows and cut (`Share`): all processes draw from one stream, and
these are the numbers that one process would draw. Two have the same distribution only, DiffAugment and the noise of
encoders without a density, of which a part belongs to no row.

The first process alone writes checkpoints, records and progress. `torchrun` stops all of them when one dies.

Why not more of PyTorch or Lightning. DistributedDataParallel averages what one call of one module accumulates; here a
loss calls four nets several times, and only one player's parameters get a gradient. SyncBatchNorm needs CUDA and has no
second derivative. Lightning Fabric would start the process group in as many lines as `join`, after seconds of imports.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from svae_lib import memory
from svae_lib.data import Split
from svae_lib.draws import Draws
from svae_lib.errors import UserError
from svae_lib.train import Trainer

TIMEOUT = timedelta(days=1)  # the others wait while the first process evaluates

# The processes ------------------------------------------------------------------------------------


def count() -> int:
    r"""N, the number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    r"""The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def join(device: torch.device) -> torch.device:
    r"""Meet the other processes, by NCCL on CUDA and by Gloo on CPUs; returns this process's own device.

    Raises UserError if there are fewer devices than processes.
    """
    if count() == 1:
        return device
    if device.type == "cuda":
        cards, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local >= cards:
            raise UserError(f"every process needs a graphics card of its own; start at most {cards} on this machine")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes cannot share one {device.type} device; choose --device cpu")
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def torchrun(processes: int, *options: str) -> list[str]:
    r"""The beginning of a command that starts so many processes on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, *options]


def leave() -> None:
    r"""Take leave of the other processes, if there were any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def from_first(value: Any) -> Any:
    r"""What the first process has; waits for it."""
    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


# What a batch shares ------------------------------------------------------------------------------


def part(whole: Tensor) -> Tensor:
    r"""This process's rows of a batch."""
    return whole.chunk(count())[rank()]


class _Sum(torch.autograd.Function):
    r"""Σ over processes, on each of them. Its derivative is the same sum, and so are all further ones."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_, slope: Tensor) -> Tensor:
        return _Sum.apply(slope)


def gather(x: Tensor) -> Tensor:
    r"""The x of every process, on each of them, differentiable any number of times; (...) -> (N, ...)."""
    return _Sum.apply(torch.stack([x if other == rank() else torch.zeros_like(x) for other in range(count())]))


def batch_norm(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    r"""`torch.nn.functional.batch_norm` by the statistics of all processes' rows; (B/N, C, ...) -> (B/N, C, ...).

    var = E_r var_r + Var_r mean_r over processes r of equally many rows; in the precision of the weights.
    """
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    wide = input.to(weight.dtype)
    of_each = gather(torch.stack(torch.var_mean(wide, axes, correction=0)))
    (within, means), size = of_each.unbind(1), count() * input.numel() // input.shape[1]
    mean = means.mean(0)
    var = (within + (means - mean).square()).mean(0)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (size / (size - 1)), momentum)
    scale = weight * (var + eps).rsqrt()
    shift = bias - scale * mean
    column = (-1, *[1] * (input.dim() - 2))
    return (wide * scale.view(column) + shift.view(column)).to(input.dtype)


@dataclass
class SharedDraws(Draws):
    r"""This process's rows of a batch. Where an objective compares samples with each other, it sees those of all.

    Slopes of the scores are not shared: a penalty on them is a mean over samples.
    """

    separable: bool = True

    def score(self, *pair: Tensor, critic: int = 0) -> Tensor:
        scores = super().score(*pair, critic=critic)
        return scores if self.separable else gather(scores).flatten(0, 1)

    def of_others(self, z: Tensor) -> Tensor:
        return part(gather(z).flatten(0, 1).roll(1, 0))


class Share(TorchFunctionMode):
    r"""Within it a tensor of rows is this process's part of a batch: random numbers and BatchNorm see the whole.

    What is drawn is drawn N times as long along its first axis, and this process keeps its part.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        options = kwargs or {}
        if function is functional.batch_norm:
            return batch_norm(*args, **options)
        if function is functional.dropout and options["training"]:
            return args[0] * part(function(torch.ones_like(_whole(args[0])), **options))
        if function in (torch.randn_like, torch.rand_like):
            return part(function(_whole(args[0]), **options))
        if function in (torch.randn, torch.rand):  # sizes, one by one or as a tuple
            rows, *others = args if isinstance(args[0], int) else args[0]
            return part(function(count() * rows, *others, **options))
        if function is torch.randint:  # limit, sizes
            limit, (rows, *others) = args
            return part(function(limit, (count() * rows, *others), **options))
        if function is torch.multinomial:  # probabilities, how many
            return part(function(args[0], count() * args[1], **options))
        return function(*args, **options)


def _whole(x: Tensor) -> Tensor:
    """Something of the whole batch's shape, type and layout."""
    return torch.cat([x.detach()] * count())


# The loop -----------------------------------------------------------------------------------------


@torch.no_grad()
def average(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    r"""Replace the gradients of an optimiser by their means over processes, before its step."""
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients]) / count()
    distributed.all_reduce(message)
    parts = message.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


class SharedTrainer(Trainer):
    r"""A trainer that is one of several. Raises UserError if the batch cannot be cut into equal parts."""

    alone = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.writes = rank() == 0
        if self.training.batch % count():
            wrong = f"{count()} processes cannot share a batch of {self.training.batch}"
            raise UserError(f"{wrong}; set batch to a multiple of {count()}")
        for optimiser in filter(None, (self.player_optimiser, self.critic_optimiser)):
            optimiser.register_step_pre_hook(average)

    def update(self) -> None:
        with Share():
            super().update()

    def _update_or_say_what_fits(self) -> None:  # what would fit cannot be tried without the others
        try:
            self.update()
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            wrong = f"a batch of {self.training.batch} does not fit into {count()} times the memory of {self.device}"
            raise UserError(f"{wrong}; start more processes or set a smaller batch") from None

    def draw(self, split: Split) -> Draws:
        r"""This process's rows in training; all rows for the diagnostics, which are the same for everyone."""
        if split is self.held_out:
            return super().draw(split)
        draws = super().draw(split, count())
        return SharedDraws(draws.model, draws.x, draws.z_p, draws.weight, separable=self.method.separable)

    def diagnose(self) -> dict[str, float]:
        r"""The diagnostics of one process. Raises UserError if the processes have ceased to be of one mind."""
        row = super().diagnose()
        state = [*self.model.players.state_dict().values(), *self.critics.state_dict().values()]
        sums = gather(torch.stack([value.double().sum() for value in state]))
        if not sums.eq(sums[0]).all():
            raise UserError(f"the processes' weights differ at update {self.done}; run again from the last checkpoint")
        return row
