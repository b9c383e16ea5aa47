r"""The command line `svae`."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from svae_lib import __version__
from svae_lib.errors import UserError

# Written out, for importing svae_lib.data costs seconds.
DATASETS = """digits, patches32, patches64, mnist, cifar10, tiny_imagenet, imagenet64,
    stacked_digits, stacked_mnist, ring8, grid25 or alice5"""


def methods_command(_: argparse.Namespace) -> None:
    from svae_lib.methods import METHODS

    print(f"{'method':<16}{'critic':<8}{'players':<14}what it does")
    for method in METHODS.values():
        print(f"{method.name:<16}{method.critic_equation:<8}{method.player_equation:<14}{method.summary}")


def run_command(args: argparse.Namespace) -> None:
    from svae_lib import distributed, experiment, records

    changes = dict(pair_of(text) for text in args.set)
    make = partial(experiment.Experiment.make, args.dataset, args.method, args.profile, args.setting, **changes)
    chosen = [make(seed=seed) for seed in args.seed]
    folder = args.results or records.results_folder()
    print(f"{', '.join(e.name for e in chosen)}: {chosen[0].training.updates} updates")
    for record in experiment.run_all(chosen, args.device, folder, print_row):
        print_record(record)
        print(f"record: {folder / args.dataset / record['name']}.json")
    distributed.leave()


def seeds(text: str) -> list[int]:
    r"""3 -> [3]; 0-9 -> [0, ..., 9]."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a seed like 3 nor a range like 0-9")
    return list(range(int(first), int(last or first) + 1))


def pair_of(text: str) -> tuple[str, str]:
    r"""KEY=VALUE -> (KEY, VALUE)."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set wants KEY=VALUE, not '{text}'")
    return key, value


def print_row(row: dict) -> None:
    r"""One plain line of diagnostics."""
    shown = ("update", "seconds", "objective", "reconstruction", "kl", "critic_loss", "accuracy")
    shown = (*shown, "images/s", "points/s", "minutes left")
    print("  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row), flush=True)


def print_record(record: dict) -> None:
    r"""The metrics of a finished run."""
    if record["status"] != "done":
        print(f"{record['status']}: {record['reason']}")
    print_metrics(record)
    for name, real in record["real_data"].items():
        if name in record["metrics"]:
            print(f"{name + ', real test':<24}{real['value']:>6.3f}")


def print_metrics(record: dict) -> None:
    r"""One line per metric: value ± standard error, and the number of images."""
    for name, metric in record["metrics"].items():
        print(f"{name:<20}{metric['value']:>10.3f} ± {metric['se']:.3f}  (n = {metric['n']})")


def bounds_command(args: argparse.Namespace) -> None:
    import torch

    from svae_lib import bounds, data, records
    from svae_lib.device import describe

    record = bounds.compute(data.load(args.dataset))
    record["environment"] = records.environment(describe(torch.device("cpu")))
    print_metrics(record)
    print(f"record: {records.write_report(args.results or records.results_folder(), record)}")


def bench_command(args: argparse.Namespace) -> None:
    from svae_lib import bench, records, timing

    effort = timing.QUICK if args.quick else timing.FULL
    record = bench.run(args.device, effort, args.only, partial(print, flush=True))
    if args.results or not (args.quick or args.only):
        print(f"record: {records.write_report(args.results or records.results_folder(), record)}")


def classifier_command(args: argparse.Namespace) -> None:
    import torch

    from svae_lib import classifier, data, quality, records
    from svae_lib.device import choose_device, describe

    def say(epoch: int, epochs: int, accuracy: float) -> None:
        print(f"epoch {epoch} of {epochs}: {accuracy:.3f} of the validation images tried", flush=True)

    dataset, device = data.load(args.dataset), choose_device(args.device)
    folder = args.results or records.results_folder()
    report = records.read_report(f"classifier-{dataset.name}", folder)
    if report is None:
        torch.manual_seed(0)
        classifier.make_classifier(dataset, device, say)
        report = quality.calibrate(dataset, device) | {"environment": records.environment(describe(device))}
        print(f"record: {records.write_report(folder, report)}")
    print_metrics(report)


def keep_command(args: argparse.Namespace) -> None:
    from svae_lib import pretrained

    for name in args.name:
        path = pretrained.keep(name, args.results)
        changed = pretrained.load(name, args.results, "cpu").rounding
        shown = ", ".join(f"{key} by {value:.2g}" for key, value in changed.items())
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; half precision changed {shown or 'too much'}", flush=True)


def grid_command(args: argparse.Namespace) -> None:
    from svae_lib import records, schedule

    folder = (args.results or records.results_folder()).resolve()
    chosen = schedule.runs(args.profile, args.only)
    failed = {}
    if not args.dry_run:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed grid takes its runs with it
        failed = schedule.work(chosen, folder, args.budget_minutes, args.jobs, args.device, partial(print, flush=True))
    print(schedule.table(chosen, folder))
    if failed:
        raise UserError(f"{len(failed)} failed: " + "; ".join(f"{run.name}: {why}" for run, why in failed.items()))


def positive(kind: type) -> Callable[[str], Any]:
    r"""A converter of arguments that must be above zero."""

    def convert(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above zero")
        return value

    convert.__name__ = kind.__name__
    return convert


def sweep_command(args: argparse.Namespace) -> None:
    from svae_lib import sweep

    record = sweep.sweep(args.dataset, args.method, args.results, lambda done, of: print(f"{done} of {of}", flush=True))
    for name, value in sweep.summary(record).items():
        print(f"{name:<20}{value:>10.3f}")


def table_command(args: argparse.Namespace) -> None:
    from svae_lib import records

    print(records.table(args.dataset, args.results).to_string(index=False))


def notebook_command(args: argparse.Namespace) -> None:
    from svae_lib import notebooks

    print(notebooks.run_chapter(args.chapter, dict(args.parameter), args.output))


def verify_command(args: argparse.Namespace) -> None:
    from svae_lib import verify
    from svae_lib.notebooks import ROOT

    proofs = verify.run_proofs()
    claims = verify.ledger(proofs)
    print(verify.table(claims))
    if open_claims := [claim.equation for claim in claims if claim.status in ("FAILED", "no proof")]:
        raise UserError(f"not verified: {', '.join(open_claims)}; the messages above say why")
    if args.store:
        print(verify.write(proofs, ROOT / "book"))


def book_command(args: argparse.Namespace) -> None:
    from svae_lib import notebooks

    if args.store:
        notebooks.store()
    print(notebooks.build_book())


def data_command(args: argparse.Namespace) -> None:
    from svae_lib import data

    print(data.fetch(args.dataset))


def parser() -> argparse.ArgumentParser:
    r"""All subcommands, with help that teaches."""
    top = argparse.ArgumentParser(
        prog="svae",
        description="Train, evaluate and tabulate the symmetric VAE and its relatives.",
        epilog="Start with: svae methods; svae run digits svae-r; svae table mnist",
    )
    top.add_argument("--version", action="version", version=f"svae {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=textwrap.dedent(epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(function=function)
        return sub

    command("methods", methods_command, "list the methods with their critic and player equations")

    run = command(
        "run", run_command, "train one model, evaluate it once on the test set, write one record",
        """\
        examples:
          svae run digits svae-r                        seconds, no download
          svae run mnist svae-exact --profile cpu --setting stabilised --seed 1
          svae run mnist svae-r --profile cpu --set weight=1.0 --set updates=20000
          svae run ring8 svae-exact --profile cpu --seed 0-9         ten seeds, trained as one
          torchrun --nproc_per_node=4 -m svae_lib run mnist svae-r   one model on four graphics cards

        Interrupted? The same command goes on where it stopped. Finished? It prints the record.
        """,
    )  # fmt: skip
    run.add_argument("dataset", help=DATASETS)
    run.add_argument("method", help="a name from `svae methods`")
    run.add_argument("--profile", default="quick", help="quick (seconds), cpu (minutes to an hour) or paper (a GPU)")
    settings = "literal (as the appendix prints) or stabilised; of natural images also authors or beyond"
    run.add_argument("--setting", default="literal", help=settings)
    run.add_argument("--seed", type=seeds, default=[0], help="weights, batches and noise: 3, or 0-9 (default 0)")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one hyperparameter")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--results", type=Path, help="folder for records (default: results/ of the clone)")

    keep = command(
        "keep", keep_command, "keep the model of a finished run as a small file, which loads without data or training",
        """\
        example:
          svae keep mnist-svae-elbo-stabilised-cpu-s0

        The name is that of the record. The weights come from the run's checkpoint in the user's cache, and must give
        the record's metrics again. Python reads them with svae_lib.pretrained.load(NAME).
        """,
    )  # fmt: skip
    keep.add_argument("name", nargs="+", help="names of records")
    keep.add_argument("--results", type=Path, help="folder of records (default: results/ of the clone)")

    grid = command(
        "grid", grid_command, "work through all runs of the tables, most valuable first, for a given time",
        """\
        examples:
          svae grid --dry-run                           every run: state, minutes predicted, command
          svae grid --budget-minutes 60                 whatever is expected to fit into an hour
          svae grid --only ring8 --jobs 2               one dataset, two runs at a time

        Finished runs are not repeated, interrupted ones are resumed, one that fails stops no other.
        The same runs on a cluster: snakemake --profile workflow/profiles/slurm
        """,
    )  # fmt: skip
    grid.add_argument("--budget-minutes", type=positive(float), default=math.inf, help="stop after so long")
    grid.add_argument("--jobs", type=positive(int), default=1, help="runs at a time (default 1)")
    grid.add_argument("--profile", default="cpu", help="quick, cpu (default) or paper")
    grid.add_argument("--only", metavar="DATASET", help="the runs on one dataset")
    grid.add_argument("--dry-run", action="store_true", help="only show the table")
    grid.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    grid.add_argument("--results", type=Path, help="folder for records (default: results/ of the clone)")

    sweep = command("sweep", sweep_command, "one method under 256 hyperparameter settings; goes on where it stopped")
    sweep.add_argument("dataset", help="alice5, ring8 or grid25")
    sweep.add_argument("method", help="a name from `svae methods`")
    sweep.add_argument("--results", type=Path, help="folder for records (default: results/ of the clone)")

    table = command("table", table_command, "the papers' table beside our records of it")
    table.add_argument("dataset", help="mnist, cifar10, ring8, grid25 or stacked_mnist")
    table.add_argument("--results", type=Path, help="folder of records (default: results/ of the clone)")

    bounds = command("bounds", bounds_command, "what the data alone says about likelihoods and errors; writes a record")
    bounds.add_argument("dataset", help=DATASETS)
    bounds.add_argument("--results", type=Path, help="folder for records (default: results/ of the clone)")

    bench = command(
        "bench", bench_command, "time the engine beside other loops and against the machine's limits; writes a record",
        """\
        examples:
          svae bench                                    all rows, minutes on an idle machine
          svae bench --quick                            all rows in a minute, roughly; no record
          svae bench --only growth                      step, trainers, loader, sampling or growth; no record

        Nothing else should run meanwhile: the record holds the load at start and end.
        `pip install -e ".[bench]"` brings the trainers of others; without them their rows say how to get them.
        """,
    )  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    bench.add_argument("--only", metavar="NAME", help="one group of rows")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    bench.add_argument("--results", type=Path, help="folder for the record (default: results/ of the clone)")

    classifier = command(
        "classifier", classifier_command, "train the classifier that scores images, once, and measure real data by it",
        """\
        examples:
          svae classifier patches32                     a minute, no download
          svae classifier cifar10                       half an hour on two CPU cores, a minute on a graphics card

        Interrupted? The same command goes on after the last whole epoch. Finished? It prints the report.
        """,
    )  # fmt: skip
    classifier.add_argument("dataset", help="a dataset of images")
    classifier.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    classifier.add_argument("--results", type=Path, help="folder for the report (default: results/ of the clone)")

    notebook = command(
        "notebook", notebook_command, "execute one chapter with checked parameters",
        """\
        example:
          svae notebook mnist -p profile cpu -p seed 1 --output my_mnist.ipynb
        """,
    )  # fmt: skip
    notebook.add_argument("chapter", help="number, name or any unambiguous beginning of one")
    notebook.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    notebook.add_argument("--output", type=Path, help="where the executed notebook goes (default: _build)")

    verify = command("verify", verify_command, "prove every numbered equation and print the claims ledger")
    verify.add_argument("--store", action="store_true", help="also keep the observations for the book's ledger page")

    book = command("book", book_command, "execute the chapters that changed and build the HTML pages")
    book.add_argument("--store", action="store_true", help="also keep the fresh outputs in notebooks/")

    dataset = command("data", data_command, "find, download or convert a dataset, verify it, say where it is")
    dataset.add_argument("dataset", help=DATASETS)
    return top


def main(arguments: list[str] | None = None) -> int:
    r"""Run one subcommand. A user's error is one sentence on stderr and exit code 2, never a traceback."""
    args = parser().parse_args(arguments)
    if int(os.environ.get("RANK", 0)):  # of the processes of torchrun the first one speaks; errors all do
        sys.stdout = open(os.devnull, "w")
    try:
        args.function(args)
    except UserError as error:
        print(f"svae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("svae: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0
