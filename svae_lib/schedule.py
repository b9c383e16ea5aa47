r"""The runs behind the tables, in order of value, and a loop that spends a given time on them.

`GRID` is the only list. `svae grid` works through it here, on one machine, and needs nothing but Python: an order, a
budget of minutes and K processes are a loop of twenty lines, and Snakemake knows no budget. `workflow/Snakefile` makes
a rule of each unfinished run of the same list, for Snakemake knows what this loop does not: Slurm and Kubernetes.

Either way a run is one `svae run` command in a process of its own. Its record appears whole, at the end; a run that was
stopped goes on from the checkpoint in the user's cache; a run that fails stops no other.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from svae_lib import data, distributed, experiment, records
from svae_lib.checkpoints import read_checkpoint
from svae_lib.device import choose_device
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.models import Nets

LITERAL, STABILISED = "literal", "stabilised"
OWN = ("vae", "svae", "svae-r", "svae-exact", "svae-elbo", "as-vae", "as-vae-r", "as-vae-g")
MAIN = (*OWN, "ali", "dcgan")  # the two that the papers' figures and tables set beside their own
COMPARATORS = ("alice", "gan", "wgan-gp", "nf-vae", "iaf-vae", "avb-ac")
# The rows of the table of modes: those that a penalty on the critic's slope may change, and those without a critic, or
# with a penalty of their own, to which both settings are the same.
PENALISED = (*OWN[1:], "gan", "ali", "ali-saturating", "alice", "alice-l1", "alice-a", "avb", "avb-ac")
ALIKE = ("vae", "nf-vae", "iaf-vae", "wake-sleep", "wgan-gp")
OTHERS = ("wake-sleep", "ali-saturating", "alice-l1", "alice-a", "avb", "gan-saturating", "gan-symmetric", "wgan",
          "mix-wgan", "mmd-gan", "fisher-gan", "mcgan-mean", "mcgan-cov", "eb-gan")  # fmt: skip


@dataclass(frozen=True)
class Block:
    r"""Runs of equal value: all methods and settings, first with seed 0, then with seed 1, and so on."""

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    settings: tuple[str, ...] = (LITERAL,)
    seeds: int = 1
    changes: dict[str, Any] = field(default_factory=dict)


# What is listed twice is run once, at its first place.
GRID: tuple[Block, ...] = (
    Block(("mnist",), MAIN, (STABILISED, LITERAL), seeds=3),
    Block(("cifar10",), MAIN, (STABILISED, LITERAL), seeds=2),
    Block(("mnist", "cifar10"), COMPARATORS, (STABILISED, LITERAL)),
    Block(("cifar10",), ("svae", "svae-r", "ali"), ("authors",)),
    Block(("tiny_imagenet",), ("svae-r", "dcgan", "as-vae", "vae"), (STABILISED, LITERAL)),
    Block(("ring8", "grid25"), PENALISED, (STABILISED,), seeds=10),
    Block(("ring8", "grid25"), ALIKE, seeds=10),
    Block(("ring8", "grid25"), PENALISED, seeds=10),
    # λ of S29; 0 is sVAE to the last bit, and 0.3, which paper S states, stands above
    *(Block(("mnist",), ("svae-r",), (STABILISED,), changes={"weight": λ}) for λ in (0.01, 0.1, 1.0, 3.0)),
    Block(  # the modes of 26,000 draws are counted, as Srivastava et al. 2017 do
        ("stacked_mnist",), ("dcgan", "ali", "svae-r", "svae-exact", "svae-elbo"), changes={"score_samples": 26_000}
    ),
    Block(("mnist", "cifar10"), OTHERS),
    Block(("mnist", "cifar10"), ("pixelcnn", "pixelrnn")),  # hours each
    Block(("cifar10",), ("vae", "svae-r", "svae-elbo"), ("beyond",)),  # likewise
)


@dataclass(frozen=True)
class Run:
    r"""One `svae run` command: an experiment, or several that differ in their seeds only and are trained as one."""

    experiments: tuple[Experiment, ...]

    @property
    def arguments(self) -> list[str]:
        r"""What follows `svae`."""
        first, last = self.experiments[0], self.experiments[-1]
        seeds = f"{first.seed}" if first is last else f"{first.seed}-{last.seed}"
        changed = [text for key, value in first.changes.items() for text in ("--set", f"{key}={value}")]
        named = ["--profile", first.profile, "--setting", first.setting, "--seed", seeds]
        return ["run", first.dataset, first.method, *named, *changed]

    @property
    def name(self) -> str:
        r"""That of its first experiment."""
        return self.experiments[0].name

    def missing(self, folder: Path) -> list[Experiment]:
        r"""The experiments that have no record in `folder` yet."""
        return [e for e in self.experiments if not records.path(folder, e.dataset, e.name).exists()]


def runs(profile: str = "cpu", only: str | None = None) -> list[Run]:
    r"""The runs of `GRID` in its order, of the dataset `only` if one is named. Raises UserError for an unknown name."""
    datasets = {name: None for block in GRID for name in block.datasets}
    if only is not None and only not in datasets:
        raise UserError(f"no run of the grid is on '{only}'; choose one of: {', '.join(datasets)}")
    listed = [run for block in GRID for run in _of_block(block, profile) if only in (None, run.experiments[0].dataset)]
    return list(dict.fromkeys(listed))


def _of_block(block: Block, profile: str) -> Iterator[Run]:
    def made(dataset: str, method: str, setting: str, seed: int) -> Experiment:
        return Experiment.make(dataset, method, profile, setting, seed, **block.changes)

    rows = [(d, m, s) for d in block.datasets for s in block.settings for m in block.methods]
    for seed in range(block.seeds):
        for row in rows:
            if not experiment.stackable(made(*row, 0)):
                yield Run((made(*row, seed),))
            elif seed == 0:
                yield Run(tuple(made(*row, seed) for seed in range(block.seeds)))


# What a run costs ----------------------------------------------------------------------------------

COSTLY = ("dataset", "profile", "architecture", "encoder", "decoder", "critic_steps")
PLAIN = asdict(Nets())  # what records hold that are older than one of these choices


def history(chosen: Sequence[Run], folder: Path, kind: str = "cpu") -> list[records.Record]:
    r"""The finished records of these runs' datasets, made on cpu, cuda or mps. Raises UserError if one is damaged."""
    datasets = dict.fromkeys(run.experiments[0].dataset for run in chosen)
    found = (record for dataset in datasets for record in records.read_all(dataset, folder, trials=True))
    return [r for r in found if r["status"] == "done" and r["environment"]["device"].partition(",")[0] == kind]


def predicted(run: Run, known: Sequence[records.Record], folder: Path) -> float | None:
    r"""Seconds that the rest of a run will take, or None where nothing like it has been run.

    Updates to go × median seconds per update, and the median of the evaluation, of the records that agree in `COSTLY`:
    those of the same method, or of all methods if there are none.
    """
    first, missing = run.experiments[0], run.missing(folder)
    if not missing:
        return 0.0
    choices = first.flat()
    alike = [r for r in known if all((PLAIN | r["experiment"])[key] == choices[key] for key in COSTLY)]
    alike = [r for r in alike if r["experiment"]["method"] == first.method] or alike
    if not alike:
        return None
    pace = statistics.median(r["seconds"] / r["experiment"]["updates"] for r in alike)
    evaluation = statistics.median(r.get("evaluation_seconds", 0.0) for r in alike)
    return len(missing) * ((first.training.updates - _updates_done(missing)) * pace + evaluation)


def _updates_done(missing: Sequence[Experiment]) -> int:
    begun = experiment.checkpoint(missing)
    try:
        return read_checkpoint(begun)["done"] if begun.exists() else 0
    except UserError:  # an unreadable one is the run's to report
        return 0


def state(run: Run, folder: Path) -> str:
    r"""done, diverged, begun, to do, or what stands in the way."""
    if missing := run.missing(folder):
        return "begun" if experiment.checkpoint(missing).exists() or len(missing) < len(run.experiments) else "to do"
    try:
        found = {experiment.finished(e, folder)["status"] for e in run.experiments}
    except UserError:
        return "other defaults"
    return "diverged" if "diverged" in found else "done"


def table(chosen: Sequence[Run], folder: Path, device: str = "auto") -> str:
    r"""A line for each run: its command, its state, and the minutes that are predicted for what is missing of it."""
    known = history(chosen, folder, choose_device(device).type)
    lines, costs = [f"{'state':<16}{'minutes':>8}  run"], []
    for run in chosen:
        costs.append(predicted(run, known, folder))
        minutes = "?" if costs[-1] is None else f"{costs[-1] / 60:.1f}" if run.missing(folder) else "–"
        lines.append(f"{state(run, folder):<16}{minutes:>8}  svae {' '.join(run.arguments)}")
    left, unknown = sum(bool(run.missing(folder)) for run in chosen), costs.count(None)
    hours = sum(filter(None, costs)) / 3600
    return "\n".join([*lines, f"{left} of {len(chosen)} runs to go: {hours:.1f} hours, and {unknown} of unknown cost"])


# The loop ------------------------------------------------------------------------------------------


def work(
    chosen: Sequence[Run], folder: Path, minutes: float = math.inf, jobs: int = 1, device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[Run, str]:  # fmt: skip
    r"""Run what has no record, in order, `jobs` at a time, for so many minutes; returns the failed runs and why.

    A run is started if it is predicted to end in time. One of unknown cost is started if nothing before it was left
    out: it is how the others' cost becomes known. What still runs when the time is up is stopped, to be resumed.
    """
    end = time.monotonic() + 60 * minutes
    waiting = [run for run in chosen if run.missing(folder)]
    running: dict[subprocess.Popen, Run] = {}
    cards: dict[subprocess.Popen, int | None] = {}
    failed: dict[Run, str] = {}
    kind = choose_device(device).type
    costs = _costs(waiting, folder, kind)
    try:
        while (left := end - time.monotonic()) > 0:
            while len(running) < jobs and (run := _first_that_fits(waiting, costs, left)):
                waiting.remove(run)
                card = _freest_card(device, [cards[process] for process in running])
                process = _start(run, folder, device, jobs, card)
                running[process], cards[process] = run, card
                say(f"start   svae {' '.join(run.arguments)}")
            if not running:
                break
            time.sleep(min(0.2, left))
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                if process.returncode or run.missing(folder):
                    failed[run] = _last_line(_log(run)) or f"ended with code {process.returncode}"
                    say(f"failed  {run.name}: {failed[run]}")
                else:
                    say(f"{state(run, folder):<8}{run.name}")
                costs = _costs(waiting, folder, kind)
    finally:  # also when interrupted, or when nobody reads what is said
        for process in running:
            process.terminate()
        for process, run in running.items():
            process.wait()
            stopped = f"stopped {run.name}, to be resumed"
            say(stopped if run.missing(folder) else f"{state(run, folder):<8}{run.name}")
    return failed


def _freest_card(device: str, taken: Sequence[int | None]) -> int | None:
    """The CUDA device with the fewest runs on it; None where the user chose one, or there is none."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return min(range(count), key=taken.count, default=None)


def _costs(waiting: Sequence[Run], folder: Path, kind: str) -> dict[Run, float | None]:
    known = history(waiting, folder, kind)
    return {run: predicted(run, known, folder) for run in waiting}


def _first_that_fits(waiting: Sequence[Run], costs: dict[Run, float | None], left: float) -> Run | None:
    for place, run in enumerate(waiting):
        cost = costs[run]
        if (cost is None and place == 0) or (cost is not None and cost <= left):
            return run
    return None


def command(run: Run, folder: Path, device: str, processes: int = 1) -> list[str]:
    r"""The run as the arguments of a process, which may start several that train its model together."""
    start = distributed.torchrun(processes) if processes > 1 else [sys.executable]
    return [*start, "-m", "svae_lib", *run.arguments, "--device", device, "--results", str(folder)]


def _start(run: Run, folder: Path, device: str, jobs: int, card: int | None) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # or the log would end in what was printed before the error
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if jobs > 1 and card is not None:  # or all runs would share the first one
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[card] if visible else str(card)
    _log(run).parent.mkdir(parents=True, exist_ok=True)
    with _log(run).open("w") as log:
        return subprocess.Popen(
            command(run, folder, device), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment,
        )  # fmt: skip


def _log(run: Run) -> Path:
    return data.cache() / "runs" / f"{run.name}.log"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.removeprefix("svae: ") for line in reversed(lines) if line.strip()), "")
