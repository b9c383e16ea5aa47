r"""Run records: one JSON file per run, and the tables that are made from them and from nothing else."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from svae_lib import __version__
from svae_lib.data import NATURAL, STACKED
from svae_lib.errors import UserError
from svae_lib.files import whole
from svae_lib.mixtures import MIXTURES

Record = dict[str, Any]

# Metric in a record -> heading, decimals: of any images, of grey ones, of natural ones, of points.
IMAGE_COLUMNS = {
    "rmse_grey": ("RMSE, levels", 1),
    "l2": ("RMSE, L2", 2),
    "score": ("score", 2),
    "fcd": ("FCD", 2),
    "kcd": ("KCD", 3),
}
COLUMNS = {
    "elbo_grey": ("ELBO, grey", 1),
    "elbo_dynamic": ("ELBO, binarised", 1),
    "iw_dynamic": ("IW bound, binarised", 1),
    "nll": ("NLL, 256 levels", 1),
    "bits_per_dim": ("bits/dim", 2),
    **IMAGE_COLUMNS,
}
COLOUR_COLUMNS = {
    "bits_closed": ("bits/dim, closed", 2),
    "bits_open": ("bits/dim, open", 2),
    "iw_bits_open": ("IW bits/dim, open", 2),
    "bits_per_dim": ("bits/dim, exact", 2),
    **IMAGE_COLUMNS,
}
MODE_COLUMNS = {
    "modes": ("modes", 1),
    "high_quality": ("high quality", 3),
    "mode_kl": ("KL of modes", 3),
    "l2": ("L2 error", 3),
}


def results_folder(chosen: Path | None = None) -> Path:
    r"""Where records live: the chosen folder, else `results/` of the clone the library is installed from, or here."""
    if chosen is not None:
        return chosen
    clone = Path(__file__).resolve().parent.parent / "results"
    return clone if clone.is_dir() else Path("results")


def environment(device: str) -> dict[str, str]:
    r"""What the numbers may depend on besides the experiment."""
    changed = "+changes" if _git("status", "--porcelain", ".") else ""
    return {
        "commit": (_git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "version": __version__,
        "device": device,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # more than a string, which a checkpoint may not hold
        "date": datetime.now(UTC).date().isoformat(),
    }


def _git(*arguments: str) -> str:
    """What git says of the library's folder; nothing where there is no git, or no clone."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def path(folder: Path, dataset: str, name: str) -> Path:
    r"""Where the record of a run is, or will be."""
    return folder / dataset / f"{name}.json"


def write(folder: Path, record: Record) -> Path:
    r"""Write the record of a run, whole or not at all; returns its path."""
    return _write(path(folder, record["experiment"]["dataset"], record["name"]), record)


def _write(path: Path, record: Record) -> Path:
    with whole(path) as new:
        new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path, dataset: str, name: str) -> Record | None:
    r"""The record of that name, or None if there is none. Raises UserError if the file is damaged."""
    return _read(path(folder, dataset, name))


def _read(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not even text
        raise UserError(f"{path} is damaged; delete it and run the experiment again") from None


def write_report(folder: Path, record: Record) -> Path:
    r"""Write a record that is not of one run (bounds-DATASET, sweep-DATASET-METHOD) as NAME.json; returns its path."""
    return _write(folder / f"{record['name']}.json", record)


def read_report(name: str, folder: Path | None = None) -> Record | None:
    r"""The record of that name, or None if there is none. Raises UserError if the file is damaged."""
    return _read(results_folder(folder) / f"{name}.json")


def read_bounds(dataset: str, folder: Path | None = None) -> Record:
    r"""The bounds of a dataset. Raises UserError if there is no record of them, or a damaged one."""
    record = read_report(f"bounds-{dataset}", folder)
    if record is None:
        raise UserError(f"there are no bounds of '{dataset}'; run `svae bounds {dataset}`")
    return record


def read_all(dataset: str, folder: Path | None = None, trials: bool = False) -> list[Record]:
    r"""All records of a dataset, ordered by name; those of quick runs, which git ignores, only where trials count."""
    folder = results_folder(folder)
    names = [path.stem for path in sorted((folder / dataset).glob("*.json"))]
    return [read(folder, dataset, name) for name in names if trials or "-quick-s" not in name]


def papers(dataset: str) -> list[dict[str, Any]]:
    r"""The rows that the papers print for a dataset, from results/papers.json."""
    rows = _read(results_folder() / "papers.json") or {}
    if dataset not in rows:
        raise UserError(f"the papers print no table for '{dataset}'; they do for: {', '.join(rows)}")
    return rows[dataset]


def of_row(runs: Iterable[Record], method: str, setting: str, profile: str = "cpu", **changes: Any) -> list[Record]:
    r"""The finished runs of one row of a table, which differ in their seeds alone; `changes` is that of `--set`."""
    row = {"method": method, "setting": setting, "profile": profile}.items()
    same = [run for run in runs if run["changes"] == changes and row <= run["experiment"].items()]
    return [run for run in same if run["status"] == "done"]


def values(runs: Iterable[Record], method: str, setting: str, metric: str, **row: Any) -> list[float]:
    r"""What the runs of a row (`of_row`) measured, a number for each that has it."""
    found = [run["metrics"] for run in of_row(runs, method, setting, **row)]
    return [metrics[metric]["value"] for metrics in found if metric in metrics]


def mean(runs: Iterable[Record], method: str, setting: str, metric: str, **row: Any) -> float:
    r"""The mean of `values`, nan where there are none: what has not been run contradicts no comparison."""
    found = values(runs, method, setting, metric, **row)
    return statistics.mean(found) if found else math.nan


def spread(values: list[float], decimals: int) -> str:
    r"""mean ± standard deviation over seeds; one seed shows no spread."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def columns(dataset: str) -> dict[str, tuple[str, int]]:
    r"""What is measured on a dataset: metric -> heading, decimals."""
    if dataset in NATURAL:
        return COLOUR_COLUMNS
    return MODE_COLUMNS if dataset in (*MIXTURES, *STACKED) else COLUMNS


def grouped(dataset: str, folder: Path | None = None) -> dict[tuple[str, str, str, int], list[Record]]:
    r"""The records of each row: (method, setting and its changes, profile, updates) -> runs, which differ in seeds."""
    groups: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in read_all(dataset, folder):
        e = record["experiment"]
        setting = " ".join([e["setting"], *(f"{key}={value}" for key, value in record["changes"].items())])
        groups.setdefault((e["method"], setting, e["profile"], e["updates"]), []).append(record)
    return groups


def our_rows(dataset: str, folder: Path | None = None) -> pd.DataFrame:
    r"""One row per (method, setting, profile, updates): each metric as mean ± sd over its seeds, or "(k of n)"."""
    rows = []
    for (method, setting, profile, updates), runs in grouped(dataset, folder).items():
        row = {"method": method, "setting": setting, "profile": profile, "updates": updates, "seeds": len(runs)}
        finished = [run["metrics"] for run in runs if run["status"] == "done"]
        for metric, (heading, decimals) in columns(dataset).items():
            seen = [m[metric]["value"] for m in finished if metric in m and math.isfinite(m[metric]["value"])]
            row[heading] = spread(seen, decimals) if seen else "–" if finished else "diverged"
            row[heading] += f" ({len(seen)} of {len(finished)})" * (0 < len(seen) < len(finished))
        row["minutes"] = round(statistics.mean(run["seconds"] for run in runs) / 60, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def table(dataset: str, folder: Path | None = None) -> pd.DataFrame:
    r"""The papers' rows, and behind each the records of the same method, or "not run" and why."""
    ours = our_rows(dataset, folder)
    rows, known = [], papers(dataset)
    printable = ("NLL", "RMSE", "score", "modes", "high quality", "KL")
    shown = [name for name in printable if any(name in row for row in known)]
    for printed in known:
        key = printed.get("ours")
        row = {"method": printed["method"], "source": printed["source"]}
        row |= {f"paper {name}": printed.get(name, "") for name in shown}
        match = ours[ours["method"] == key] if key and len(ours) else ours[:0]
        for _, run in match.iterrows():
            ours_is = {"ours": f"{run['setting']}, {run['profile']}"}
            rows.append(row | ours_is | run.drop(["method", "setting", "profile"]).to_dict())
        if printed.get("sweep"):
            rows.append(row | {"ours": f"over many settings: svae sweep {dataset} {key}"})
        elif not len(match):
            reason = f"not run: svae run {dataset} {key} --profile cpu" if key else f"not run: {printed['reason']}"
            rows.append(row | {"ours": reason})
    measured = ["updates", "seeds", *(heading for heading, _ in columns(dataset).values()), "minutes"]
    headings = ["method", "source", *(f"paper {name}" for name in shown), "ours", *measured]
    return pd.DataFrame(rows, columns=headings, dtype=object).fillna("")
