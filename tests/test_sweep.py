"""The sweep: every setting once, in order, resumable, summed up honestly."""

import math

import pytest
import torch

from svae_lib import cli, data, evaluation, experiment, records, sweep
from svae_lib.ensembles import alone
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sweep, "GRID", sweep.GRID | {"hidden": (8,), "depth": (2,), "critic_steps": (1,)})
    monkeypatch.setattr(sweep, "BUDGET", {"updates": 2, "batch": 8, "log_every": 2})


def test_the_grid_has_every_setting_once():
    rows = [setting for together in sweep.settings() for setting in together]
    assert len(rows) == 256 and len({tuple(row.items()) for row in rows}) == 256
    assert all(row["critic_hidden"] == row["hidden"] for row in rows)


def test_each_row_holds_the_numbers_of_its_own_setting(small):
    chosen, alice5, device = next(sweep.settings()), data.load("alice5"), torch.device("cpu")
    rows = sweep._train("alice5", "ali", chosen, device)
    made = [Experiment.make("alice5", "ali", **sweep.BUDGET, **setting) for setting in chosen]
    trainer = experiment.prepare_together(made, alice5, device)
    trainer.fit()
    for number, (row, one) in enumerate(zip(rows, made, strict=True)):
        torch.manual_seed(0)  # here, for taking a run out draws weights, which are then overwritten
        players = alone(trainer.evaluated_players(), number)
        own = evaluation.evaluate(players, alice5, device, one.nets.z_dim, one.evaluation)
        assert row["set"] == chosen[number]
        assert {key: row[key] for key in own} == {key: metric["value"] for key, metric in own.items()}
    slow, fast = (next(row for row in rows if row["set"]["lr"] == lr) for lr in (1e-4, 3e-3))
    assert slow["mse"] != fast["mse"]  # one seed and the same draws: only the step size differs


def test_an_interrupted_sweep_goes_on(small, tmp_path, monkeypatch):
    train, calls = sweep._train, []

    def stop_at_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(sweep, "_train", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep("alice5", "ali", tmp_path)
    first = records.read_report("sweep-alice5-ali", tmp_path)["rows"]
    assert len(first) == 16
    record = sweep.sweep("alice5", "ali", tmp_path)
    assert record["rows"][:16] == first and len(record["rows"]) == 32 and len(calls) == 3
    assert {row["set"]["beta1"] for row in record["rows"]} == {0.5, 0.9}


def test_a_sweep_of_another_budget_is_not_continued(small, tmp_path):
    other = {"name": "sweep-alice5-ali", "budget": {"updates": 3}, "rows": []}
    records.write_report(tmp_path, other)
    with pytest.raises(UserError, match="sweep-alice5-ali was made with another budget; delete its file in"):
        sweep.sweep("alice5", "ali", tmp_path)


def test_a_run_that_failed_counts_as_failed():
    values = ((5.0, 0.1, 5, 0.6), (1.2, 3.0, 1, 0.9), (math.nan, math.nan, 0, math.nan), (3.0, 0.2, 5, 0.1))
    rows = [dict(zip(("score", "mse", "modes", "high_quality"), value, strict=True)) for value in values]
    record = {"dataset": "alice5", "rows": [row | {"set": {"number": k}} for k, row in enumerate(rows)]}
    shown = sweep.summary(record)
    assert shown["works"] == 0.25  # the first: the second misses modes, the last draws between them
    assert shown["failed"] == 0.5 and shown["score"] == pytest.approx((5 + 1.2 + 1 + 3) / 4)
    assert shown["mse"] == pytest.approx(1.1) and shown["settings"] == 4
    part = sweep.summary(record, lambda setting: setting["number"] < 2)
    assert part["settings"] == 2 and part["score"] == pytest.approx(3.1)


@pytest.mark.parametrize("method", ["vae", "gan"])
def test_the_command_prints_the_summary(small, tmp_path, capsys, method):
    assert cli.main(["sweep", "alice5", method, "--results", str(tmp_path)]) == 0
    assert "32 of 32" in (shown := capsys.readouterr().out) and "failed" in shown
    assert ("mse" in shown) == (method == "vae")  # a GAN reconstructs nothing
