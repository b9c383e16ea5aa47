r"""Chapters as programs: find one, check its parameters, run it.

`run_chapter` is `svae notebook`. A chapter is a notebook `notebooks/NN_topic.ipynb`; it is executed into `_build`,
never in place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from svae_lib import __version__
from svae_lib.device import choose_device, describe
from svae_lib.errors import UserError

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
