"""Chapters as programs: names, parameters, execution, and what makes their outputs stale."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svae_lib import notebooks
from svae_lib.book import execute, fingerprint, is_stale, refresh
from svae_lib.errors import UserError

PARAMETERS = """\
seed: int = 0  # random seed
rate: float = 0.5  # 0.1 or more
deep: bool = False
profile: str = "quick"  # quick, cpu or paper: the budget"""


def write_chapter(path, *code, text="Prose."):
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(text), parameters, *map(new_code_cell, code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def book(tmp_path):
    """A toy book: chapter 1 imports `a`, which imports `b` inside a function; chapter 20 imports `records`."""
    for folder in ("notebooks", "svae_lib", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "svae_lib" / "a.py").write_text("def f():\n    from .b import g\n    return g()\n")
    for module in ("b", "unrelated", "records"):
        (tmp_path / "svae_lib" / f"{module}.py").write_text("def g():\n    return 1\n")
    (tmp_path / "results" / "run.json").write_text("{}")
    write_chapter(tmp_path / "notebooks" / "01_first_steps.ipynb", "%matplotlib inline\nimport svae_lib.a as a")
    write_chapter(tmp_path / "notebooks" / "20_mnist.ipynb", "from svae_lib import records")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["01_first_steps", "01", "1", "first_steps", "first", "notebooks/01_first_steps.ipynb"]
)
def test_a_chapter_has_many_names(book, name):
    assert notebooks.find_chapter(name, book).stem == "01_first_steps"


@pytest.mark.parametrize("name", ["cifar", "", "3"])
def test_an_unknown_chapter_lists_the_chapters(book, name):
    with pytest.raises(UserError, match="names no chapter; the chapters are 01_first_steps, 20_mnist$"):
        notebooks.find_chapter(name, book)


def test_an_ambiguous_beginning_is_refused(book):
    write_chapter(book / "notebooks" / "21_mnist_flows.ipynb")
    assert notebooks.find_chapter("mnist", book).stem == "20_mnist"
    with pytest.raises(UserError, match="'mni' names 2 chapters"):
        notebooks.find_chapter("mni", book)


def test_a_folder_without_chapters_is_refused(tmp_path):
    with pytest.raises(UserError, match="no chapters"):
        notebooks.chapters(tmp_path)


def test_parameters_from_a_shell_get_their_types(book):
    path = notebooks.find_chapter("1", book)
    given = {"seed": "3", "rate": "1", "deep": "True", "profile": "cpu"}
    assert notebooks.check_parameters(path, given) == {"seed": 3, "rate": 1.0, "deep": True, "profile": "cpu"}
    assert notebooks.check_parameters(path, {"rate": 2, "seed": 1}) == {"rate": 2.0, "seed": 1}


def test_an_unknown_parameter_is_refused_with_the_known_ones(book):
    with pytest.raises(UserError, match=r"no parameter 'sede'; it has seed \(int\), rate \(float\), deep \(bool\)"):
        notebooks.check_parameters(notebooks.find_chapter("1", book), {"sede": "3"})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("seed", "1.5", "int"),
        ("seed", True, "int"),
        ("seed", 1.0, "int"),
        ("rate", "fast", "float"),
        ("deep", "1", "bool"),
        ("profile", "slow", "quick, cpu or paper"),
        ("profile", 1, "str"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(book, name, value, wanted):
    with pytest.raises(UserError, match=f"'{name}' of chapter 01_first_steps must be .*{wanted}.*, not '{value}'"):
        notebooks.run_chapter("1", {name: value}, root=book)
    assert not (book / "_build").exists()


def test_a_chapter_runs_with_its_parameters_and_stays_as_it_is(book, capfd):
    path = write_chapter(book / "notebooks" / "01_first_steps.ipynb", "print('seed is', seed)")
    before = path.read_bytes()
    output = notebooks.run_chapter("first", {"seed": "7"}, root=book)
    assert output == book / "_build" / "runs" / "01_first_steps-seed=7.ipynb"
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == "seed is 7\n"
    assert "seed is 7" in capfd.readouterr().out
    assert path.read_bytes() == before and not list(output.parent.glob("*.part.*"))


def test_a_failing_chapter_says_where_in_one_sentence_and_leaves_the_last_good_copy(book):
    write_chapter(book / "notebooks" / "01_first_steps.ipynb", "print(1)", "raise ValueError('no such\\nthing')")
    good = book / "good.ipynb"
    good.write_text("good")
    with pytest.raises(UserError) as error:
        notebooks.run_chapter("1", output=good, root=book)
    sentence = str(error.value)
    assert sentence.startswith("chapter 01_first_steps failed in code cell [3] with ValueError: no such; ")
    assert "\n" not in sentence and (book / "good.part.ipynb").exists()
    assert good.read_text() == "good"


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("svae_lib/a.py", ["01_first_steps"]),
        ("svae_lib/b.py", ["01_first_steps"]),
        ("svae_lib/records.py", ["20_mnist"]),
        ("svae_lib/unrelated.py", []),
        ("results/run.json", ["20_mnist"]),
        ("results/new/other.json", ["20_mnist"]),
        ("results/new/mnist-vae-literal-quick-s0.json", []),
        ("results/new/other.json.17.new", []),
    ],
)
def test_a_change_makes_stale_what_depends_on_it(book, change, stale):
    before = {path: fingerprint(path) for path in notebooks.chapters(book)}
    (book / change).parent.mkdir(exist_ok=True)
    (book / change).write_text("x = 2\n")
    assert [path.stem for path, old in before.items() if fingerprint(path) != old] == stale


def edit(path, source, text="Prose."):
    """Another text and another last cell; outputs and everything else stay."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source, notebook.cells[-1].source = text, source
    nbformat.write(notebook, path)


def test_prose_does_not_make_a_chapter_stale_but_code_and_cells_run_alone_do(book):
    path = write_chapter(book / "notebooks" / "01_first_steps.ipynb", "x = 1")
    assert is_stale(path)
    execute(path)
    assert not is_stale(path)
    edit(path, "x = 1", text="Better prose.")
    assert not is_stale(path)
    edit(path, "x = 2")
    assert is_stale(path)
    edit(path, "x = 1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, path)
    assert is_stale(path)


def test_only_stale_chapters_run_and_their_outputs_are_kept(book, capsys):
    first, second = (book / "notebooks" / name for name in ("01_first_steps.ipynb", "20_mnist.ipynb"))
    write_chapter(first, "print('one')")
    write_chapter(second, "print('two')")
    refresh(book)
    assert not any(map(is_stale, (first, second)))
    capsys.readouterr()
    refresh(book)
    assert capsys.readouterr().out == ""

    edit(first, "print('one')", text="Better prose.")
    edit(second, "print('three')")
    refresh(book)
    assert capsys.readouterr().out.startswith("Running 20_mnist\n")
    for path, text, printed in ((first, "Better prose.", "one\n"), (second, "Prose.", "three\n")):
        stored = nbformat.read(path, as_version=4)
        assert stored.cells[0].source == text
        assert stored.cells[-1].outputs[0].text == printed
        assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2]
        assert stored.metadata.fingerprint == fingerprint(path)
        assert "papermill" not in stored.metadata
        assert not any({"papermill", "execution"} & set(cell.metadata) for cell in stored.cells)

    refresh(book, everything=True)
    assert capsys.readouterr().out.startswith("Running 01_first_steps, 20_mnist\n")


def test_a_chapter_that_is_edited_while_it_runs_stays_as_it_is(book, monkeypatch):
    path = write_chapter(book / "notebooks" / "01_first_steps.ipynb", "x = 1")
    run = notebooks.run_chapter

    def run_and_edit(*args, **options):
        output = run(*args, **options)
        edit(path, "x = 2")
        return output

    monkeypatch.setattr(notebooks, "run_chapter", run_and_edit)
    with pytest.raises(UserError, match="01_first_steps changed while"):
        execute(path)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[-1].source == "x = 2" and notebook.cells[-1].execution_count is None


def test_one_failing_chapter_does_not_stop_the_others(book):
    write_chapter(book / "notebooks" / "01_first_steps.ipynb", "1 / 0")
    write_chapter(book / "notebooks" / "20_mnist.ipynb", "x = 1")
    with pytest.raises(UserError, match="01_first_steps failed .* ZeroDivisionError"):
        refresh(book)
    assert [is_stale(path) for path in notebooks.chapters(book)] == [True, False]


def test_footer_names_the_conditions(capsys):
    notebooks.footer(profile="quick", seed=1, updates=20)
    printed = capsys.readouterr().out
    for part in ("profile:  quick", "seed:     1", "updates:  20", "device:", "torch", "Python"):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 72
