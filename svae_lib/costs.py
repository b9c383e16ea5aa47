r"""What an update costs before it is run: its operators, their FLOPs and bytes, and the time that a machine must take.

Operators are counted by running one update on tensors without content, so that any batch of any net can be counted in
a second on any machine. A machine is described by four rates (`Machine`); the predicted time is the sum over operators
of what bounds each: its arithmetic, its traffic, or the time that even an empty operator takes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from svae_lib import methods
from svae_lib.data import Split
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.models import FAMILIES, PIXEL_BY_PIXEL, build_model
from svae_lib.settings import SETTINGS
from svae_lib.train import Trainer

# The data sets of the papers: shape of an image, and images in the published training set.
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet64": (3, 64, 64)}
IMAGES = {"mnist": 60_000, "cifar10": 50_000, "imagenet64": 1_281_167}
APPENDIX = {"a1": ("mnist",), "a2": ("cifar10",), "a3": ("imagenet64",)}  # nets for one set; others serve all that fit

GATHERS = {"index", "index_select", "gather", "embedding"}  # read as much as they write, not all of their source
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # touch no memory


class Operator(NamedTuple):
    r"""One call of one operator: floating-point operations of products and convolutions, and bytes read and written."""

    name: str
    flops: int
    bytes: int
    half: bool  # computed in bf16


class Recorder(TorchDispatchMode):
    r"""Writes down every operator that runs, and calls `seen` with it and its arguments.

    A multiplication and its addition are two FLOPs. Bytes count every argument once and every result once, as if no
    operator kept anything in a cache or was fused with another.
    """

    def __init__(self, seen: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if function.namespace == "aten" and name not in SILENT and not _is_view(function):
            count = flop_registry.get(function._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            results = results or [leaf for leaf in tree_leaves(_written(function, args)) if isinstance(leaf, Tensor)]
            read = results if name in GATHERS else tree_leaves((args, kwargs))
            traffic = sum(_size(leaf) for leaf in [*read, *results] if isinstance(leaf, Tensor))
            half = bool(results) and results[0].dtype == torch.bfloat16
            self.operators.append(Operator(name, flops, traffic, half))
            if self.seen is not None:
                self.seen(function, args, kwargs)
        return out


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _written(function: Any, args: tuple) -> list[Any]:
    slots = zip(function._schema.arguments, args, strict=False)
    return [value for slot, value in slots if slot.alias_info is not None and slot.alias_info.is_write]


def _size(tensor: Tensor) -> int:
    """Bytes in memory: an expanded tensor is as small as what it repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count(function: Callable[[], object]) -> list[Operator]:
    r"""The operators of one call."""
    with Recorder() as recorder:
        function()
    return recorder.operators


@contextlib.contextmanager
def hollow(experiment: Experiment, shape: tuple[int, ...]) -> Iterator[Trainer]:
    r"""A trainer whose tensors have shapes and no content, after its first update, which makes the optimiser's state.

    Raises UserError if the nets do not exist for data of this shape.
    """
    method = methods.METHODS[experiment.method]
    training = replace(experiment.training, ema=0.0)  # a net without content cannot be copied; `cost` adds the average
    with torch.random.fork_rng(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with unset_fake_temporarily():  # some nets look at numbers while they are made
            model = build_model(experiment.nets, method, shape, experiment.seed)
        for net in (model.players, *model.critics):
            _empty(net, mode)
        dtype = torch.uint8 if len(shape) == 3 else torch.float32
        split = Split(torch.empty(training.batch, *shape, dtype=dtype), torch.empty(1, dtype=torch.long))
        trainer = Trainer(model, method, training, split, split, experiment.seed)
        trainer.update()
        yield trainer


def _empty(net: nn.Module, mode: FakeTensorMode) -> None:
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})


@dataclass(frozen=True)
class Cost:
    r"""What one update of a method costs, and one image that the decoder makes, unless it goes pixel by pixel."""

    dataset: str
    experiment: Experiment
    parameters: int
    update: list[Operator]
    image: list[Operator]

    @property
    def batch(self) -> int:
        return self.experiment.training.batch

    @property
    def flops(self) -> float:
        r"""FLOPs per image of training."""
        return sum(op.flops for op in self.update) / self.batch

    @property
    def bytes(self) -> float:
        r"""Bytes per image of training, the optimiser's share of the batch included."""
        return sum(op.bytes for op in self.update) / self.batch

    @property
    def intensity(self) -> float:
        r"""FLOPs per byte of an update."""
        return self.flops / self.bytes


def cost(experiment: Experiment, shape: tuple[int, ...]) -> Cost:
    r"""The cost of an experiment on data of this shape. Raises UserError if its nets do not exist for them."""
    with hollow(experiment, shape) as trainer:
        trained = [*trainer.model.players.parameters(), *trainer.critics.parameters()]
        update = count(trainer.update)
        if experiment.training.ema:
            update += count(lambda: _average(trainer.players))
        decoder = trainer.model.decoder.eval()
        with torch.no_grad():
            z = torch.empty(1, experiment.nets.z_dim)
            image = [] if experiment.nets.decoder in PIXEL_BY_PIXEL else count(lambda: decoder(z).mean)
        parameters = sum(parameter.numel() for parameter in trained)
    return Cost(experiment.dataset, experiment, parameters, update, image)


@torch.no_grad()
def _average(net: nn.Module) -> None:
    """One step of the exponential moving average of a net, but for the counters of BatchNorm."""
    current = [tensor.detach() for tensor in net.state_dict().values() if tensor.is_floating_point()]
    torch._foreach_lerp_([torch.empty_like(tensor) for tensor in current], current, 0.5)


def all_costs(method: str, precision: str = "fp32", batch: int = 64) -> list[Cost]:
    r"""The costs of a method with every architecture of the library on every data set of the papers it has nets for.

    An architecture that has a setting of its name is counted in that setting, others as the appendix prints them.
    """
    found = []
    for architecture in FAMILIES:
        setting = architecture if architecture in SETTINGS["natural"] else "literal"
        for dataset in APPENDIX.get(architecture, SHAPES):
            changes = {"architecture": architecture, "precision": precision, "batch": batch}
            with contextlib.suppress(UserError):  # no nets for such images, or not for this method
                found.append(cost(Experiment.make(dataset, method, setting=setting, **changes), SHAPES[dataset]))
    return found


# Time ----------------------------------------------------------------------------------------------

LIMITS = ("arithmetic", "memory", "overhead")


@dataclass(frozen=True)
class Machine:
    r"""Ceilings: FLOP/s of products in fp32 and bf16, if it knows that, bytes/s of a copy, seconds per operator."""

    name: str
    fp32: float
    bf16: float | None
    bandwidth: float
    overhead: float

    def bounds(self, operator: Operator) -> tuple[float, float, float]:
        r"""Seconds that arithmetic, memory and overhead take at least, in the order of `LIMITS`."""
        rate = (operator.half and self.bf16) or self.fp32
        return operator.flops / rate, operator.bytes / self.bandwidth, self.overhead


class Prediction(NamedTuple):
    r"""Seconds, and the share of them that each of `LIMITS` binds."""

    seconds: float
    shares: dict[str, float]

    @property
    def limit(self) -> str:
        r"""What binds most of the time."""
        return max(self.shares, key=self.shares.get)


def predict(operators: Sequence[Operator], machine: Machine) -> Prediction:
    r"""Σ over operators of max(FLOPs/rate, bytes/bandwidth, overhead): the roofline, operator by operator.

    Source: after Williams et al. 2009, who bound a whole kernel by its total FLOPs and bytes.
    """
    shares = dict.fromkeys(LIMITS, 0.0)
    for operator in operators:
        seconds, limit = max(zip(machine.bounds(operator), LIMITS, strict=True))
        shares[limit] += seconds
    total = math.fsum(shares.values())
    return Prediction(total, {limit: seconds / total for limit, seconds in shares.items()} if total else shares)


# Peaks as their maker publishes them. The overhead is not among them: it is an assumption.
PUBLISHED = (Machine("NVIDIA H200", 67e12, 989e12, 4.8e12, 2e-6),)
PAPERS_CARDS = (  # "TITAN X" is one of these
    Machine("TITAN X (Maxwell, 2015)", 6.1e12, None, 336e9, 5e-6),
    Machine("TITAN X (Pascal, 2016)", 11e12, None, 480e9, 5e-6),
)


class Printed(NamedTuple):
    r"""What both papers print of ImageNet-64 on one TITAN X, in seconds (S §6, A §5.4)."""

    epoch: float
    sample: float


PAPERS_COSTS = {"sVAE-r": Printed(4 * 3_600, 0.01), "PixelCNN++": Printed(44 * 3_600, 52)}
