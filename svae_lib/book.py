r"""The book out of its chapters: keep their outputs fresh, build the pages.

`build_book` is `svae book`. Chapters hold their outputs; one is executed again only when something that these depend on
has changed (`fingerprint`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from svae_lib import notebooks
from svae_lib.errors import UserError
from svae_lib.files import whole
from svae_lib.notebooks import ROOT

PASSING = ("*-quick-s*", "*.new")  # among the results: runs for trying, which git ignores, and what is being written


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
        results = (path for path in (root / "results").rglob("*") if path.is_file())
        files |= {path for path in results if not any(map(path.match, PASSING))}
    digest = hashlib.sha256(json.dumps(cells).encode())
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def is_stale(chapter: Path) -> bool:
    r"""Whether the outputs in a chapter are not those of one run of its cells with the present library and records."""
    notebook, cells = _read(chapter)
    in_order = [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    return not in_order or notebook.metadata.get("fingerprint") != fingerprint(chapter)


def execute(chapter: Path) -> None:
    r"""Execute a chapter with its own parameters and keep the outputs in it.

    Raises UserError, and changes nothing, if a cell fails or somebody edits a cell meanwhile.
    """
    import nbformat

    now = fingerprint(chapter)  # of what is about to run, not of what is there when it has run
    done = _read(notebooks.run_chapter(chapter.stem, root=chapter.parent.parent, echo=False))[1]
    notebook, cells = _read(chapter)
    if [cell.source for cell in cells] != [cell.source for cell in done]:
        raise UserError(f"chapter {chapter.stem} changed while it was executed; give the command again")
    for cell, copy in zip(cells, done, strict=True):
        hidden = "remove-output" in cell.metadata.get("tags", [])  # widgets: nothing to see without a kernel
        cell.outputs, cell.execution_count = [] if hidden else copy.outputs, copy.execution_count
    notebook.metadata["fingerprint"] = now
    with whole(chapter) as new:
        nbformat.write(notebook, new)


def refresh(root: Path = ROOT, everything: bool = False) -> None:
    r"""Execute the stale chapters, or all, one process to a core."""
    notebooks.need("papermill", "book")
    stale = [chapter for chapter in notebooks.chapters(root) if everything or is_stale(chapter)]
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


def stage(root: Path = ROOT) -> Path:
    r"""Lay out everything that the pages are made of in `_build/source`, as in the repository, and return it.

    Copies keep the time of their originals, so that Sphinx reads again only what has changed.
    """
    source = root / "_build" / "source"
    shutil.rmtree(source, ignore_errors=True)
    left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", *PASSING)
    for folder in ("book", "notebooks", "results", "tests/equations"):
        shutil.copytree(root / folder, source / folder, ignore=left)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(root / name, source / name)
    mathjax = source / "book/_static/mathjax/tex-svg-full.js"  # one file of 2 MB out of a package of 24 MB
    mathjax.parent.mkdir()
    shutil.copy2(str(importlib.resources.files("sphinx-mathjax-offline") / "static/mathjax" / mathjax.name), mathjax)
    return source


def build_book(root: Path = ROOT, everything: bool = False) -> Path:
    r"""Execute what is stale, or all, build the pages with every warning an error, and return the page to open."""
    notebooks.need("jupyter_book", "book")
    refresh(root, everything)
    source = stage(root)
    program = "from jupyter_book.cli.main import main; main()"
    options = ["build", ".", "--path-output", str(root), "-n", "-W", "--keep-going", "-q"]
    print("Building the pages", flush=True)
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=source, text=True, capture_output=True)
    if done.returncode:
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)  # else the next build forgets the warnings
        raise UserError(f"the pages could not be built:\n{done.stderr.strip()}")
    return root / "_build" / "html" / "index.html"
