r"""Docstrings are plain text with mathematics in it: their bars and stars are not markup, and indented
paragraphs keep their layout. The numbers of equations that one begins with are links to the equations.
Signatures name types without their modules.
"""

import re

from pages import SAFE
from sphinx.application import Sphinx

from svae_lib.verify import CITED, NUMBER

CODE_OR_MARK = re.compile(r"(`+[^`]+`+)|([|*])")


def plain_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    plain, before = [], ""
    if lines and (cited := CITED.match(lines[0])):
        lines[0] = re.sub(NUMBER, r":eq:`\g<0>`", cited[0]) + lines[0][cited.end() :]
    for line in lines:
        if not line.startswith("    "):
            plain.append(CODE_OR_MARK.sub(lambda found: found[1] or "\\" + found[2], line))
        elif before:
            plain.append(line)
        else:
            plain += ["::", "", line]
        before = line
    lines[:] = plain


def short_names(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    if signature and "[[" in signature:  # Callable[[...], ...], which Sphinx would print with full names
        return re.sub(r"~[\w.]+\.(\w+)", r"\1", signature), returns
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-signature", short_names)
    return SAFE
