"""The claims ledger: what is read from names, docstrings and chapters, and that a failure cannot hide."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from svae_lib import commands, verify
from svae_lib.errors import UserError
from svae_lib.verify import Claim, Proof

EQUATIONS = Path(__file__).parent / "equations"


@pytest.mark.parametrize(
    ("name", "equations", "title"),
    [
        ("test_S14_value", ["S14"], "value"),
        ("test_S16_S17_bayes_error", ["S16", "S17"], "bayes error"),
        ("test_A7_erratum_of_S14", ["A7"], "erratum of S14"),
        ("test_conditional_is_bayes_rule", [], "conditional is bayes rule"),
    ],
)
def test_the_name_of_a_test_is_its_registration(name, equations, title):
    proof = Proof("test_toy.py", name)
    assert (proof.equations, proof.title) == (equations, title)


def test_status_of_a_claim():
    def status(*proofs):
        return Claim("S1", "", "", [], list(proofs)).status

    good, bad = Proof("f", "test_S1_a"), Proof("f", "test_S1_b", outcome="failed")
    assert status() == "no proof"
    assert status(good) == "holds"
    assert status(good, Proof("f", "test_S1_erratum_a")) == "erratum"
    assert status(good, bad, Proof("f", "test_S1_erratum_a")) == "FAILED"
    assert status(Proof("f", "test_S1_c", outcome="skipped")) == "FAILED"


def test_evidence_is_the_worst_of_each_kind_the_strongest_first():
    a = Proof("f", "a", observed={"Monte Carlo": 1.2, "exact": 3e-15})
    b = Proof("f", "b", observed={"exact": 2e-12})
    assert Claim("S1", "", "", [], [a, b]).evidence == "exact to 2e-12, 1.2 s.e."


def test_functions_are_found_by_the_number_in_their_docstring():
    found = verify.functions()
    assert "svae_lib.objectives.symmetric" in found["S14"] and "svae_lib.objectives.symmetric" in found["S23"]
    assert "svae_lib.exact.World.L_x" in found["S26"]


def chapter(folder, text):
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), folder / "01_toy.ipynb")


def test_a_chapter_names_what_it_labels(tmp_path):
    text = "**S16** and **S17** (the test,\nLRT),\n\n$$\nx\n$$ (S16)\n\n$$\ny\n$$ (S17)\n\n$$\nz\n$$ (toy-z)\n"
    chapter(tmp_path / "notebooks", text)
    assert verify.statements(tmp_path) == {"S16": ("01_toy", "the test, LRT"), "S17": ("01_toy", "the test, LRT")}
    chapter(tmp_path / "notebooks", "$$\nx\n$$ (S3)\n")
    with pytest.raises(UserError, match="labels S3 but does not introduce it"):
        verify.statements(tmp_path)


def run_toy(root, tests):
    """Run tests as `svae verify` runs the proofs, in a process of their own, and store the outcome."""
    folder = root / "tests" / "equations"
    folder.mkdir(parents=True)
    for name in ("conftest.py", "proof.py"):
        shutil.copy2(EQUATIONS / name, folder)
    (folder / "test_toy.py").write_text(tests)
    program = "import sys, pathlib\nfrom svae_lib import verify\nroot = pathlib.Path(sys.argv[1])\n"
    program += "verify.write(verify.run_proofs(root), root)\n"
    return subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True)


def test_a_run_of_proofs_sees_errors_and_failures(tmp_path):
    run_toy(
        tmp_path,
        "import pytest, torch\n"
        "from proof import same\n"
        "one = torch.ones(1).double()\n"
        "@pytest.mark.parametrize('error', [1e-12, 1e-10, 0.0])\n"
        "def test_S1_holds(error): same(one + 2 * error, one)\n"
        "@pytest.mark.parametrize('error', [0.0, 1.0, 0.0])\n"
        "def test_S2_fails(error): same(one + error, one)\n"
        "def test_S3_says_nothing(): assert one > 0\n"
        "def test_of_nothing(): pass\n",
    )
    holds, fails, silent = verify.read(tmp_path)
    assert (holds.name, holds.outcome) == ("test_S1_holds", "passed")
    assert (fails.name, fails.outcome) == ("test_S2_fails", "failed")
    assert (silent.name, silent.outcome) == ("test_S3_says_nothing", "failed")
    assert holds.observed["exact"] == pytest.approx(1e-10, rel=1e-3) and fails.observed["exact"] == pytest.approx(0.5)


def test_a_failure_that_belongs_to_no_equation_is_one_sentence(monkeypatch):
    def main(_, plugins):
        for name, outcome in (("test_S1_holds", "passed"), ("test_of_nothing", "failed")):
            seen = {"nodeid": f"test_toy.py::{name}", "duration": 0.1, "outcome": outcome, "user_properties": []}
            plugins[0].pytest_runtest_logreport(SimpleNamespace(**seen))
        return pytest.ExitCode.TESTS_FAILED

    monkeypatch.setattr(pytest, "main", main)
    with pytest.raises(UserError, match="^tests that the proofs rest on did not pass: test_of_nothing; pytest says"):
        verify.run_proofs()


def test_one_failed_proof_is_named_below_the_table(monkeypatch, capsys):
    proofs = [Proof("f", f"test_{number}_holds", observed={"exact": 3e-15}) for number in verify.EQUATIONS]
    proofs.append(Proof("f", "test_S3_fails", outcome="failed"))
    monkeypatch.setattr(verify, "run_proofs", lambda: proofs)
    with pytest.raises(UserError, match="^not verified: S3; the messages above say why$"):
        commands.verify_command(argparse.Namespace(store=True))  # raised before anything is stored
    _, *rows, held = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[:3]] == [["S1", "holds"], ["S2", "holds"], ["S3", "FAILED"]]
    assert held == "50 of 51 equations verified"
    assert "exact to 3e-15" in rows[13] and "objectives.symmetric" in rows[13]


def test_no_tests_and_no_ledger_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="svae verify runs in a clone"):
        verify.run_proofs(tmp_path)
    with pytest.raises(UserError, match="svae verify --store"):
        verify.read(tmp_path)
    (tmp_path / "claims.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        verify.read(tmp_path)
