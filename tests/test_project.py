"""The rules that hold the project's files together: one list of requirements, one list of macros, tidy chapters."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from svae_lib import __version__
from svae_lib.book import fingerprint

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in sum(EXTRAS.values(), PROJECT["dependencies"])]
REQUIREMENTS = [one for one in REQUIREMENTS if one.name != PROJECT["name"]]  # an extra may bring another
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w./])(/(home|Users|root|tmp|mnt|var|work|opt)/|[A-Z]:\\)")


def test_environment_installs_the_project_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip" and len(by_pip["pip"]) == 1
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert re.fullmatch(r"-e \.\[(.*)\]", by_pip["pip"][0])[1].split(",") == list(EXTRAS)


def test_the_packages_that_the_book_promises_are_declared():
    promised = {"torch", "torchvision", "jupyterlab", "jupyter-book", "matplotlib", "seaborn", "papermill", "nbval"}
    assert promised <= {requirement.name for requirement in REQUIREMENTS}


def test_constraints_pin_every_requirement_inside_its_range_and_name_no_host():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == __version__ == citation["version"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_contents_list_every_chapter():
    contents = (ROOT / "_toc.yml").read_text()
    assert re.findall(r"file: (notebooks/\w+)", contents) == [f"notebooks/{path.stem}" for path in CHAPTERS]


def test_api_page_lists_every_public_module():
    listed = re.findall(r"automodule:: svae_lib\.(\w+)", (ROOT / "book" / "api.md").read_text())
    modules = {path.stem for path in (ROOT / "svae_lib").glob("*.py") if not path.stem.startswith("_")}
    assert len(listed) == len(set(listed)) and set(listed) == modules


def images(cell):
    return [out for out in cell.get("outputs", []) if any(kind.startswith("image/") for kind in out.get("data", {}))]


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def notebook(request):
    found = nbformat.read(request.param, as_version=4)
    nbformat.validate(found)
    found.code = [cell for cell in found.cells if cell.cell_type == "code"]
    return found


def tags(cell):
    return cell.metadata.get("tags", [])


def test_chapter_begins_with_title_and_macros(notebook):
    title, macros = notebook.cells[:2]
    assert title.cell_type == macros.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert tags(macros) == ["remove-cell"]
    defined = dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*?)\}(?= \\newcommand|\$$)", macros.source))
    assert defined == CONFIG["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    assert re.fullmatch(r"\$.*\$", macros.source)


def test_chapter_is_short(notebook):
    assert len(notebook.code) <= 25
    assert max(len(cell.source.splitlines()) for cell in notebook.code) <= 40


def test_chapter_has_one_cell_of_documented_literal_parameters(notebook):
    (cell,) = [cell for cell in notebook.code if "parameters" in tags(cell)]
    for line, statement in zip(cell.source.splitlines(), ast.parse(cell.source).body, strict=True):
        assert isinstance(statement, ast.AnnAssign) and "  # " in line, line
        assert type(ast.literal_eval(statement.value)).__name__ == statement.annotation.id
    assert {"seed", "profile"} <= {statement.target.id for statement in ast.parse(cell.source).body}


def test_chapter_was_executed_in_order_without_errors(notebook):
    assert [cell.execution_count for cell in notebook.code] == list(range(1, len(notebook.code) + 1))
    assert not [out for cell in notebook.code for out in cell.outputs if out.output_type == "error"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_the_outputs_of_the_present_cells_library_and_records(path):
    stored = nbformat.read(path, as_version=4).metadata.get("fingerprint")
    assert stored == fingerprint(path), "run svae book"


def test_chapter_ends_with_its_conditions(notebook):
    assert notebook.code[-1].source.splitlines()[-1].startswith("footer(profile=profile, seed=seed")
    assert "nbval-ignore-output" in tags(notebook.code[-1])


def test_every_figure_has_name_caption_and_alt_text(notebook):
    figures = [cell for cell in notebook.code if images(cell)]
    assert len(figures) <= 8
    for cell in figures:
        described = cell.metadata["mystnb"]
        assert described["figure"]["name"].startswith("fig-"), cell.source
        assert described["figure"]["caption"] and described["image"]["alt"], cell.source
        assert len(images(cell)) == 1, "one figure to a cell, for the caption describes one"


def test_chapter_names_no_absolute_path(notebook):
    for cell in notebook.cells:
        printed = [
            out.get("text", "") + str(out.get("data", {}).get("text/plain", "")) for out in cell.get("outputs", [])
        ]
        for text in (cell.source, *printed):
            assert not ABSOLUTE_PATH.search(text), text


def test_every_label_is_in_one_place():
    labels = [
        label
        for path in CHAPTERS
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for label in re.findall(r"^\$\$ *\(([\w-]+)\) *$", cell.source, re.M)
    ]
    assert len(labels) == len(set(labels))


def test_the_register_of_ambiguities_states_the_defaults_that_are_used():
    from svae_lib.experiment import Experiment
    from svae_lib.settings import SETTINGS

    settings_of, *_ = (ROOT / "book" / "ambiguities.md").read_text().partition("## Evaluation")
    titles = r"^## (?:Stabilised|Points|Natural images .*|The authors' program|Beyond)$"
    texts = re.split(titles, settings_of, flags=re.M)
    literal = [Experiment.make(dataset, "svae", "paper", "literal").flat() for dataset in ("mnist", "cifar10")]
    stabilised = SETTINGS["images"]["stabilised"], SETTINGS["points"]["stabilised"]
    beyond = SETTINGS["natural"]["beyond"]
    expected = literal[0], *stabilised, literal[1], SETTINGS["natural"]["authors"], beyond
    for text, used in zip(texts, expected, strict=True):
        stated = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+) = ([^`]+)`", text)}
        assert stated and stated == {name: used[name] for name in stated}
        assert used in (*literal, beyond) or set(stated) == set(used)


def test_the_page_of_proofs_shows_every_proof():
    shown = re.findall(r"```\{proofs\} (\S+)", (ROOT / "book" / "proofs.md").read_text())
    files = {path.name for path in (ROOT / "tests" / "equations").glob("*.py")} - {"conftest.py"}
    assert len(shown) == len(set(shown)) and set(shown) == files


def test_the_stored_ledger_is_of_the_present_proofs_and_complete():
    from svae_lib import verify

    stored = verify.read(ROOT / "book")
    present = {
        node.name
        for path in (ROOT / "tests" / "equations").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and verify.Proof(path.name, node.name).equations
    }
    assert {proof.name for proof in stored} == present, "run svae verify --store"
    assert {claim.status for claim in verify.ledger(stored)} <= {"holds", "erratum"}
    assert all(claim.chapter for claim in verify.ledger(stored))


GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split()
WORDS = re.compile(r"\\(?:text|textbf|textit|operatorname|mathrm|mathsf|begin|end|hspace)\*?\{[^{}]*\}")
LETTER = rf"(?:\\(?:{'|'.join(GREEK)})\b|(?<!\\)\b[A-Za-z]\b)"
SYMBOL = re.compile(rf"(\\(?:mathcal|mathbb|tilde|hat|bar)\b)?[\s{{]*({LETTER})")
INDEX = re.compile(rf"\\(?:sum|prod|max|min|sup|inf) *_[\s{{]*({LETTER})")


def symbols(latex):
    """The letters of a formula, each with its accent or alphabet; words, operators and indices of sums are none."""
    for name, meaning in CONFIG["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"].items():
        latex = re.sub(rf"\\{name}(?![A-Za-z])", lambda _, meaning=meaning: meaning + " ", latex)
    latex = re.sub(r"(\\[A-Za-z]+|[A-Za-z])", r" \1 ", WORDS.sub(" ", latex))  # ab is a and b
    return {accent + letter for accent, letter in SYMBOL.findall(latex)} - set(INDEX.findall(latex))


def inline(text):
    """All symbols in the running text's mathematics."""
    text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S)
    return set().union(*map(symbols, re.findall(r"(?<!\\)\$([^$]+)\$", text)))


def test_symbols_are_read_from_formulas():
    formula = r"\E_{\dec(x\mid z)}\log\mathcal N(xy;\tilde z) + \sum_{k=1}^K k\,\text{noise}"
    assert symbols(formula) == {r"\mathbbE", "p", r"\theta", "x", "y", "z", r"\mathcalN", r"\tildez", "K"}


def test_every_symbol_is_in_the_notation_or_in_the_text_of_its_chapter(notebook):
    text = "\n".join(c.source for c in notebook.cells[:1] + notebook.cells[2:] if c.cell_type == "markdown")
    known = inline((ROOT / "book" / "notation.md").read_text()) | inline(text)
    for formula in re.findall(r"\$\$(.*?)\$\$", text, flags=re.S):
        assert symbols(formula) <= known, formula
