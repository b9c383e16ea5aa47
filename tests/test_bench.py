"""`svae bench` on tiny images: rows are finite and named, rivals do the engine's work, missing packages say so."""

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_worker import doubles
from torch.testing import assert_close

from svae_lib import bench, cli, costs, rivals, scaling, timing
from svae_lib.device import describe, knows_bf16
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.timing import Effort

ROOT = Path(__file__).parent.parent
TINY = Effort("tiny", 2, 0.0, 128, False)
CPU = torch.device("cpu")
BENCH = bench.Bench(CPU, TINY, costs.Machine("toy", 1e10, 1e11, 1e9, 1e-6))


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    for name, (colours, _, _) in costs.SHAPES.items():
        monkeypatch.setitem(costs.SHAPES, name, (colours, 8, 8))


def weights_of(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.players.parameters()])


# Timing --------------------------------------------------------------------------------------------


def test_functions_take_turns_and_the_order_is_reversed():
    seen = []
    functions = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = timing.in_turns(functions, CPU, Effort("", 3, 0.0, 0, False))
    assert "".join(seen[-6:]) == "abbaab"
    assert all(seconds.shape == (3,) and (seconds > 0).all() for seconds in times.values())


def test_what_times_itself_is_believed():
    times = timing.in_turns({"own": lambda: timing.Seconds(2.5), "loss": lambda: 2.5}, CPU, TINY)
    assert times["own"].tolist() == [2.5, 2.5]
    assert times["loss"].max() < 1  # a number that is no time


def test_a_row_holds_median_and_quartiles():
    found = timing.row("x", np.array([1.0, 2.0, 3.0, 4.0, 100.0]), aim="≤ 3", engine=np.float64(2))
    assert (found["low"], found["value"], found["high"], found["turns"]) == (2, 3, 4, 5)
    assert json.loads(json.dumps(found)) == found
    assert bench.line(found).split() == ["x", "3", "(2", "to", "4)", "×", "≤", "3"]


def test_ceilings_are_rates_of_this_machine():
    machine = timing.ceilings(CPU, TINY)
    assert machine.name == describe(CPU) and (machine.bf16 is not None) == knows_bf16(CPU)
    assert 1e8 < machine.fp32 < 1e15 and 1e8 < machine.bandwidth < 1e13 and 1e-9 < machine.overhead < 1e-2


# Rivals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vae", "svae-r"])
def test_the_loop_by_hand_trains_as_the_engine_does(method, monkeypatch):
    """To the same weights but for rounding, from the same random numbers, where dropout is off."""
    batch = rivals._batch
    if method == "vae":  # before its noise the engine draws prior codes, which this method does not use
        monkeypatch.setattr(rivals, "_batch", lambda t: (batch(t)[0], torch.randn(t.training.batch, t.model.z_dim)))
    plain = {"critic_dropout": 0.0, "norm": "none", "critic_norm": "none"}
    made = Experiment.make("mnist", method, lr=1e-3, critic_lr=2e-3, **plain)
    ended = []
    with doubles():
        for by_hand in (False, True):
            torch.manual_seed(0)
            trainer = bench.engine(BENCH, made, 16)
            begun = weights_of(trainer)
            step = rivals.by_hand(trainer) if by_hand else trainer.update
            torch.manual_seed(1)
            for _ in range(10):
                step()
            ended.append(weights_of(trainer))
    assert_close(*ended, rtol=0, atol=1e-9)
    assert (ended[0] - begun).abs().mean() > 1e-3, "they moved"


@pytest.mark.parametrize("method", ["vae", "svae-r"])
def test_the_layers_alone_do_all_the_arithmetic_and_change_no_weight(method):
    trainer = bench.engine(BENCH, Experiment.make("mnist", method, batch=8), 16)
    by_hand = rivals.by_hand(trainer)
    whole = costs.count(by_hand)
    replay = rivals.layers_alone(by_hand, CPU)
    weights = weights_of(trainer)
    alone = costs.count(replay)
    assert sum(op.flops for op in alone) == sum(op.flops for op in whole) > 0
    assert len(alone) < 0.6 * len(whole)
    assert torch.equal(weights, weights_of(trainer))


@pytest.mark.parametrize("rival", ["pythae", "lightning"])
def test_the_trainers_of_others_see_every_image_and_train_our_nets(rival):
    if find_spec(rival) is None:
        pytest.skip(f"{rival} is not installed: pip install {rival}")
    make = {"pythae": rivals.pythae_epoch, "lightning": rivals.lightning_epoch}[rival]
    trainer = bench.engine(BENCH, Experiment.make("mnist", "vae"), 16)
    seen = []
    trainer.model.encoder.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    before = weights_of(trainer)
    epoch = make(trainer.model, torch.rand(24, 1, 8, 8), 8, CPU)
    seen.clear()
    seconds = epoch()
    assert seen == [8, 8, 8]
    assert rival == "pythae" or seconds > 0
    assert not torch.equal(before, weights_of(trainer))


@pytest.mark.parametrize("name, module", [("pythae", "pythae.models"), ("Lightning", "lightning")])
def test_a_missing_package_is_a_row_that_says_how_to_get_it(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(bench, "in_turns", lambda functions, *_: {key: np.ones(2) for key in functions})
    rows = [row for row in bench.trainers(BENCH) if f"÷ {name}'s" in row["name"]]
    precisions = 2 if knows_bf16(CPU) else 1
    assert [row["reason"] for row in rows] == [f"not run: pip install {name.lower()}"] * precisions
    assert "pip install" in bench.line(rows[0])


def test_torchvision_loads_the_same_bytes():
    images, seen = torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8), []
    epoch = rivals.torchvision_batches(images, torch.arange(10), 4)
    loader = epoch.__closure__[0].cell_contents
    for x, _ in loader:
        seen.append(x)
    rows = torch.cat(seen).flatten(1)
    assert torch.equal(rows.sort(0).values, (images.float() / 255).flatten(1).sort(0).values)


# Processes -----------------------------------------------------------------------------------------


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")
def test_two_processes_are_timed_against_one():
    (found,) = scaling.rows(CPU, TINY)
    assert found["name"] == "processes: 2 ÷ 1" and found["turns"] == TINY.turns
    assert 0 < found["low"] <= found["value"] <= found["high"] < math.inf
    assert set(found["measured"]) == {"1", "2"} and min(found["measured"].values()) > 0


def test_processes_that_fail_or_lack_a_core_are_a_row_that_says_why(monkeypatch):
    launch = scaling.launch
    monkeypatch.setattr(scaling, "launch", lambda processes, _, effort: launch(processes, "abacus", effort))
    for cores, reason in ((2, "failed with UserError: device 'abacus' is not available"), (1, "a core or a graphics")):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        (found,) = scaling.rows(CPU, TINY)
        assert found["name"] == "processes: 2 ÷ 1" and reason in found["reason"]


def test_launches_alternate_up_to_the_number_of_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    started = []
    monkeypatch.setattr(scaling, "launch", lambda processes, *_: started.append(processes) or [1 / processes])
    found = [*scaling.rows(torch.device("cuda"), timing.FULL)]
    assert started == [1, 2, 2, 1, 1, 4, 4, 1]
    assert [(row["name"], row["value"], row["turns"]) for row in found] == [
        ("processes: 2 ÷ 1", 0.5, 2), ("processes: 4 ÷ 1", 0.25, 2),
    ]  # fmt: skip


# All of it -----------------------------------------------------------------------------------------


def test_all_rows_are_measured_recorded_and_shown_on_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "QUICK", TINY)
    cases = [Experiment.make("mnist", "vae", batch=8), Experiment.make("mnist", "svae-r", batch=8, precision="bf16")]
    monkeypatch.setattr(bench, "cases", lambda device: cases)
    monkeypatch.setattr(costs, "FAMILIES", ("a1",))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # threads on a busy machine wait for each other
    assert cli.main(["bench", "--quick", "--device", "cpu", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem == record["name"] and record["name"].startswith("bench-")
    measured = [row for row in record["rows"] if "reason" not in row]
    assert all(math.isfinite(row["value"]) and row["low"] <= row["value"] <= row["high"] for row in measured)
    names = [row["name"] for row in record["rows"]]
    assert len(names) == len(set(names))
    for wanted in ("÷ by hand", "÷ its layers", "FLOP/s ÷ ceiling", "pythae's", "Lightning's", "loader", "sample a1",
                   "images: 10,000", "batch: 256", "hidden units", "channels", "trained together",
                   "processes: 2"):  # fmt: skip
        assert any(wanted in name for name in names), wanted
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_only_one_group_is_run_and_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setitem(bench.GROUPS, "loader", lambda _: iter([timing.missing("x", "y")]))
    monkeypatch.setattr(bench, "ceilings", lambda *_: BENCH.machine)
    monkeypatch.setattr(bench.records, "results_folder", lambda chosen=None: tmp_path)
    assert cli.main(["bench", "--only", "loader", "--device", "cpu"]) == 0
    assert not [*tmp_path.iterdir()]
    assert [row["name"] for row in bench.run("cpu", TINY, "loader", lambda _: None)["rows"]] == ["x"]
    with pytest.raises(UserError, match="choose one of: step, trainers"):
        bench.run("cpu", TINY, "nothing")


def test_names_of_machines_become_names_of_files():
    assert timing.slug("NVIDIA H200") == "nvidia-h200"
    assert timing.slug("Some(R) CPU, 2 cores, 1 threads") == "some-r-cpu-2-cores-1-threads"
    assert str(torch.get_num_threads()) in timing.machine_name(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_and_ceilings_are_timed_on_cuda():
    device = torch.device("cuda")
    there = bench.Bench(device, TINY, BENCH.machine)
    step = rivals.by_hand(bench.engine(there, Experiment.make("mnist", "svae-r", batch=8)))
    layers = rivals.layers_alone(step, device)
    times = timing.in_turns({"layers": layers, "by hand": step}, device, TINY)
    assert layers.captured and (times["layers"] > 0).all()
    machine = timing.ceilings(device, TINY)
    assert machine.bf16 > machine.fp32 > 1e12 and machine.bandwidth > 1e11 and machine.overhead < 1e-4
