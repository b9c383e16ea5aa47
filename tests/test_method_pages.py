"""The pages of methods: every row of the registry has its section, and what a section prints is true."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent

import method_pages  # noqa: E402

from svae_lib import cli, commands, experiment, gans, methods, objectives, records  # noqa: E402
from svae_lib.experiment import Experiment  # noqa: E402
from svae_lib.verify import NUMBER  # noqa: E402

ROWS = {method.name: method for method in (*methods.ROWS, *gans.ROWS)}
INDEX = (ROOT / "book" / "methods" / "index.md").read_text(encoding="utf-8")
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "book" / "methods").glob("*.md"))
SECTIONS = re.findall(r"^:::\{method-section\} (\S+)\n(.*?)^:::$", PAGES, re.M | re.S)


def keys_of(title):
    """The keys that the first column of a table of the index lists."""
    table = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", INDEX, re.M | re.S)[1]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_every_method_has_one_section():
    names = [name for name, _ in SECTIONS]
    assert len(names) == len(set(names)) and set(names) == set(ROWS)


@pytest.mark.parametrize("name, prose", SECTIONS, ids=[name for name, _ in SECTIONS])
def test_a_section_has_details_and_failures_and_its_citations_exist(name, prose):
    details = [int(number) for number in re.findall(r"^(\d+)\. ", prose, re.M)]
    assert details and details == list(range(1, len(details) + 1))
    assert prose.count("\n**Fails**") == 1
    known = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.M))
    cited = {key for keys in re.findall(r"\{cite:[pt]\}`([^`]+)`", prose) for key in keys.split(",")}
    assert cited <= known


@pytest.mark.parametrize("name", ROWS)
def test_the_lines_that_are_shown_are_those_of_the_stated_equations(name):
    method = ROWS[name]
    shown = method_pages.code(method)
    ast.parse(shown)
    stated = set(re.findall(NUMBER, f"{method.critic_equation} {method.player_equation}"))
    shared = method_pages.source(objectives.critic_lrt)
    assert stated <= set(re.findall(NUMBER, shown + shared))


def test_what_factories_made_is_written_out():
    shown = method_pages.code(ROWS["mmd-gan"])
    assert "critic = of_x(of_features(mmd))\nplayer = lowered(of_x(of_features(mmd)))" in shown
    assert "def mmd(" in shown and "def mmd2(" in shown and "def of_x(" not in shown
    assert method_pages.code(ROWS["svae"]).startswith("critic = lrt\n\ndef svae(")


def test_defaults_are_named_with_what_differs_on_points():
    assert method_pages.facts(ROWS["eb-gan"])["defaults"] == "`weight = 10.0`, `beta1 = 0.5`; on points `weight = 0.3`"
    assert method_pages.facts(ROWS["avb"])["encoder"] == "draws without a density"
    assert "defaults" not in method_pages.facts(ROWS["svae"])


def commanded(line):
    """The experiments that a printed command would run."""
    assert line.startswith("svae ")
    args = cli.parser().parse_args(line.split()[1:])
    changes = dict(commands.pair_of(text) for text in args.set)
    return [Experiment.make(args.dataset, args.method, args.profile, args.setting, s, **changes) for s in args.seed]


@pytest.fixture(scope="module")
def kept():
    """Each data set of the pages and its records, read once."""
    found = {dataset: records.read_all(dataset) for dataset in method_pages.DATASETS}
    assert all(found.values()), "there is something to repeat"
    return found


def lines_of(rows):
    return [line for cell in (rows["command"] if len(rows) else ()) for line in cell.splitlines()]


@pytest.mark.parametrize("name", ROWS)
def test_the_printed_commands_repeat_the_records(name, kept, monkeypatch):
    monkeypatch.setattr(records, "read_all", lambda dataset, folder: kept[dataset])
    wanted, found = set(), set()
    for dataset, runs in kept.items():
        wanted |= {record["name"] for record in runs if record["experiment"]["method"] == name}
        rows = method_pages.rows_of(name, dataset)
        found |= {e.name for line in lines_of(rows) for e in commanded(line)}
    assert found == wanted


def test_a_deleted_record_is_not_run(tmp_path):
    made = [Experiment.make("ring8", "svae", "cpu", seed=seed) for seed in (0, 1)]
    paths = []
    for e, modes in zip(made, (6.0, 8.0), strict=True):
        measured = {"modes": {"value": modes, "se": 0.0, "n": 1}}
        shared = {"status": "done", "seconds": 60.0, "changes": e.changes, "experiment": e.flat()}
        paths.append(records.write(tmp_path, {"name": e.name, "metrics": measured} | shared))
    row = method_pages.rows_of("svae", "ring8", tmp_path).iloc[0]
    assert (row["modes"], row["seeds"], row["command"]) == (
        "7.0 ± 1.4", 2, "svae run ring8 svae --profile cpu --seed 0-1",
    )  # fmt: skip
    paths[0].unlink()
    row = method_pages.rows_of("svae", "ring8", tmp_path).iloc[0]
    assert (row["modes"], row["command"]) == ("8.0", "svae run ring8 svae --profile cpu --seed 1")
    paths[1].unlink()
    assert method_pages.rows_of("svae", "ring8", tmp_path).empty


def test_a_diverged_run_is_said_to_be_one(tmp_path):
    for method, outcome in (("svae", {"status": "diverged", "reason": "", "metrics": {}}), ("ali", {"status": "done"})):
        e = Experiment.make("ring8", method, "cpu")
        shared = {"name": e.name, "seconds": 60.0, "changes": e.changes, "experiment": e.flat()}
        records.write(tmp_path, shared | {"metrics": {"modes": {"value": 8.0, "se": 0.0, "n": 1}}} | outcome)
    row = method_pages.rows_of("svae", "ring8", tmp_path).iloc[0]
    assert row["modes"] == row["high quality"] == "diverged" and "score" not in row


@pytest.mark.parametrize("name", ["svae", "as-vae", "gan", "vae", "avb"])
def test_all_that_is_logged_is_explained(ring, name):
    made = Experiment.make("ring8", name, hidden=8, critic_hidden=8, batch=8)
    trainer = experiment.prepare(made, ring, torch.device("cpu"))
    assert set(trainer.diagnose()) <= keys_of("What is logged")


def test_all_that_is_measured_is_explained():
    kept = {key for path in (ROOT / "results").glob("*/*.json") for key in json.loads(path.read_text())["metrics"]}
    shown = {key for dataset in ("mnist", "cifar10", "ring8") for key in records.columns(dataset)}
    assert kept | shown <= keys_of("What is measured")


def test_stabilisers_are_keys():
    assert set() != keys_of("Stabilisers") <= set(experiment.keys())
