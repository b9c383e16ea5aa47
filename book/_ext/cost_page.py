r"""The tables of the page *Cost*: `{cost} nets`, `machines`, `predicted`, `papers`, `runs` and `bench`.

What is counted comes from the library's nets, what was measured from the records of `svae bench` and `svae run`.
Without a record a cell says "not run", and how to run it.
"""

import functools
import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from docutils import nodes
from pages import SAFE, Directive
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from svae_lib import bench, costs, records, schedule
from svae_lib.costs import Cost, Machine
from svae_lib.experiment import Experiment
from svae_lib.settings import PROFILES

METHOD = "svae-r"
UPDATES = PROFILES["images"]["paper"]["updates"]
NOT_RUN = "not run: `svae bench`"


@functools.cache
def counted(method: str, precision: str) -> list[Cost]:
    r"""All nets with all data they serve, counted once a build."""
    return costs.all_costs(method, precision)


def bench_records(folder: Path) -> list[records.Record]:
    r"""The records of `svae bench`, one a machine."""
    return [records.read_report(path.stem, folder) for path in sorted(folder.glob("bench-*.json"))]


def described(machine: Machine, measured: list[records.Record]) -> bool:
    r"""Whether one of the records is of the machine that its maker describes."""
    return any(machine.name in record["machine"] for record in measured)


def machines(folder: Path, others: Sequence[Machine] = ()) -> list[tuple[Machine, str, records.Record | None]]:
    r"""Every machine with a name for the page and its record; published ones, which have none, and others follow."""
    measured = bench_records(folder)
    found = [
        (machine, f"{record['machine']}; {machine.name}", record)
        for record in measured
        for machine in (Machine(**rates) for rates in record["machines"])
    ]
    return found + [(m, m.name, None) for m in (*costs.PUBLISHED, *others) if not described(m, measured)]


def duration(seconds: float) -> str:
    r"""In the unit that a reader would choose."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def share(prediction: costs.Prediction) -> str:
    r"""What binds, and how much of the time."""
    return f"{prediction.limit}, {100 * prediction.shares[prediction.limit]:.0f} %"


def called(cost: Cost) -> str:
    r"""Nets and data in words."""
    return f"{cost.experiment.nets.architecture}, {cost.dataset}"


# The tables ----------------------------------------------------------------------------------------


def nets_table() -> pd.DataFrame:
    r"""FLOPs and bytes of every net, for the VAE and for a method with a critic."""
    rows = []
    vaes = {called(cost): f"{cost.flops / 1e6:,.0f}" for cost in counted("vae", "fp32")}
    for symmetric in counted(METHOD, "fp32"):
        rows.append({
            "nets, data": called(symmetric),
            "parameters": f"{symmetric.parameters:,}",
            "MFLOP, vae": vaes.get(called(symmetric), "–"),
            f"MFLOP, {METHOD}": f"{symmetric.flops / 1e6:,.0f}",
            "MB": f"{symmetric.bytes / 1e6:.1f}",
            "FLOP/byte": f"{symmetric.intensity:.0f}",
            "operators": len(symmetric.update),
            "MFLOP, one sample": f"{sum(op.flops for op in symmetric.image) / 1e6:,.0f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def machines_table(folder: Path) -> pd.DataFrame:
    r"""The four rates of every machine, and the intensity above which arithmetic binds."""
    rows = []
    for machine, name, record in machines(folder, costs.PAPERS_CARDS):
        source = "published peak; overhead assumed"
        if record is not None:
            source = f"measured {record['environment']['date']}, {record['effort']}, load {record['load'][0]}"
        rows.append({
            "machine": name,
            "TFLOP/s, fp32": f"{machine.fp32 / 1e12:.3g}",
            "TFLOP/s, bf16": f"{machine.bf16 / 1e12:.3g}" if machine.bf16 else "–",
            "GB/s": f"{machine.bandwidth / 1e9:,.0f}",
            "µs an operator": f"{1e6 * machine.overhead:.2g}",
            "FLOP/byte, fp32": f"{machine.fp32 / machine.bandwidth:.0f}",
            "source": source,
        })  # fmt: skip
    if not bench_records(folder):
        rows.insert(0, dict.fromkeys(rows[0], "") | {"machine": "this book's", "source": NOT_RUN})
    return pd.DataFrame(rows)


def fastest(both: Sequence[Cost], machine: Machine) -> tuple[Cost, costs.Prediction]:
    r"""Of the costs in fp32 and bf16 that which is predicted to be faster on a machine, if it knows bf16."""
    known = both if machine.bf16 else both[:1]
    return min(((cost, costs.predict(cost.update, machine)) for cost in known), key=lambda pair: pair[1].seconds)


def predicted_table(folder: Path) -> pd.DataFrame:
    r"""Time of an update, an epoch and the profile `paper` for every net on every machine, and what was measured."""
    rows = []
    for both in zip(counted(METHOD, "fp32"), counted(METHOD, "bf16"), strict=True):
        for machine, name, record in machines(folder):
            cost, prediction = fastest(both, machine)
            updates = costs.IMAGES[cost.dataset] / cost.batch
            rows.append({
                "nets, data": called(cost),
                "machine": name,
                "precision": cost.experiment.training.precision,
                "update": duration(prediction.seconds),
                "epoch": duration(updates * prediction.seconds),
                f"{UPDATES:,} updates": duration(UPDATES * prediction.seconds),
                "limited by": share(prediction),
                "measured update": time_cell(record, measured_update(record, machine, cost)),
            })  # fmt: skip
    return pd.DataFrame(rows)


def measured_update(record: records.Record | None, machine: Machine, cost: Cost) -> float | None:
    r"""Seconds, if the record has this update; it was timed in the surroundings of its first machine."""
    if record is None or machine.name != record["machines"][0]["name"]:
        return None
    wanted = f"{bench.label(cost.experiment)}: engine ÷ by hand"
    return next((row["measured"]["engine"] for row in record["rows"] if row["name"] == wanted), None)


def time_cell(record: records.Record | None, seconds: float | None) -> str:
    r"""A measured time as a cell."""
    return duration(seconds) if seconds else "predicted, not measured" if record is None else "–"


def papers_table(folder: Path) -> pd.DataFrame:
    r"""The papers' cost on ImageNet-64 beside the prediction for the nets that serve it."""
    heads = ("what", "machine", "epoch", "in all", "sample", "measured epoch")
    in_all, rows = {"sVAE-r": "under 2 days"}, []
    for what, printed in costs.PAPERS_COSTS.items():
        epoch = f"{printed.epoch / 3_600:g} h"
        cells = (f"{what}, paper", "one TITAN X", epoch, in_all.get(what, "–"), duration(printed.sample), epoch)
        rows.append(dict(zip(heads, cells, strict=True)))
    for batch in (64, 256):
        for machine, name, record in machines(folder, costs.PAPERS_CARDS):
            cost, prediction = fastest(of_imagenet(batch), machine)
            epoch = costs.IMAGES["imagenet64"] / batch * prediction.seconds
            cells = (f"{METHOD}, {cost.experiment.nets.architecture}, batch {batch}", name)
            cells += (duration(epoch), f"{duration(12 * epoch)} for 12 epochs")
            update = measured_update(record, machine, cost)
            cells += (duration(costs.predict(cost.image, machine).seconds),)
            cells += (time_cell(record, update and update * costs.IMAGES["imagenet64"] / batch),)
            rows.append(dict(zip(heads, cells, strict=True)))
    return pd.DataFrame(rows)


@functools.cache
def of_imagenet(batch: int) -> list[Cost]:
    r"""The nets of ImageNet-64 in both precisions."""
    made = [Experiment.make("imagenet64", METHOD, precision=precision, batch=batch) for precision in ("fp32", "bf16")]
    return [costs.cost(experiment, costs.SHAPES["imagenet64"]) for experiment in made]


def runs_table(folder: Path, dataset: str = "mnist") -> pd.DataFrame:
    r"""Seconds per update of the papers' own methods, beside the prediction for the machine of that description."""
    known = {machine.name: machine for machine, _, record in machines(folder) if record is not None}
    groups: dict[tuple[str, str, str], list[records.Record]] = {}
    for record in records.read_all(dataset, folder):
        e, plain = record["experiment"], record["status"] == "done" and not record["changes"]
        if plain and e["method"] in schedule.OWN:
            groups.setdefault((e["method"], e["setting"], record["environment"]["device"]), []).append(record)
    rows = []
    for (method, setting, device), runs in groups.items():
        seconds = [run["seconds"] / run["experiment"]["updates"] for run in runs]
        machine, paces = known.get(device), f"{1e3 * statistics.median(seconds):.0f}"
        row = {"method": method, "setting": setting, "device": device, "runs": len(runs), "ms an update": paces}
        row |= {"fastest": f"{1e3 * min(seconds):.0f}", "slowest": f"{1e3 * max(seconds):.0f}"}
        row |= {"predicted": "no record of this device: `svae bench`", "measured ÷ predicted": "–"}
        if machine is not None:
            expected = costs.predict(update_of(runs[0]), machine).seconds
            row["predicted"] = f"{1e3 * expected:.0f}"
            row["measured ÷ predicted"] = f"{statistics.median(seconds) / expected:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def update_of(record: records.Record) -> list[costs.Operator]:
    r"""The operators of an update of a recorded run."""
    e, imitated = record["experiment"], "no bf16" in record["environment"]["device"]  # then it trained in fp32
    changes = {"precision": "fp32"} if imitated else {}
    made = Experiment.make(e["dataset"], e["method"], e["profile"], e["setting"], **changes)
    return costs.cost(made, costs.SHAPES[e["dataset"]]).update


def bench_table(record: records.Record) -> pd.DataFrame:
    r"""The rows of one record of `svae bench`."""
    rows = []
    for row in record["rows"]:
        cells = {"row": row["name"], "median": row.get("reason", ""), "quartiles": "", "aim": row.get("aim", "")}
        if "reason" not in row:
            unit = "" if row["unit"] == "×" else f" {row['unit']}"
            cells |= {"median": f"{row['value']:.3g}{unit}", "quartiles": f"{row['low']:.3g} to {row['high']:.3g}"}
        rows.append(cells)
    return pd.DataFrame(rows)


class CostTable(Directive):
    r"""One of the tables above."""

    required_arguments = 1
    TABLES = {"machines": machines_table, "predicted": predicted_table, "papers": papers_table, "runs": runs_table}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.metadata[self.env.docname]["cost"] = "yes"  # for `outdated`
        if name == "nets":
            return [self.shown(nets_table())]
        if name == "bench":
            found = bench_records(self.results)
            made = [node for record in found for node in self.of(record)]
            return made or [self.paragraph(NOT_RUN)]
        if name not in self.TABLES:
            raise self.error(f"there is no table '{name}'; choose nets, bench or one of: {', '.join(self.TABLES)}")
        found = self.TABLES[name](self.results)
        return [self.shown(found) if len(found) else self.paragraph("not run: `svae grid --only mnist`")]

    def of(self, record: records.Record) -> list[nodes.Node]:
        made = record["environment"]
        words = f"{made['date']}, torch {made['torch']}, {record['effort']}, load {record['load'][0]} at the start"
        return [self.paragraph(f"**{record['machine']}** ({words} and {record['load'][1]} at the end)"),
                self.shown(bench_table(record))]  # fmt: skip

    def shown(self, found: pd.DataFrame) -> nodes.table:
        return self.table(list(found.columns), found.astype(str).values.tolist(), "measured")


def fingerprint(folder: Path) -> str:
    r"""Changes when the page may: with the library, and the records of `svae bench` and of the runs."""
    library = sorted(Path(costs.__file__).parent.glob("*.py"))
    found = (*sorted(folder.glob("bench-*.json")), *sorted(folder.glob("*/*.json")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*library, *found))).hexdigest()


def outdated(app: Sphinx, env: BuildEnvironment, *_: set[str]) -> list[str]:
    r"""The page is read again only then, for counting all nets takes a while."""
    before, env.cost_fingerprint = getattr(env, "cost_fingerprint", ""), fingerprint(Path(app.srcdir) / "results")
    return [page for page, data in env.metadata.items() if "cost" in data and before != env.cost_fingerprint]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-get-outdated", outdated)
    app.add_directive("cost", CostTable)
    return SAFE
