r"""How stable is a method to train? The same method under many hyperparameters, after Li et al. 2017 (ALICE).

They ran 576 settings on a mixture of five Gaussians and report mean and spread of the score over all of them, good and
bad. Their grid is not printed; ours is `GRID`: 256 settings. Those that differ in step sizes only are trained as one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svae_lib import data, experiment, records
from svae_lib.device import choose_device, describe
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.mixtures import MIXTURES

GRID: dict[str, tuple] = {
    "hidden": (32, 64),  # of all nets
    "depth": (2, 3),
    "beta1": (0.5, 0.9),
    "critic_steps": (1, 5),
    "lr": (1e-4, 3e-4, 1e-3, 3e-3),
    "critic_lr": (1e-4, 3e-4, 1e-3, 3e-3),
}
PACES = ("lr", "critic_lr")
# 100 epochs of 2,048 points with plain MLPs, at constant step sizes, as Li et al. 2017 have it.
BUDGET = {"updates": 1_600, "batch": 128, "log_every": 1_600, "norm": "none", "decay": False, "ema": 0.0}
FAILED = 1.5  # a score below this is a failed run, as ALICE counts
WORKS = 0.5  # of the draws at least are good ones, and no mode is missing: our own count


def settings() -> Iterator[list[dict[str, Any]]]:
    r"""The grid, in lists of settings that can be trained as one."""
    outer = [name for name in GRID if name not in PACES]
    for values in itertools.product(*(GRID[name] for name in outer)):
        shared = dict(zip(outer, values, strict=True))
        shared["critic_hidden"] = shared["hidden"]
        yield [shared | dict(zip(PACES, pace, strict=True)) for pace in itertools.product(*(GRID[p] for p in PACES))]


def sweep(
    dataset: str, method: str, folder: Path | None = None, on_done: Callable[[int, int], None] | None = None
) -> records.Record:
    r"""Run the whole grid, seed 0, and return its record; what is in the record already is not run again.

    Each row holds what was set, the metrics, and the seconds of the run. The record is written after each list of
    settings, so that an interruption costs one of them. Raises UserError if settings of the method cannot be trained
    as one, or the record is of another budget.
    """
    folder = records.results_folder(folder)
    plain = Experiment.make(dataset, method)
    if not experiment.stackable(plain) or plain.training.clip:
        raise UserError(f"{method} on {dataset} cannot be swept: settings are trained together, and these cannot be")
    name = f"sweep-{dataset}-{method}"
    fresh = {"name": name, "dataset": dataset, "method": method, "budget": BUDGET, "rows": []}
    record = records.read_report(name, folder) or fresh
    if record["budget"] != BUDGET:
        raise UserError(f"{name} was made with another budget; delete its file in {folder} to run it again")
    known = [row["set"] for row in record["rows"]]
    device, lists = choose_device("cpu"), list(settings())
    for chosen in lists:
        if chosen[0] not in known:
            record["rows"] += _train(dataset, method, chosen, device)
            record["environment"] = records.environment(describe(device))
            records.write_report(folder, record)
        if on_done is not None:
            on_done(len(record["rows"]), sum(map(len, lists)))
    return record


def _train(dataset: str, method: str, chosen: list[dict[str, Any]], device) -> list[dict[str, Any]]:
    loaded = data.load(dataset)
    made = [Experiment.make(dataset, method, "quick", **BUDGET, **setting) for setting in chosen]
    trainer = experiment.prepare_together(made, loaded, device)
    trainer.fit()
    rows = []
    for number, (setting, one) in enumerate(zip(chosen, made, strict=True)):
        metrics = experiment.evaluate(one, trainer, loaded, number)
        values = {key: metric["value"] for key, metric in metrics.items()}
        rows.append({"set": setting, "seconds": round(trainer.seconds / len(made), 2), **values})
    return rows


def summary(record: records.Record, where: Callable[[dict], bool] = lambda setting: True) -> dict[str, float]:
    r"""Mean and standard deviation of the score and of the squared reconstruction error over the settings `where`.

    `failed` is the fraction of runs whose score is below 1.5, or not a number (which counts as a score of one). The
    score asks only which mode is nearest, so `works` is counted too: all modes found, and half of the draws of high
    quality.
    """
    modes, rows = len(MIXTURES[record["dataset"]].centres), [row for row in record["rows"] if where(row["set"])]
    scores = [1.0 if math.isnan(row["score"]) else row["score"] for row in rows]
    good = [row["modes"] == modes and row["high_quality"] >= WORKS for row in rows]
    errors = [row["mse"] for row in rows if not math.isnan(row.get("mse", math.nan))]
    shown = {
        "settings": len(scores),
        "score": statistics.mean(scores),
        "sd": statistics.stdev(scores),
        "failed": sum(score < FAILED for score in scores) / len(scores),
        "works": sum(good) / len(good),
    }
    if errors:  # without an encoder nothing is reconstructed
        shown |= {"mse": statistics.mean(errors), "median mse": statistics.median(errors)}
    return shown
