r"""Chapters as programs: run one with its parameters checked, keep the book's copies fresh, build the pages.

`run_chapter` is `svae notebook`, `build_book` and `store` are `svae book`. A chapter is a notebook
`notebooks/NN_topic.ipynb`; it is executed into `_build`, never in place, and again only when
something that its outputs depend on has changed (`fingerprint`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from svae_lib import __version__
from svae_lib.device import choose_device, describe
from svae_lib.errors import UserError
from svae_lib.files import whole

ROOT = Path(__file__).resolve().parent.parent
CHOICES = re.compile(r"(\w+(?:, \w+)* or \w+)(?::.*)?")  # the comment of a text that has a few allowed values
PRINTED_VERSIONS = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "matplotlib", "pandas")


def versions() -> dict[str, str]:
    r"""The versions of Python and of the packages that decide a chapter's outputs."""
    packages = {name: importlib.metadata.version(name) for name in PRINTED_VERSIONS}
    return {"Python": platform.python_version(), "svae-book": __version__, **packages}


def footer(profile: str, seed: int, **parameters: Any) -> None:
    r"""Print under what conditions a chapter ran; the last cell of each chapter."""
    shown = {
        "profile": profile,
        "seed": seed,
        **parameters,
        "device": describe(choose_device()),
        "versions": ", ".join(f"{name}\xa0{version}" for name, version in versions().items()),
    }
    width = max(map(len, shown)) + 2
    for name, value in shown.items():
        line = textwrap.fill(f"{name + ':':<{width}}{value}", 72, subsequent_indent=" " * width, break_on_hyphens=False)
        print(line.replace("\xa0", " "))


def need(module: str, extra: str) -> None:
    r"""Raise UserError if a package of an optional extra is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this needs the package {module}; install it with: pip install -e '.[{extra}]'")


def chapters(root: Path = ROOT) -> list[Path]:
    r"""The book's notebooks in order of their numbers."""
    found = sorted((root / "notebooks").glob("[0-9]*_*.ipynb"))
    if not found:
        raise UserError(f"there are no chapters in {root / 'notebooks'}; install from a clone with pip install -e .")
    return found


def find_chapter(name: str, root: Path = ROOT) -> Path:
    r"""The chapter called `name`: "20_mnist", "20", "mnist", a unique beginning of these, or its path."""
    wanted = Path(name).stem
    by_name = {alias: path for path in chapters(root) for alias in (path.stem, *path.stem.split("_", 1))}
    exact = by_name.get(wanted) or by_name.get(wanted.zfill(2))
    hits = {exact} if exact else {path for alias, path in by_name.items() if wanted and alias.startswith(wanted)}
    if len(hits) != 1:
        names = ", ".join(path.stem for path in chapters(root))
        raise UserError(f"'{name}' names {len(hits) or 'no'} chapter{'s' if hits else ''}; the chapters are {names}")
    return hits.pop()


def check_parameters(path: Path, params: dict[str, Any]) -> dict[str, Any]:
    r"""The parameters with the types that the chapter declares; text is converted, as it comes from a shell.

    Raises UserError for a name that the chapter does not have, for a value of the wrong type, and for one
    that is not among those listed in the comment: `profile: str = "quick"  # quick, cpu or paper: budget`.
    """
    need("papermill", "notebooks")
    from papermill import inspect_notebook

    known = inspect_notebook(path)
    checked = {}
    for name, value in params.items():
        if name not in known:
            listing = ", ".join(f"{key} ({spec['inferred_type_name']})" for key, spec in known.items()) or "none"
            raise UserError(f"chapter {path.stem} has no parameter '{name}'; it has {listing}")
        kind, comment = known[name]["inferred_type_name"], known[name]["help"]
        try:
            checked[name] = _convert(value, kind, comment)
        except (ValueError, KeyError):
            wanted = f"{kind} ({comment})" if comment else kind
            raise UserError(f"parameter '{name}' of chapter {path.stem} must be {wanted}, not '{value}'") from None
    return checked


def _convert(value: Any, kind: str, comment: str) -> Any:
    if isinstance(value, str) and kind != "str":
        value = {"int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__}[kind](value.lower())
    if kind == "float" and type(value) is int:
        value = float(value)
    listed = CHOICES.fullmatch(comment) if kind == "str" else None
    if type(value).__name__ != kind or listed and value not in re.split(", | or ", listed[1]):
        raise ValueError
    return value


def run_chapter(
    name: str, params: dict[str, Any] | None = None, output: Path | None = None, root: Path = ROOT, echo: bool = True
) -> Path:
    r"""Execute a chapter and return the path of the executed copy; `echo` prints what its cells print.

    The parameters are checked before anything runs. If a cell fails, the cells up to it stay in
    `<output>.part.ipynb` and UserError names the cell; `output` itself is only ever a complete run.
    """
    path = find_chapter(name, root)
    params = check_parameters(path, params or {})
    import papermill
    from nbclient.exceptions import DeadKernelError

    label = "-".join([path.stem, *(f"{key}={value}" for key, value in params.items())]).replace("/", "_")
    output = output or root / "_build" / "runs" / f"{label}.ipynb"
    part = output.with_suffix(".part.ipynb")
    part.parent.mkdir(parents=True, exist_ok=True)
    options = {"kernel_name": "python3", "extra_arguments": ["--log-level=CRITICAL"], "progress_bar": False}
    if echo:
        options |= {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    try:
        papermill.execute_notebook(path, part, params, cwd=path.parent, **options)
    except papermill.PapermillExecutionError as error:
        message = ": ".join(filter(None, [error.ename, *error.evalue.splitlines()[:1]]))
        why = f"failed in code cell [{error.exec_count}] with {message}"
    except DeadKernelError:
        why = "lost its Python process, perhaps for lack of memory"
    else:
        os.replace(part, output)
        return output
    raise UserError(f"chapter {path.stem} {why}; its cells so far are in {part}")


def _read(path: Path) -> tuple[Any, list[Any]]:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def library_files(sources: Iterable[str], package: Path) -> set[Path]:
    r"""The files of `package` that the sources import, directly or through one another."""
    found: set[Path] = set()
    queue = list(sources)
    while queue:
        names: list[str] = []
        for node in ast.walk(ast.parse(queue.pop())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parent = ".".join(filter(None, [package.name if node.level else "", node.module]))
                names += [parent, *(f"{parent}.{alias.name}" for alias in node.names)]
        for top, *rest in (name.split(".") for name in names):
            file = package / f"{rest[0] if rest else '__init__'}.py"
            if top == package.name and file.is_file() and file not in found:
                found.add(file)
                queue.append(file.read_text(encoding="utf-8"))
    return found


def fingerprint(chapter: Path) -> str:
    r"""A hash of all that a chapter's outputs depend on here, the versions of what is installed apart.

    That is: the source of its code cells, the files of the library that they import, directly or
    through one another, and the run records if `svae_lib.records` is among these.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    root = chapter.parent.parent
    cells = [cell.source for cell in _read(chapter)[1]]
    plain = map(TransformerManager().transform_cell, cells)  # without %magic lines
    files = library_files(plain, root / "svae_lib")
    if root / "svae_lib" / "records.py" in files:
        kept = (path for path in (root / "results").rglob("*") if "-quick-s" not in path.name)
        files |= {path for path in kept if path.is_file()}
    digest = hashlib.sha256(json.dumps(cells).encode())
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def executed(chapter: Path) -> Path:
    r"""Where the executed copy of a chapter is."""
    return chapter.parent.parent / "_build" / "executed" / chapter.name


def stamp(chapter: Path) -> Path:
    r"""The file beside the executed copy that says what this was made from, as `made_from` does."""
    return executed(chapter).with_suffix(".json")


def made_from(chapter: Path) -> dict[str, Any]:
    r"""The fingerprint of a chapter and the versions, as they are now."""
    return {"fingerprint": fingerprint(chapter), "versions": versions()}


def is_stale(chapter: Path) -> bool:
    r"""Whether the executed copy of a chapter is missing or older than what it depends on."""
    return not stamp(chapter).exists() or json.loads(stamp(chapter).read_text()) != made_from(chapter)


def execute(chapter: Path) -> None:
    r"""Execute a chapter with its own parameters into the build folder and stamp the copy."""
    stamp(chapter).unlink(missing_ok=True)
    now = made_from(chapter)  # what is about to run, not what is there when it has run
    run_chapter(chapter.stem, output=executed(chapter), root=chapter.parent.parent, echo=False)
    stamp(chapter).write_text(json.dumps(now))


def refresh(root: Path = ROOT) -> None:
    r"""Execute the stale chapters, one process to a core."""
    stale = [chapter for chapter in chapters(root) if is_stale(chapter)]
    if not stale:
        return
    cores = os.cpu_count() or 1
    workers = min(cores, len(stale))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // workers))
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning in the first cell otherwise
    print("Running", ", ".join(chapter.stem for chapter in stale), flush=True)
    failures = []
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(execute, chapter): chapter for chapter in stale}
        for job in as_completed(jobs):
            try:
                job.result()
                print(f"  {jobs[job].stem} done", flush=True)
            except UserError as error:
                failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))


def with_outputs(chapter: Path) -> Any:
    r"""The chapter as it stands, with the outputs of its executed copy and the fingerprint that they belong to.

    Raises UserError if the copy was made of other cells.
    """
    notebook, cells = _read(chapter)
    copy = _read(executed(chapter))[1]
    if [cell.source for cell in cells] != [cell.source for cell in copy]:
        raise UserError(f"chapter {chapter.stem} changed while it was executed; give the command again")
    for cell, done in zip(cells, copy, strict=True):
        hidden = "remove-output" in cell.metadata.get("tags", [])  # widgets: nothing to see without a kernel
        cell.outputs, cell.execution_count = [] if hidden else done.outputs, done.execution_count
    notebook.metadata["fingerprint"] = json.loads(stamp(chapter).read_text())["fingerprint"]
    return notebook


def _write(notebook: Any, path: Path) -> None:
    import nbformat

    with whole(path) as new:
        nbformat.write(notebook, new)


def store(root: Path = ROOT) -> None:
    r"""Write the outputs of freshly executed chapters back into `notebooks/`, to be committed."""
    refresh(root)
    for chapter in chapters(root):
        _write(with_outputs(chapter), chapter)


def stage(root: Path = ROOT) -> Path:
    r"""Lay out everything that the pages are made of in `_build/source`, as in the repository, and return it.

    Copies keep the time of their originals, so that Sphinx reads again only what has changed.
    """
    source = root / "_build" / "source"
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("book", "results", "tests/equations"):
        shutil.copytree(root / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(root / name, source / name)
    for chapter in chapters(root):
        staged = source / "notebooks" / chapter.name
        _write(with_outputs(chapter), staged)
        changed = max(chapter.stat().st_mtime, executed(chapter).stat().st_mtime)
        os.utime(staged, (changed, changed))
    mathjax = source / "book/_static/mathjax/tex-svg-full.js"  # one file of 2 MB out of a package of 24 MB
    mathjax.parent.mkdir()
    shutil.copy2(str(importlib.resources.files("sphinx-mathjax-offline") / "static/mathjax" / mathjax.name), mathjax)
    return source


def build_book(root: Path = ROOT) -> Path:
    r"""Execute what is stale, build the pages with every warning an error, and return the page to open."""
    need("jupyter_book", "book")
    refresh(root)
    source = stage(root)
    program = "from jupyter_book.cli.main import main; main()"
    options = ["build", ".", "--path-output", str(root), "-n", "-W", "--keep-going", "-q"]
    print("Building the pages", flush=True)
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=source, text=True, capture_output=True)
    if done.returncode:
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)  # else the next build forgets the warnings
        raise UserError(f"the pages could not be built:\n{done.stderr.strip()}")
    return root / "_build" / "html" / "index.html"
