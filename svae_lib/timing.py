r"""Timing side by side: functions run in turns, in blocks of equal length, and what is reported of the turns.

And the machine on which all this happens: its name, its load, its ceilings."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svae_lib.costs import SHAPES, Machine
from svae_lib.data import Dataset, Split
from svae_lib.device import describe, knows_bf16, synchronise
from svae_lib.engine import WARM_UP, Graph

Step = Callable[[], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    r"""How long is measured: turns, seconds of a block, images of an epoch of the trainers, and whether large sizes."""

    name: str
    turns: int
    seconds: float
    images: int
    large: bool


FULL = Effort("full", 9, 0.2, 960, True)
QUICK = Effort("quick", 3, 0.01, 320, False)


def dataset(name: str, count: int) -> Dataset:
    r"""`count` random images in the shape of a data set of the papers, and 64 for the diagnostics."""
    images = torch.randint(256, (count, *SHAPES[name]), dtype=torch.uint8)
    held_out = Split(images[:64], torch.zeros(64, dtype=torch.long))
    return Dataset(name, Split(images, torch.zeros(count, dtype=torch.long)), held_out, held_out)


class Seconds(float):
    r"""What a function returns that has timed itself."""


def clock(device: torch.device) -> float:
    r"""Seconds, once the device has done all that it was asked for."""
    synchronise(device)
    return time.perf_counter()


def in_turns(functions: dict[str, Step], device: torch.device, effort: Effort) -> dict[str, np.ndarray]:
    r"""Seconds per call of each function, one value a turn: (turns,) each. The order is reversed every other turn.

    A function that returns `Seconds` has timed itself.
    """
    calls = {}
    for name, function in functions.items():
        seconds = _timed(function, 1, device)  # the first calls choose algorithms, allocate, and capture graphs
        for _ in range(WARM_UP + 1 if device.type == "cuda" else 2 * (seconds < 1)):
            seconds = _timed(function, 1, device)
        calls[name] = max(1, round(effort.seconds / seconds))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(effort.turns):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            times[name].append(_timed(functions[name], calls[name], device))
    return {name: np.array(seconds) for name, seconds in times.items()}


def _timed(function: Step, calls: int, device: torch.device) -> float:
    start, own = clock(device), 0.0
    for _ in range(calls):
        result = function()
        own += result if isinstance(result, Seconds) else 0.0
    return (own or clock(device) - start) / calls


def row(name: str, values: Sequence[float], unit: str = "×", aim: str = "", **measured: float) -> Row:
    r"""Median and quartiles of the values of all turns; `measured` are the medians behind a ratio."""
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    found = {"name": name, "value": middle, "low": low, "high": high, "turns": len(values), "unit": unit}
    return found | {"aim": aim, "measured": {key: float(value) for key, value in measured.items()}}


def missing(name: str, reason: object) -> Row:
    r"""A row that could not be measured, and what to do about it."""
    return {"name": name, "reason": f"not run: {reason}"}


# The machine ---------------------------------------------------------------------------------------


def ceilings(device: torch.device, effort: Effort) -> Machine:
    r"""The rates of a device: products of square matrices, a copy of 256 MB, additions to one number; the best turn."""
    side = (2048 if effort.large else 1024) if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    half, big, one = a.bfloat16(), torch.zeros(2**26, device=device), torch.zeros(1, device=device)
    copy = torch.empty_like(big)

    def additions() -> None:
        for _ in range(1_000):
            one.add_(1)

    functions = {
        "fp32": lambda: a @ a,
        "copy": lambda: copy.copy_(big),
        "overhead": Graph(additions, device) if device.type == "cuda" else additions,
    }
    if knows_bf16(device):
        functions["bf16"] = lambda: half @ half
    best = {name: float(seconds.min()) for name, seconds in in_turns(functions, device, effort).items()}
    flops = 2 * side**3
    bf16 = flops / best["bf16"] if "bf16" in best else None
    bandwidth, overhead = 2 * big.nbytes / best["copy"], best["overhead"] / 1_000
    return Machine(describe(device), flops / best["fp32"], bf16, bandwidth, overhead)


def machine_name(device: torch.device) -> str:
    r"""The processor as its maker calls it, and for a CPU cores and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    return name if device.type == "mps" else f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    r"""Lower case, hyphens for all that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> float | None:
    r"""How many processes wanted to run in the last minute, this one among them; None where nobody counts."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
