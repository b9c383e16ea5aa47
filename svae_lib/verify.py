r"""The claims ledger: for each numbered equation its place in the book, its function and its proofs.

Nothing is typed twice. Where an equation stands and what it is called is read from the chapters
(`**S14** (what the players maximise)` and the label), its function from the docstring that begins with
`S14:`, its proofs from tests called `test_S14_...`; `svae verify` runs these and notes what they observed.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from svae_lib.errors import UserError
from svae_lib.files import whole
from svae_lib.notebooks import ROOT, need

EQUATIONS = (*(f"S{n}" for n in range(1, 30)), *(f"A{n}" for n in range(1, 23)))
NUMBER = r"[SA]\d+"
CITED = re.compile(rf"({NUMBER}(?:, {NUMBER})*)(?: \(.*?\))?:")  # how the docstring of an equation's function begins
NAMED = re.compile(rf"((?:\*\*{NUMBER}\*\*(?:, and |, | and )?)+)\s+\(([^()]+)\)")  # how a chapter introduces equations
LABEL = re.compile(rf"^\$\$ *\(({NUMBER})\)", re.M)
KINDS = {"proved": "proved", "exact": "exact to {:.0e}", "Monte Carlo": "{:.1f} s.e.", "empirical": "within {:.0e}"}


@dataclass
class Proof:
    r"""One test of `tests/equations`: the worst error observed for each kind of statement it makes."""

    file: str
    name: str
    outcome: str = "passed"
    seconds: float = 0.0
    observed: dict[str, float] = field(default_factory=dict)

    @property
    def equations(self) -> list[str]:
        r"""`test_S16_S17_...` -> S16, S17."""
        registered = re.match(rf"test((?:_{NUMBER})+)_", self.name)
        return re.findall(NUMBER, registered[1]) if registered else []

    @property
    def title(self) -> str:
        r"""`test_S16_S17_threshold_zero` -> "threshold zero"."""
        return re.sub(rf"^test(_{NUMBER})*_", "", self.name).replace("_", " ")

    @property
    def anchor(self) -> str:
        r"""Where the proof is on the page of proofs."""
        return self.name.lower().replace("_", "-")


@dataclass
class Claim:
    r"""One row of the ledger."""

    equation: str
    name: str  # in words, from the chapter
    chapter: str
    functions: list[str]
    proofs: list[Proof]

    @property
    def status(self) -> str:
        r"""`holds`, `erratum` (the printed form fails, the corrected one holds), `FAILED` or `no proof`."""
        if not self.proofs:
            return "no proof"
        if any(proof.outcome != "passed" for proof in self.proofs):
            return "FAILED"
        return "erratum" if any("_erratum_" in proof.name for proof in self.proofs) else "holds"

    @property
    def evidence(self) -> str:
        r"""What the proofs state and how well it was met, the strongest kind first."""
        worst = {
            kind: max(proof.observed[kind] for proof in self.proofs if kind in proof.observed)
            for kind in KINDS
            if any(kind in proof.observed for proof in self.proofs)
        }
        return ", ".join(KINDS[kind].format(max(error, 1e-16)) for kind, error in worst.items())

    @property
    def seconds(self) -> float:
        return sum(proof.seconds for proof in self.proofs)


def statements(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    r"""Equation -> (chapter that derives it, its name there). Raises UserError if it is labelled without a name."""
    found = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        names = {number: name for group, name in NAMED.findall(text) for number in re.findall(NUMBER, group)}
        for number in LABEL.findall(text):
            if number not in names:
                raise UserError(f"chapter {path.stem} labels {number} but does not introduce it as **{number}** (name)")
            found[number] = path.stem, " ".join(names[number].split())
    return found


def documented(package: Path) -> Iterator[tuple[str, str]]:
    r"""The dotted name and the docstring of every public function, method and class."""
    for path in sorted(package.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        inside = [(f"{c.name}.", c.body) for c in module.body if isinstance(c, ast.ClassDef)]
        for prefix, body in [("", module.body), *inside]:
            for node in body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    yield f"svae_lib.{path.stem}.{prefix}{node.name}", ast.get_docstring(node) or ""


def functions() -> dict[str, list[str]]:
    r"""Equation -> the library's functions whose docstrings begin with its number."""
    found: dict[str, list[str]] = {}
    for name, text in documented(Path(__file__).parent):
        if cited := CITED.match(text):
            for number in re.findall(NUMBER, cited[1]):
                found.setdefault(number, []).append(name)
    return found


class Observer:
    r"""A pytest plugin that collects outcome, time and observations of every proof; its variants count as one."""

    def __init__(self) -> None:
        self.proofs: dict[str, Proof] = {}

    def pytest_runtest_logreport(self, report) -> None:
        file, _, test = report.nodeid.partition("::")
        name = test.partition("[")[0]
        proof = self.proofs.setdefault(name, Proof(Path(file).name, name))
        proof.seconds += report.duration
        if report.outcome != "passed":
            proof.outcome = report.outcome
        for kind, error in dict(report.user_properties).get("observed", {}).items():
            worse = math.isnan(error) or error > proof.observed.get(kind, -1.0)
            proof.observed[kind] = error if worse else proof.observed[kind]


def run_proofs(root: Path = ROOT) -> list[Proof]:
    r"""Run `tests/equations` and return the proofs that belong to an equation.

    Raises UserError if pytest is missing, could not collect the tests, or if one that belongs to no equation did not
    pass: it has no row in the ledger to be seen in, and the others may rest on it.
    """
    need("pytest", "dev")
    import pytest

    folder, observer = root / "tests" / "equations", Observer()
    if not folder.is_dir():
        raise UserError(f"there is no {folder}; svae verify runs in a clone installed with pip install -e '.[dev]'")
    options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(root)]
    code = pytest.main([str(folder), *options], plugins=[observer])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UserError(f"the tests in {folder} could not be run; pytest says why above")
    proofs = list(observer.proofs.values())
    if lost := [proof.name for proof in proofs if proof.outcome != "passed" and not proof.equations]:
        raise UserError(f"tests that the proofs rest on did not pass: {', '.join(lost)}; pytest says why above")
    return [proof for proof in proofs if proof.equations]


def write(proofs: list[Proof], folder: Path) -> Path:
    r"""Keep what the proofs observed, for the book's ledger page."""
    from svae_lib.records import environment

    rows = [asdict(proof) | {"seconds": round(proof.seconds, 2)} for proof in proofs]
    path = folder / "claims.json"
    with whole(path) as new:
        text = json.dumps({"environment": environment("CPU"), "proofs": rows}, indent=1)
        new.write_text(text + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> list[Proof]:
    r"""The stored proofs. Raises UserError if there are none."""
    try:
        return [Proof(**row) for row in json.loads((folder / "claims.json").read_text(encoding="utf-8"))["proofs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'claims.json'} is missing or damaged; write it with svae verify --store") from None


def ledger(proofs: list[Proof], root: Path = ROOT) -> list[Claim]:
    r"""All 51 rows, in the papers' order."""
    places, code = statements(root), functions()
    rows = []
    for number in EQUATIONS:
        chapter, name = places.get(number, ("", ""))
        own = [proof for proof in proofs if number in proof.equations]
        rows.append(Claim(number, name, chapter, code.get(number, []), own))
    return rows


def table(claims: list[Claim]) -> str:
    r"""The ledger as plain text."""
    lines = [f"{'':<5}{'status':<10}{'evidence':<40}{'proofs':>6}{'seconds':>9}  function"]
    for claim in claims:
        names = ", ".join(name.removeprefix("svae_lib.") for name in claim.functions)
        facts = f"{claim.equation:<5}{claim.status:<10}{claim.evidence:<40}{len(claim.proofs):>6}{claim.seconds:>9.1f}"
        lines.append(f"{facts}  {names}".rstrip())
    held = sum(claim.status in ("holds", "erratum") for claim in claims)
    return "\n".join([*lines, f"{held} of {len(claims)} equations verified"])
