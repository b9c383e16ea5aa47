r"""`svae bench`: how fast the engine is, as ratios of what was timed side by side, and one record of all of them.

The images are random bytes of MNIST's shape, for no time depends on their values. Whatever is compared is timed in
turns, in blocks of equal length, in one process (`processes` alone starts others); a row is the median over the turns,
with the quartiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from svae_lib import costs, methods, records, rivals, scaling
from svae_lib.costs import SHAPES, Machine
from svae_lib.data import Dataset, Split
from svae_lib.device import choose_device, describe, knows_bf16
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment, prepare, prepare_together
from svae_lib.levels import grey
from svae_lib.models import build_model
from svae_lib.timing import (
    FULL,
    Effort,
    Row,
    Step,
    ceilings,
    dataset,
    in_turns,
    load,
    machine_name,
    missing,
    row,
    slug,
)
from svae_lib.train import Trainer


@dataclass(frozen=True)
class Bench:
    r"""What every group of rows needs to know."""

    device: torch.device
    effort: Effort
    machine: Machine  # its ceilings, measured first


# What is timed -------------------------------------------------------------------------------------


def engine(bench: Bench, experiment: Experiment, count: int = 4_096) -> Trainer:
    r"""The trainer of an experiment on random images, ready to `update`."""
    return prepare(experiment, dataset(experiment.dataset, count), bench.device)


def cases(device: torch.device) -> list[Experiment]:
    r"""Which updates are timed; an accelerator also gets one that fills it."""
    make = Experiment.make
    chosen = [make("mnist", "vae"), make("mnist", "svae-r")]
    if knows_bf16(device):
        chosen += [make("mnist", "svae-r", precision="bf16")]
    if device.type != "cpu":
        chosen += [make("imagenet64", "svae-r", precision="bf16", batch=256)]
    return chosen


def label(experiment: Experiment) -> str:
    r"""Method, nets, data, precision and batch."""
    e, t = experiment, experiment.training
    return f"{e.method} {e.nets.architecture} {e.dataset} {t.precision} batch {t.batch}"


# The groups of rows --------------------------------------------------------------------------------


def step(bench: Bench) -> Iterator[Row]:
    r"""An update against the same by hand, against its layers alone, and against what the machine could do."""
    aim = "≤ 1.05" if bench.device.type == "cpu" else "≤ 0.5"
    for experiment in cases(bench.device):
        name = label(experiment)
        by_hand = rivals.by_hand(engine(bench, experiment))
        timed = {
            "engine": engine(bench, experiment).update,
            "by hand": by_hand,
            "layers": rivals.layers_alone(by_hand, bench.device),
        }
        times = in_turns(timed, bench.device, bench.effort)
        medians = {key: np.median(value) for key, value in times.items()}
        yield row(f"{name}: engine ÷ by hand", times["engine"] / times["by hand"], aim=aim, **medians)
        yield row(f"{name}: engine ÷ its layers", times["engine"] / times["layers"], aim="≤ 1.15", **medians)
        yield from _achieved(bench, experiment, times["engine"])


def _achieved(bench: Bench, experiment: Experiment, seconds: np.ndarray) -> Iterator[Row]:
    cost, machine, name = costs.cost(experiment, SHAPES[experiment.dataset]), bench.machine, label(experiment)
    rate = (experiment.training.precision == "bf16" and machine.bf16) or machine.fp32
    flops, traffic = (cost.batch * per_image / seconds for per_image in (cost.flops, cost.bytes))
    yield row(f"{name}: FLOP/s ÷ ceiling", flops / rate, **{"FLOP/s": np.median(flops)})
    yield row(f"{name}: bytes/s ÷ ceiling", traffic / machine.bandwidth, **{"bytes/s": np.median(traffic)})
    predicted = costs.predict(cost.update, machine)
    yield row(f"{name}: engine ÷ predicted", seconds / predicted.seconds, predicted=predicted.seconds)


def trainers(bench: Bench) -> Iterator[Row]:
    r"""Images/s of the VAE against pythae's trainer and Lightning's: the same nets, batch and number of images.

    Theirs in fp32, their default; the engine in fp32 and, where the device knows it, in the profiles' bf16.
    """
    data, batch, functions, reasons = dataset("mnist", bench.effort.images), 64, {}, {}
    precisions = ("fp32", "bf16") if knows_bf16(bench.device) else ("fp32",)
    alike = [Experiment.make("mnist", "vae", precision=precision, batch=batch) for precision in precisions]
    for experiment in alike:
        functions[label(experiment)] = _epoch(prepare(experiment, data, bench.device), len(data.train) // batch)
    for rival, make in (("pythae", rivals.pythae_epoch), ("Lightning", rivals.lightning_epoch)):
        model = build_model(alike[0].nets, methods.METHODS["vae"], SHAPES["mnist"], 0)
        try:
            functions[rival] = make(model, grey(data.train.images), batch, bench.device)
        except UserError as error:
            reasons[rival] = error
    times = in_turns(functions, bench.device, bench.effort)
    for rival in ("pythae", "Lightning"):
        for name in map(label, alike):
            named = f"{name}: images/s ÷ {rival}'s"
            if rival in reasons:
                yield missing(named, reasons[rival])
                continue
            measured = {"engine": np.median(times[name]), rival: np.median(times[rival]), "images": len(data.train)}
            yield row(named, times[rival] / times[name], aim="≥ 2", **measured)


def _epoch(trainer: Trainer, updates: int) -> Step:
    def epoch() -> None:
        for _ in range(updates):
            trainer.update()

    return epoch


def loader(bench: Bench) -> Iterator[Row]:
    r"""Batches of grey images on the device against torchvision's MNIST and torch's DataLoader, 0 and 2 workers."""
    data, batch = dataset("mnist", bench.effort.images), 64
    train = data.train.to(bench.device)

    def epoch() -> None:
        for _ in range(len(train) // batch):
            grey(train.take(torch.randint(len(train), (batch,), device=bench.device)))

    for workers in (0, 2) if bench.effort.large else (0,):
        theirs = rivals.torchvision_batches(data.train.images, data.train.labels, batch, workers)
        times = in_turns({"engine": epoch, "torchvision": theirs}, bench.device, bench.effort)
        medians = {key: np.median(value) for key, value in times.items()}
        name = f"loader: images/s ÷ torchvision's with {workers} workers"
        yield row(name, times["torchvision"] / times["engine"], aim="≥ 10", images=len(train), **medians)


def sampling(bench: Bench) -> Iterator[Row]:
    r"""Milliseconds per drawn image, one by one and a thousand at a time (of large nets on a CPU: ten)."""
    for cost in costs.all_costs("svae-r"):
        decoder = engine(bench, cost.experiment, 64).model.decoder.eval()
        heavy = sum(op.flops for op in cost.image) > 1e8
        for count in (1, 10 if heavy and bench.device.type == "cpu" else 1_000):
            z = torch.randn(count, cost.experiment.nets.z_dim, device=bench.device)
            draw = torch.no_grad()(lambda decoder=decoder, z=z: decoder(z).mean)
            seconds = in_turns({"draw": draw}, bench.device, bench.effort)["draw"] / count
            aim = f"paper: {1e3 * costs.PAPERS_COSTS['sVAE-r'].sample:g} ms" if cost.dataset == "imagenet64" else ""
            name = f"sample {cost.experiment.nets.architecture} {cost.dataset}, {count:,} at a time"
            yield row(name, 1e3 * seconds, "ms an image", aim, seconds=np.median(seconds))


def growth(bench: Bench) -> Iterator[Row]:
    r"""Seconds of an update against the number of images, the batch, the width, runs trained together, threads."""
    make, large = Experiment.make, bench.effort.large
    most = 500_000 if large else 10_000
    plain = make("mnist", "vae")
    trainer = engine(bench, plain, most)
    part = {count: Split(trainer.data.images[:count], trainer.data.labels) for count in (1_000, most)}

    def on(split: Split) -> Step:
        def update() -> None:
            trainer.data = split
            trainer.update()

        return update

    yield from _grown(bench, "images", {count: on(split) for count, split in part.items()}, aim="1, flat")
    batches = {size: engine(bench, make("mnist", "vae", batch=size)).update for size in (16, 64, 256)}
    yield from _grown(bench, "batch", batches)
    widths = {width: engine(bench, make("mnist", "vae", hidden=width)).update for width in (128, 256, 512)}
    yield from _grown(bench, "hidden units", widths)
    channels = (16, 32, 64) if large else (16, 32)
    made = {c: engine(bench, make("mnist", "vae", architecture="dcgan", channels=c)).update for c in channels}
    yield from _grown(bench, "channels of dcgan", made)
    points = Split(torch.randn(10_000, 2), torch.zeros(10_000, dtype=torch.long))
    ring = Dataset("ring8", points, points, points)
    together = {}
    for runs in (1, 4, 16, 64) if large else (1, 4, 16):
        alike = [make("ring8", "svae-r", "cpu", seed=seed) for seed in range(runs)]
        together[runs] = prepare_together(alike, ring, bench.device).update
    yield from _grown(bench, "runs on points trained together, cost of each", together, per_unit=True)
    if bench.device.type == "cpu":
        yield from _threads(bench, engine(bench, plain))


def _grown(bench: Bench, name: str, updates: dict[int, Step], aim: str = "", per_unit: bool = False) -> Iterator[Row]:
    times = in_turns({str(size): update for size, update in updates.items()}, bench.device, bench.effort)
    if per_unit:
        times = {size: seconds / int(size) for size, seconds in times.items()}
    first, *others = times
    for size in others:
        measured = {first: np.median(times[first]), size: np.median(times[size])}
        yield row(f"{name}: {int(size):,} ÷ {int(first):,}", times[size] / times[first], aim=aim, **measured)


def _threads(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    before = torch.get_num_threads()

    def with_threads(number: int) -> Step:
        def update() -> None:
            torch.set_num_threads(number)
            trainer.update()

        return update

    numbers = [number for number in (1, 2, 4, 8, 16) if number <= (os.cpu_count() or 1)]
    try:
        yield from _grown(bench, "threads", {number: with_threads(number) for number in numbers})
    finally:
        torch.set_num_threads(before)


def processes(bench: Bench) -> Iterator[Row]:
    r"""Seconds of an update against the number of processes that train one model."""
    return scaling.rows(bench.device, bench.effort)


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    function.__name__: function for function in (step, trainers, loader, sampling, growth, processes)
}

# The record ----------------------------------------------------------------------------------------


def run(
    device: str = "auto", effort: Effort = FULL, only: str | None = None, say: Callable[[str], None] = print
) -> records.Record:
    r"""Measure all groups of rows, or the group `only`; `say` receives the table line by line.

    Raises UserError for a device that is not there or a group that does not exist.
    """
    if only is not None and only not in GROUPS:
        raise UserError(f"there are no rows called '{only}'; choose one of: {', '.join(GROUPS)}")
    chosen = choose_device(device)
    named = machine_name(chosen)
    record: records.Record = {"name": f"bench-{slug(named)}", "effort": effort.name}
    record |= {"machine": named, "load": [load()], "machines": []}
    say(f"{named}; load {record['load'][0]}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        machine = ceilings(chosen, effort)
        record["machines"] = [asdict(machine)] + _one_thread(chosen, effort)
        say(f"ceilings: {_in_words(machine)}")
        record["rows"] = []
        bench = Bench(chosen, effort, machine)
        for name, group in GROUPS.items():
            for found in group(bench) if only in (None, name) else ():
                record["rows"].append(found)
                say(line(found))
    record["load"].append(load())
    record["environment"] = records.environment(describe(chosen))
    return record


def _one_thread(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Ceilings of one thread, which is what many records were made with."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        return []
    torch.set_num_threads(1)
    try:
        return [asdict(ceilings(device, effort))]
    finally:
        torch.set_num_threads(before)


def _in_words(machine: Machine) -> str:
    bf16 = f", {machine.bf16 / 1e12:.3g} bf16" if machine.bf16 else ""
    rates = f"{machine.fp32 / 1e12:.3g} TFLOP/s fp32{bf16}"
    return f"{rates}, {machine.bandwidth / 1e9:.3g} GB/s, {1e6 * machine.overhead:.2g} µs an operator"


def line(found: Row) -> str:
    r"""A row as text: value (quartiles) unit, aim."""
    if "reason" in found:
        return f"{found['name']:<64}{found['reason']}"
    value = f"{found['value']:.3g} ({found['low']:.3g} to {found['high']:.3g}) {found['unit']}"
    return f"{found['name']:<64}{value:<34}{found['aim']}".rstrip()
