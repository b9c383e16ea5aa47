r"""What each subcommand of `svae` does; `svae_lib.cli` has its options. Imports wait until a command needs them."""

from __future__ import annotations

import argparse
from functools import partial

from svae_lib.errors import UserError


def methods_command(_: argparse.Namespace) -> None:
    from svae_lib.methods import METHODS

    print(f"{'method':<16}{'critic':<8}{'players':<14}what it does")
    for method in METHODS.values():
        print(f"{method.name:<16}{method.critic_equation:<8}{method.player_equation:<14}{method.summary}")


def run_command(args: argparse.Namespace) -> None:
    from svae_lib import distributed, experiment, records

    changes = dict(pair_of(text) for text in args.set)
    for key in {"dataset", "method", "profile", "setting", "seed"} & changes.keys():
        raise UserError(f"{key} is no key of --set; it is an argument of its own, see `svae run --help`")
    make = partial(experiment.Experiment.make, args.dataset, args.method, args.profile, args.setting, **changes)
    chosen = [make(seed=seed) for seed in args.seed]
    folder = records.results_folder(args.results)
    print(f"{', '.join(e.name for e in chosen)}: {chosen[0].training.updates} updates")
    for record in experiment.run_all(chosen, args.device, folder, print_row):
        print_record(record)
        print(f"record: {folder / args.dataset / record['name']}.json")
    distributed.leave()


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
    numbers = ((name, row[name]) for name in shown if name in row)
    print("  ".join(f"{name} {n:.4g}" if abs(n) < 1e4 else f"{name} {n:.0f}" for name, n in numbers), flush=True)


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

    record = bounds.compute(data.load_images(args.dataset))
    record["environment"] = records.environment(describe(torch.device("cpu")))
    print_metrics(record)
    print(f"record: {records.write_report(records.results_folder(args.results), record)}")


def bench_command(args: argparse.Namespace) -> None:
    from svae_lib import bench, records, timing

    effort = timing.QUICK if args.quick else timing.FULL
    record = bench.run(args.device, effort, args.only, partial(print, flush=True))
    if args.results or not (args.quick or args.only):
        print(f"record: {records.write_report(records.results_folder(args.results), record)}")


def classifier_command(args: argparse.Namespace) -> None:
    from svae_lib import classifier, data, quality, records
    from svae_lib.device import choose_device, describe

    def say(epoch: int, epochs: int, accuracy: float) -> None:
        print(f"epoch {epoch} of {epochs}: {accuracy:.3f} of the validation images tried", flush=True)

    if args.dataset in data.STACKED:
        raise UserError(f"{args.dataset} is judged by the classifier of {data.STACKED[args.dataset]}; train that one")
    dataset, device = data.load_images(args.dataset), choose_device(args.device)
    folder = records.results_folder(args.results)
    report = records.read_report(f"classifier-{dataset.name}", folder)
    if report is None:
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

    folder = records.results_folder(args.results).resolve()
    chosen = schedule.runs(args.profile, args.only)
    failed = {}
    if not args.dry_run:
        failed = schedule.work(chosen, folder, args.budget_minutes, args.jobs, args.device, partial(print, flush=True))
    print(schedule.table(chosen, folder, args.device))
    if failed:
        raise UserError(f"{len(failed)} failed: " + "; ".join(f"{run.name}: {why}" for run, why in failed.items()))


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
    from svae_lib import book

    print(book.build_book(everything=args.all))


def data_command(args: argparse.Namespace) -> None:
    from svae_lib import data

    print(data.fetch(args.dataset))
