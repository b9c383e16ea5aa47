"""Experiments, records and the command line, as a user meets them."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from svae_lib import cli, evaluation, experiment, records, train
from svae_lib.ensembles import alone
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS

SMALL = ["--set", "updates=6", "--set", "batch=8", "--set", "score_samples=40", "--set", "iw_samples=4"]


pytestmark = pytest.mark.usefixtures("own_cache", "no_classifier")


def test_profile_then_setting_then_changes():
    made = Experiment.make("digits", "svae-r", "cpu", "stabilised", 3, updates="7", penalty=1)
    assert (made.training.updates, made.training.precision, made.training.penalty) == (7, "bf16", 1.0)
    assert made.nets.critic_pool == "none" and made.seed == 3


def test_names_are_readable_and_tell_changes_apart():
    plain, changed = Experiment.make("digits", "vae"), Experiment.make("digits", "vae", lr=0.5)
    assert plain.name == "digits-vae-literal-quick-s0"
    assert changed.name.startswith(plain.name + "-") and changed.name != Experiment.make("digits", "vae", lr=0.4).name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "mnits", "vae"], "unknown dataset 'mnits'; choose one of: digits"),
        (["run", "digits", "gnu"], "unknown method 'gnu'; choose one of: vae"),
        (["run", "digits", "vae", "--profile", "fast"], "unknown profile 'fast'; choose one of: quick"),
        (["run", "digits", "vae", "--setting", "best"], "unknown setting 'best'; choose one of: literal"),
        (["run", "digits", "vae", "--set", "lrr=1"], "unknown key 'lrr'; choose one of: architecture"),
        (["run", "digits", "vae", "--set", "updates=many"], "updates must be a whole number, not 'many'"),
        (["run", "digits", "vae", "--set", "updates"], "--set wants KEY=VALUE"),
        (["run", "digits", "vae", "--device", "tpu"], "device 'tpu' is not available here"),
        (["run", "patches32", "vae", "--set", "batch=0"], "batch must be positive"),
        (["run", "ring8", "vae", "--set", "batch=1"], "batch must be at least 2"),
        (["run", "digits", "svae", "--set", "critic_outputs=2"], "the critic of svae gives one score"),
        (["run", "digits", "vae", "--set", "updates=inf"], "updates must be a whole number"),
        (["sweep", "mnist", "svae"], "svae on mnist cannot be swept"),
        (["sweep", "ring8", "wgan"], "wgan on ring8 cannot be swept"),
        (["run", "digits", "vae", "--set", "critic_pool=max"], "critic_pool must be one of average, none"),
        (["run", "digits", "vae", "--set", "dropout=1"], "dropout must be at least 0 and below 1"),
        (["run", "digits", "vae", "--set", "seed=5"], "seed is no key of --set"),
        (["run", "digits", "vae", "--set", "axis=Grey"], "unknown key 'axis'"),
        (["run", "digits", "vae", "--set", "score_samples=1"], "score_samples must be at least 2, not 1"),
        (["run", "digits", "vae", "--set", "lr=nan"], "lr must be a finite number, not 'nan'"),
        (["run", "digits", "vae", "--set", "beta1=1.5"], "beta1 must be at least 0 and below 1"),
        (["run", "digits", "vae", "--set", "penalty=-1"], "penalty must not be negative"),
        (["run", "digits", "vae", "--set", "instance_noise=-1"], "instance_noise must not be negative"),
        (["run", "digits", "vae", "--set", "inception=true"], "inception=true needs colour images"),
        (["run", "digits", "vae", "--device", "cpu:x"], "device 'cpu:x' is not available here"),
        (["run", "digits", "vae", "--device", "cpu:"], "device 'cpu:' is not available here"),
        (["run", "digits", "vae", "--set", "hidden=1000000000000"], "these nets do not fit into memory"),
        (["classifier", "stacked_digits"], "stacked_digits is judged by the classifier of digits"),
        (["classifier", "ring8"], "ring8 holds points, and this needs images"),
        (["bounds", "ring8"], "ring8 holds points, and this needs images"),
        (["table", "digits"], "the papers print no table for 'digits'"),
        (["data", "imagenet"], "unknown dataset 'imagenet'"),
    ],
)
def test_a_users_error_is_one_sentence(arguments, message, capsys, tmp_path):
    extra = ["--results", str(tmp_path)] if arguments[0] == "run" else []
    assert cli.main(arguments + extra) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_run_writes_one_record_and_does_not_repeat_it(tmp_path, capsys):
    command = ["run", "digits", "svae-r", *SMALL, "--results", str(tmp_path)]
    assert cli.main(command) == 0
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "done" and record["experiment"]["updates"] == 6
    measured = set(records.COLUMNS) - {"nll", "bits_per_dim", "fcd", "kcd"}
    assert measured <= set(record["metrics"]) and "score" in record["real_data"]
    kinds = {"samples", "neighbours", "reconstructions", "interpolations"}
    assert {p.name.split(".")[1] for p in tmp_path.rglob("*.png")} == kinds
    written = path.stat().st_mtime_ns
    assert cli.main(command) == 0 and path.stat().st_mtime_ns == written
    assert "elbo_grey" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_stops_before_the_training(tmp_path, capsys):
    (file := tmp_path / "results").write_text("no folder")
    assert cli.main(["run", "digits", "vae", "--set", "updates=1000000", "--results", str(file)]) == 2
    assert str(file) in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_images_drawn_without_a_density_have_a_score_and_no_bound(tmp_path):
    small = dict(pair.split("=") for pair in SMALL if "=" in pair)
    record = experiment.run(Experiment.make("digits", "svae", **small, components=2), "cpu", tmp_path)
    assert record["status"] == "done" and {"l2", "score"} <= set(record["metrics"])
    assert not {"elbo_grey", "rate", "iw_dynamic"} & set(record["metrics"])


def test_a_record_says_where_its_run_began(tmp_path, monkeypatch):
    small = dict(pair.split("=") for pair in SMALL if "=" in pair)
    made = Experiment.make("digits", "vae", **small, z_dim=3)
    first = experiment.run(made, "cpu", tmp_path)
    assert first["environment"]["commit"] == records.environment("cpu")["commit"]
    records.path(tmp_path, "digits", made.name).unlink()
    monkeypatch.setenv("PATH", "")  # no git any more
    assert records.environment("cpu")["commit"] == "unknown"
    again = experiment.run(made, "cpu", tmp_path)  # from its checkpoint: nothing is trained anew
    assert again["environment"] == first["environment"] and again["metrics"] == first["metrics"]


def pair_of_runs():
    small = {"updates": 4, "batch": 8, "hidden": 8, "log_every": 2, "score_samples": 40}
    return [Experiment.make("ring8", "vae", seed=seed, **small) for seed in (0, 1)]


@pytest.mark.parametrize("text", ["3-", "-3", "9-0", "x", "1-2-3", "9" * 20])
def test_seeds_are_a_number_or_a_range(text, capsys):
    assert cli.seeds("3") == [3] and cli.seeds("0-2") == [0, 1, 2]
    with pytest.raises(SystemExit):
        cli.main(["run", "digits", "vae", f"--seed={text}"])
    assert f"'{text}' is neither a seed like 3 nor a range like 0-9" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"components": 2}, {"spectral": True}])
def test_what_cannot_be_trained_together_runs_one_by_one(changes, monkeypatch):
    made = [Experiment.make("ring8", "mix-wgan", seed=seed, **changes) for seed in (0, 1)]
    monkeypatch.setattr(experiment, "run", lambda e, *_: e.name)
    assert experiment.run_all(made, "cpu") == [e.name for e in made]


def test_a_kill_between_two_evaluations_costs_no_training(tmp_path, monkeypatch):
    made, record, trained = pair_of_runs(), experiment._record, []

    def killed_at_the_second(e, *rest):
        if e == made[1]:
            raise KeyboardInterrupt
        return record(e, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "_record", killed_at_the_second)
        experiment.run_together(made, "cpu", tmp_path)
    monkeypatch.setattr(train.Trainer, "update", trained.append)
    assert [found["status"] for found in experiment.run_together(made, "cpu", tmp_path)] == ["done", "done"]
    assert not trained


def test_of_runs_trained_together_only_the_one_that_diverged_says_so(tmp_path, monkeypatch):
    made = [Experiment.make("ring8", "gan", seed=e.seed, updates=4, batch=8, hidden=8) for e in pair_of_runs()]
    evaluated = experiment.evaluated

    def second_is_lost(trainer, number):
        players = evaluated(trainer, number)
        for weights in players.parameters() if number else ():
            weights.data.fill_(math.nan)
        return players

    monkeypatch.setattr(experiment, "evaluated", second_is_lost)
    assert [found["status"] for found in experiment.run_together(made, "cpu", tmp_path)] == ["done", "diverged"]


def test_the_record_and_the_draws_of_each_run_trained_together_are_its_own(ring, tmp_path, monkeypatch):
    fit = train.Trainer.fit

    def half_a_minute(trainer, *options):
        fit(trainer, *options)
        trainer.seconds = 30.0

    monkeypatch.setattr(train.Trainer, "fit", half_a_minute)
    made = pair_of_runs()
    found = experiment.run_together(made, "cpu", tmp_path)
    trainer = experiment.prepare_together(made, ring, torch.device("cpu"))
    trainer.fit()
    for number, (e, record) in enumerate(zip(made, found, strict=True)):
        assert record == records.read(tmp_path, "ring8", e.name)
        assert record["experiment"] == e.flat() and (record["together"], record["seconds"]) == (2, 15.0)
        torch.manual_seed(e.seed)  # here, for taking a run out draws weights, which are then overwritten
        players = alone(trainer.evaluated_players(), number)
        own = evaluation.evaluate(players, ring, trainer.device, e.nets.z_dim, e.evaluation)
        assert record["metrics"] == own
        torch.manual_seed(0)
        with torch.no_grad():
            draws = players["decoder"](torch.randn(500, e.nets.z_dim)).rsample()
        assert np.array_equal(np.load(tmp_path / "ring8" / f"{e.name}.draws.npy"), draws)


def test_runs_trained_together_resume_together_and_a_lost_record_is_run_alone(tmp_path, monkeypatch):
    def interrupt(row):
        raise KeyboardInterrupt

    def measured(found):
        return [record["metrics"] for record in found]

    made = pair_of_runs()
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_together(made, "cpu", tmp_path, interrupt)
    assert train.read_checkpoint(experiment.checkpoint(made))["done"] == 1
    rows = []
    resumed = experiment.run_together(made, "cpu", tmp_path, rows.append)
    assert [row["update"] for row in rows] == [2, 4]
    experiment.checkpoint(made).unlink()
    whole = experiment.run_together(made, "cpu", tmp_path / "other")
    assert measured(resumed) == measured(whole)

    records.path(tmp_path, "ring8", made[0].name).unlink()
    again = experiment.run_together(made, "cpu", tmp_path)
    assert [record["name"] for record in again] == [e.name for e in made] and again[1] == resumed[1]
    lone = experiment.run(made[0], "cpu", tmp_path / "alone")
    assert "together" not in again[0] and again[0]["metrics"] == lone["metrics"] != resumed[0]["metrics"]


def test_a_diverged_run_leaves_an_honest_record(tmp_path, capsys):
    assert cli.main(["run", "digits", "svae", *SMALL, "--set", "lr=1e30", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["status"] == "diverged"
    assert "diverged at update" in capsys.readouterr().out


def test_a_measure_that_is_not_finite_is_named(tmp_path, monkeypatch):
    real = evaluation.evaluate

    def without_bound(*arguments):
        values = real(*arguments)
        return values | {"iw_dynamic": values["iw_dynamic"] | {"value": float("inf")}}

    monkeypatch.setattr(evaluation, "evaluate", without_bound)
    small = dict(pair.split("=") for pair in SMALL if "=" in pair)
    record = experiment.run(Experiment.make("digits", "vae", **small), "cpu", tmp_path)
    assert record["status"] == "diverged" and not record["metrics"]
    assert "diverged: iw_dynamic not finite" in record["reason"]


@pytest.mark.parametrize("content", [b"{", bytes([255, 254])])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "digits-vae-literal-quick-s0.json").write_bytes(content)
    with pytest.raises(UserError, match="is damaged; delete it"):
        experiment.run(Experiment.make("digits", "vae"), "cpu", tmp_path)


def fake(folder, method, seed, value, status="done", profile="cpu"):
    made = Experiment.make("mnist", method, profile, "literal", seed)
    metrics = {name: {"value": value, "se": 0.0, "n": 1} for name in records.COLUMNS}
    record = {"name": made.name, "experiment": made.flat(), "changes": {}, "status": status, "seconds": 60.0}
    records.write(folder, record | {"metrics": metrics if status == "done" else {}})


def test_table_is_made_from_records_alone(tmp_path):
    fake(tmp_path, "svae", 0, 100.0)
    fake(tmp_path, "svae", 1, 104.0)
    fake(tmp_path, "svae-r", 0, 1.0, "diverged")
    table = records.table("mnist", tmp_path).set_index("method")
    assert table.loc["sVAE", "ELBO, grey"] == "102.0 ± 2.8" and table.loc["sVAE", "seeds"] == 2
    assert table.loc["sVAE-r", "score"] == "diverged"
    fake(tmp_path, "svae", 2, 1.0, profile="quick")
    runs = records.read_all("mnist", tmp_path)
    assert records.values(runs, "svae", "literal", "score") == [100.0, 104.0]
    assert records.mean(runs, "svae", "literal", "score") == 102.0
    assert not records.values(runs, "svae", "literal", "score", profile="quick")  # a run for trying is in no table
    for nothing in (("svae-r", "literal"), ("svae", "stabilised")):  # diverged, not run
        assert math.isnan(records.mean(runs, *nothing, "score"))
    assert not records.values(runs, "svae", "literal", "score", profile="paper")
    assert not records.values(runs, "svae", "literal", "score", updates=5_000)
    runs[0]["metrics"].pop("score")
    records.write(tmp_path, runs[0])
    table = records.table("mnist", tmp_path).set_index("method")
    assert table.loc["sVAE", "score"] == "104.00 (1 of 2)"
    assert table.loc["GAN", "ours"].startswith("not run: ")
    for path in (tmp_path / "mnist").glob("mnist-svae-literal*"):
        path.unlink()
    table = records.table("mnist", tmp_path).set_index("method")
    assert table.loc["sVAE", "ours"].startswith("not run: svae run mnist svae")
    assert records.table("alice5", tmp_path)["ours"].tolist()[0] == "over many settings: svae sweep alice5 ali"


def test_methods_lists_every_method(capsys):
    assert cli.main(["methods"]) == 0
    listed = capsys.readouterr().out
    rows = [line.split() for line in listed.splitlines()[1:]]
    assert [row[0] for row in rows] == list(METHODS)
    assert all(" ".join(row).endswith(METHODS[row[0]].summary) for row in rows)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_seen_enough_is_no_error(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "svae_lib", "methods"]
    ended = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_data_says_where(capsys):
    assert cli.main(["data", "digits"]) == 0
    assert "1197 train" in capsys.readouterr().out
