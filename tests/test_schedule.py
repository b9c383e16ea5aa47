"""The grid of runs: its order, its budget, and what happens when a run is stopped or fails."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svae_lib import cli, commands, experiment, records, schedule, train
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.schedule import Block, Run

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-S", "-c"]


pytestmark = pytest.mark.usefixtures("own_cache")


def record(e, seconds=1.0):
    flat = {"experiment": e.flat(), "changes": e.changes, "metrics": {}, "environment": {"device": "cpu, 1 threads"}}
    return {"name": e.name, "status": "done", "seconds": seconds, "evaluation_seconds": 0.0} | flat


def runs_of(*pairs, seed=1):
    return [Run((Experiment.make(dataset, method, seed=seed),)) for dataset, method in pairs]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs that take no time: each leaves its records. Returns the list of those that were started."""
    names = []

    def command(run, folder, device):
        names.append(run.name)
        texts = {str(records.path(folder, e.dataset, e.name)): json.dumps(record(e)) for e in run.experiments}
        if run.experiments[0].method == "svae":
            return [*PYTHON, "print('some progress'); raise SystemExit('svae: the disk is full')"]
        script = f"import os\nfor path, text in {texts!r}.items():\n"
        return [*PYTHON, script + " os.makedirs(os.path.dirname(path), exist_ok=True); open(path, 'w').write(text)"]

    monkeypatch.setattr(schedule, "command", command)
    return names


def test_the_grid_begins_with_the_main_rows_and_repeats_nothing():
    runs = schedule.runs()
    names = [e.name for run in runs for e in run.experiments]
    assert len(names) == len(set(names))
    first = [run.experiments[0] for run in runs]
    main = [(e.dataset, e.method, e.setting, e.seed) for e in first[: 10 * 2 * 3]]
    assert main == [("mnist", m, s, i) for i in range(3) for s in ("stabilised", "literal") for m in schedule.MAIN]
    together = [run for run in runs if experiment.stackable(run.experiments[0])]
    assert {run.experiments[0].dataset for run in together} == {"ring8", "grid25"}
    assert {len(run.experiments) for run in together} == {10}


def test_the_command_of_every_run_makes_its_experiments():
    for run in schedule.runs():
        args = cli.parser().parse_args(run.arguments)
        changes = dict(map(commands.pair_of, args.set))
        make = Experiment.make
        again = [make(args.dataset, args.method, args.profile, args.setting, i, **changes) for i in args.seed]
        assert run.experiments == tuple(again), run.arguments


def test_one_dataset_can_be_chosen(monkeypatch):
    monkeypatch.setattr(schedule, "GRID", (Block(("mnist", "grid25"), ("vae",)), Block(("ring8",), ("vae",))))
    assert {run.experiments[0].dataset for run in schedule.runs(only="grid25")} == {"grid25"}
    with pytest.raises(UserError, match="no run of the grid is on 'imagenet64'; choose one of: mnist"):
        schedule.runs(only="imagenet64")


def test_runs_are_done_in_order_and_once_and_a_failure_stops_no_other(tmp_path, started):
    chosen = runs_of(("digits", "vae"), ("digits", "svae"), ("ring8", "ali"), ("ring8", "gan"))
    done = chosen[3].experiments[0]
    records.write(tmp_path, record(done))
    failed = schedule.work(chosen, tmp_path, say=lambda line: None)
    assert failed == {chosen[1]: "the disk is full"}
    assert started == [run.name for run in chosen[:3]]
    assert [schedule.state(run, tmp_path) for run in chosen] == ["done", "to do", "done", "done"]
    schedule.work(chosen, tmp_path, say=lambda line: None)
    assert started[3:] == [chosen[1].name]


def test_two_at_a_time_are_all_done(tmp_path, started):
    chosen = runs_of(("digits", "vae"), ("ring8", "vae"), ("ring8", "ali"))
    assert not schedule.work(chosen, tmp_path, jobs=2, say=lambda line: None)
    assert not any(run.missing(tmp_path) for run in chosen) and started == [run.name for run in chosen]


def test_the_prediction_is_the_pace_of_like_runs(tmp_path):
    made = Experiment.make
    for e, seconds in ((made("digits", "vae"), 100.0), (made("digits", "svae"), 300.0)):
        records.write(tmp_path, record(e, seconds) | {"evaluation_seconds": 50.0})
    chosen = [Run((made("digits", method, seed=3, updates=800),)) for method in ("vae", "ali", "wgan-gp", "pixelcnn")]
    known = schedule.history(chosen, tmp_path)
    costs = [schedule.predicted(run, known, tmp_path) for run in chosen]
    assert costs == [2 * 100.0 + 50.0, 2 * 200.0 + 50.0, None, None]
    ten = Run(tuple(made("digits", "vae", seed=seed) for seed in range(10)))
    assert schedule.predicted(ten, known, tmp_path) == 9 * (100.0 + 50.0)  # seed 0 is done
    assert not schedule.history(chosen, tmp_path, "cuda")


def test_nothing_is_started_that_would_not_end_in_time(tmp_path, started):
    slow, quick = Experiment.make("digits", "vae"), Experiment.make("ring8", "vae")
    records.write(tmp_path, record(slow, 3600.0))
    records.write(tmp_path, record(quick, 1.0))
    chosen = runs_of(("digits", "vae"), ("digits", "wgan-gp"), ("ring8", "vae"))
    schedule.work(chosen, tmp_path, minutes=30, say=lambda line: None)
    assert started == [chosen[2].name]  # what is unknown does not jump the queue
    schedule.work(chosen, tmp_path, minutes=90, say=lambda line: None)
    assert started[1:] == [chosen[0].name, chosen[1].name]


class Clock:
    """Time that passes only where the grid waits."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def endless(monkeypatch):
    """Runs that never end, on a clock of their own. Returns the list of their processes."""
    processes, popen = [], subprocess.Popen
    monkeypatch.setattr(schedule, "time", Clock())
    monkeypatch.setattr(schedule, "command", lambda *_: [*PYTHON, "import time; time.sleep(60)"])
    monkeypatch.setattr(schedule.subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    return processes


def test_what_still_runs_when_the_time_is_up_is_stopped(tmp_path, endless):
    (run,), said = runs_of(("ring8", "vae")), []
    assert schedule.work([run], tmp_path, minutes=5, say=said.append) == {}
    assert schedule.time.now == pytest.approx(300) and said[-1] == f"stopped {run.name}, to be resumed"
    assert [process.wait(5) < 0 for process in endless] == [True]


def test_runs_are_stopped_though_nobody_listens(tmp_path, endless):
    def say(text):
        if text.startswith("stopped"):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        schedule.work(runs_of(("ring8", "vae"), ("ring8", "svae")), tmp_path, minutes=5, jobs=2, say=say)
    assert [process.wait(5) < 0 for process in endless] == [True, True]


def test_a_killed_grid_takes_its_runs_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "GRID", (Block(("ring8",), ("vae",)),))
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    grid = f"""
import sys
from svae_lib import cli, schedule
schedule.GRID = (schedule.Block(("ring8",), ("vae",)),)
schedule.command = lambda *_: [sys.executable, "-S", "-c", {child!r}]
sys.exit(cli.main(["grid", "--profile", "quick", "--results", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", grid], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = schedule._log(schedule.runs("quick")[0])
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(10) == 130 and b"give the same command again" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_an_unreadable_checkpoint_stops_no_other_run(tmp_path):
    (run,) = runs_of(("ring8", "vae"))
    path = experiment.checkpoint(run.experiments)
    path.parent.mkdir(parents=True)
    path.write_text("not a checkpoint")
    assert schedule.predicted(run, [record(run.experiments[0], 5.0)], tmp_path) == 5.0


def test_a_killed_run_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "GRID", (Block(("ring8",), ("vae",), changes={"updates": 30, "log_every": 10}),))
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    (run,) = schedule.runs("quick")
    before = []

    def kill(row):
        before.append(row)
        if len(before) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(run.experiments[0], "cpu", tmp_path, kill)
    assert schedule.state(run, tmp_path) == "begun"
    known = [record(run.experiments[0], 30.0)]
    assert schedule.predicted(run, known, tmp_path) == 30 - 19  # the checkpoint of update 20 was not written any more

    command = ["grid", "--profile", "quick", "--device", "cpu", "--results", str(tmp_path)]
    assert cli.main([*command, "--dry-run"]) == 0 and run.missing(tmp_path)
    assert "begun" in capsys.readouterr().out
    assert cli.main(command) == 0 and not run.missing(tmp_path)
    written = records.read(tmp_path, "ring8", run.name)
    assert written["history"][0].items() <= before[0].items() and len(written["history"]) == 3
    assert "0 of 1 runs to go" in capsys.readouterr().out


def test_the_exit_code_says_that_something_failed(tmp_path, monkeypatch, started, capsys):
    monkeypatch.setattr(schedule, "GRID", (Block(("digits",), ("svae", "vae")),))
    assert cli.main(["grid", "--profile", "quick", "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "svae: 1 failed: digits-svae-literal-quick-s0: the disk is full\n"
    assert "1 of 2 runs to go" in captured.out


def test_a_record_of_other_defaults_is_shown_as_such(tmp_path):
    (run,) = runs_of(("ring8", "vae"))
    old = record(run.experiments[0])
    records.write(tmp_path, old | {"experiment": old["experiment"] | {"lr": 9.0}})
    assert "other defaults" in schedule.table([run], tmp_path)


@pytest.mark.parametrize("wrong", [["--budget-minutes", "0"], ["--jobs", "-1"], ["--jobs", "two"]])
def test_impossible_numbers_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        cli.main(["grid", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_snakemake_plans_what_has_no_record(tmp_path):
    for package in ("snakemake", "snakemake_executor_plugin_slurm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[grid]'")
    runs = schedule.runs("quick", "ring8")
    finished, partly, *rest = runs
    for e in (*finished.experiments, *partly.experiments[1:]):
        records.write(tmp_path, record(e))
    options = ["--snakefile", ROOT / "workflow/Snakefile", "--profile", ROOT / "workflow/profiles/slurm"]
    config = ["--config", "only=ring8", "profile=quick", "processes=4", f"results={tmp_path}"]
    show = ["--dry-run", "--printshellcmds"]
    command = [sys.executable, "-m", "snakemake", *show, *options, "--directory", tmp_path, *config]
    done = subprocess.run(command, capture_output=True, text=True)
    planned = done.stdout + done.stderr
    assert done.returncode == 0, planned
    rules = [line.split()[0] for line in planned.splitlines() if line.startswith("ring8-") and line.endswith(" 1")]
    assert set(rules) == {run.name for run in (partly, *rest)}
    outputs = [line for line in planned.splitlines() if "output:" in line]
    assert f"    output: {tmp_path}/ring8/{partly.experiments[0].name}.json" in outputs
    assert not any(run.name in line for run in (finished,) for line in outputs)
    commands = [line for line in planned.splitlines() if "OMP_NUM_THREADS=2 " in line]
    assert len(commands) == len(runs) - 1 and all("--nproc_per_node=4 -m svae_lib run ring8 " in c for c in commands)


@pytest.mark.parametrize(
    "cards, jobs, visible, chosen",
    [(0, 2, "", [None] * 3), (1, 1, "", [None] * 3), (2, 2, "", ["0", "1", "0"]), (2, 2, "5,7", ["5", "7", "5"])],
)
def test_runs_go_to_the_graphics_cards_in_turn(tmp_path, monkeypatch, cards, jobs, visible, chosen):
    monkeypatch.setattr(schedule, "GRID", (Block(("digits",), ("vae", "svae", "ali")),))
    monkeypatch.setattr(schedule.torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []

    class Ended:
        returncode = 0

        def __init__(self, *_, env, **__):
            started.append(env.get("CUDA_VISIBLE_DEVICES"))

        def poll(self):
            return 0

    monkeypatch.setattr(schedule.subprocess, "Popen", Ended)
    schedule.work(schedule.runs("quick"), tmp_path, jobs=jobs, say=lambda _: None)
    assert started == chosen
