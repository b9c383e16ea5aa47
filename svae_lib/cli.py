r"""The command line `svae`: its subcommands and their options; `svae_lib.commands` does what they say."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svae_lib import __version__, commands
from svae_lib.errors import UserError

# Written out, for importing svae_lib.data costs seconds.
DATASETS = """digits, patches32, patches64, mnist, cifar10, tiny_imagenet, imagenet64,
    stacked_digits, stacked_mnist, ring8, grid25 or alice5"""


def seeds(text: str) -> list[int]:
    r"""3 -> [3]; 0-9 -> [0, ..., 9]."""
    found = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not 0 <= last - first < 10_000:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a seed like 3 nor a range like 0-9")
    return list(range(first, last + 1))


def positive(kind: type) -> Callable[[str], Any]:
    r"""A converter of arguments that must be above zero."""

    def convert(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above zero")
        return value

    convert.__name__ = kind.__name__
    return convert


def parser() -> argparse.ArgumentParser:
    r"""All subcommands, with help that teaches."""
    top = argparse.ArgumentParser(
        prog="svae",
        description="Train, evaluate and tabulate the symmetric VAE and its relatives.",
        epilog="Start with: svae methods; svae run digits svae-r; svae table mnist",
    )
    top.add_argument("--version", action="version", version=f"svae {__version__}")
    subcommands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    device, results = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    device.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    results.add_argument("--results", type=Path, help="folder of records (default: results/ of the clone)")

    def command(name: str, help: str, epilog: str = "", parents: Sequence = ()) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(
            name, help=help, description=help, epilog=textwrap.dedent(epilog), parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(function=getattr(commands, f"{name}_command"))
        return sub

    command("methods", "list the methods with their critic and player equations")

    run = command(
        "run", "train one model, evaluate it once on the test set, write one record",
        """\
        examples:
          svae run digits svae-r                        seconds, no download
          svae run mnist svae-exact --profile cpu --setting stabilised --seed 1
          svae run mnist svae-r --profile cpu --set weight=1.0 --set updates=20000
          svae run ring8 svae-exact --profile cpu --seed 0-9         ten seeds, trained as one
          torchrun --nproc_per_node=4 -m svae_lib run mnist svae-r   one model on four graphics cards

        Interrupted? The same command goes on where it stopped. Finished? It prints the record.
        """,
        parents=[device, results],
    )  # fmt: skip
    run.add_argument("dataset", help=DATASETS)
    run.add_argument("method", help="a name from `svae methods`")
    run.add_argument("--profile", default="quick", help="quick (seconds), cpu (up to 90 minutes) or paper (a GPU)")
    settings = "literal (as the appendix prints) or stabilised; of natural images also authors or beyond"
    run.add_argument("--setting", default="literal", help=settings)
    run.add_argument("--seed", type=seeds, default=[0], help="weights, batches and noise: 3, or 0-9 (default 0)")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one hyperparameter")

    keep = command(
        "keep", "keep the model of a finished run as a small file, which loads without data or training",
        """\
        example:
          svae keep mnist-svae-elbo-stabilised-cpu-s0

        The name is that of the record. The weights come from the run's checkpoint in the user's cache, and must give
        the record's metrics again. Python reads them with svae_lib.pretrained.load(NAME).
        """,
        parents=[results],
    )  # fmt: skip
    keep.add_argument("name", nargs="+", help="names of records")

    grid = command(
        "grid", "work through all runs of the tables, most valuable first, for a given time",
        """\
        examples:
          svae grid --dry-run                           every run: state, minutes predicted, command
          svae grid --budget-minutes 60                 whatever is expected to fit into an hour
          svae grid --only ring8 --jobs 2               one dataset, two runs at a time

        Finished runs are not repeated, interrupted ones are resumed, one that fails stops no other.
        The same runs on a cluster: snakemake --profile workflow/profiles/slurm
        """,
        parents=[device, results],
    )  # fmt: skip
    grid.add_argument("--budget-minutes", type=positive(float), default=math.inf, help="stop after so long")
    grid.add_argument("--jobs", type=positive(int), default=1, help="runs at a time (default 1)")
    grid.add_argument("--profile", default="cpu", help="quick, cpu (default) or paper")
    grid.add_argument("--only", metavar="DATASET", help="the runs on one dataset")
    grid.add_argument("--dry-run", action="store_true", help="only show the table")

    sweep = command(
        "sweep", "one method under 256 hyperparameter settings; goes on where it stopped", parents=[results]
    )
    sweep.add_argument("dataset", help="alice5, ring8 or grid25")
    sweep.add_argument("method", help="a name from `svae methods`")

    table = command("table", "the papers' table beside our records of it", parents=[results])
    table.add_argument("dataset", help="mnist, cifar10, imagenet64, ring8, grid25, alice5 or stacked_mnist")

    bounds = command(
        "bounds", "what the data alone says about likelihoods and errors; writes a record", parents=[results]
    )
    bounds.add_argument("dataset", help="a dataset of images")

    bench = command(
        "bench", "time the engine beside other loops and against the machine's limits; writes a record",
        """\
        examples:
          svae bench                                    all rows, minutes on an idle machine
          svae bench --quick                            all rows in a minute, roughly
          svae bench --only growth                      only these rows

        --only takes step, trainers, loader, sampling, growth or processes. With it, or with --quick, a record is
        written only if --results says where.

        Nothing else should run meanwhile: the record holds the load at start and end.
        `pip install -e ".[bench]"` brings the trainers of others; without them their rows say how to get them.
        """,
        parents=[device, results],
    )  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    bench.add_argument("--only", metavar="NAME", help="one group of rows")

    classifier = command(
        "classifier", "train the classifier that scores images, once, and measure real data by it",
        """\
        examples:
          svae classifier patches32                     a minute, no download
          svae classifier cifar10                       half an hour on two CPU cores, a minute on a graphics card

        Interrupted? The same command goes on after the last whole epoch. Finished? It prints the report.
        """,
        parents=[device, results],
    )  # fmt: skip
    classifier.add_argument("dataset", help="a dataset of images")

    notebook = command(
        "notebook", "execute one chapter with checked parameters",
        """\
        example:
          svae notebook mnist -p profile cpu -p seed 1 --output my_mnist.ipynb
        """,
    )  # fmt: skip
    notebook.add_argument("chapter", help="number, name or any unambiguous beginning of one")
    notebook.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    notebook.add_argument("--output", type=Path, help="where the executed notebook goes (default: in _build/runs/)")

    verify = command("verify", "prove every numbered equation and print the claims ledger")
    verify.add_argument("--store", action="store_true", help="also keep the observations for the book's ledger page")

    book = command("book", "execute the chapters whose outputs are out of date and build the HTML pages")
    book.add_argument("--all", action="store_true", help="execute every chapter")

    dataset = command("data", "find, download or convert a dataset, verify it, say where it is")
    dataset.add_argument("dataset", help=DATASETS)
    return top


def main(arguments: list[str] | None = None) -> int:
    r"""Run one subcommand. A user's error is one sentence on stderr and exit code 2, never a traceback."""
    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is killed tidies up as if interrupted
    if int(os.environ.get("RANK", 0)):  # of the processes of torchrun the first one speaks; errors all do
        sys.stdout = open(os.devnull, "w")
    try:
        args.function(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"svae: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        sys.stdout = open(os.devnull, "w")
    except OSError as error:  # a full disk, or a place that may not be written
        print(f"svae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("svae: interrupted; give the same command again to go on", file=sys.stderr)
        return 130
    return 0
