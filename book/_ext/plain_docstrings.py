r"""Docstrings are plain text with mathematics in it: their bars and stars are not markup.

Signatures name types without their modules.
"""

import re

from sphinx.application import Sphinx

CODE_OR_MARK = re.compile(r"(`+[^`]+`+)|([|*])")


def escape_marks(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [CODE_OR_MARK.sub(lambda found: found[1] or "\\" + found[2], line) for line in lines]


def shorten_names(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    if signature and "[[" in signature:  # Callable[[...], ...], which Sphinx would print with full names
        return re.sub(r"~[\w.]+\.(\w+)", r"\1", signature), returns
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape_marks)
    app.connect("autodoc-process-signature", shorten_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
