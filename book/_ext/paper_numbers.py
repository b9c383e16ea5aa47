r"""Number the papers' equations as the papers do: the equation labelled S14 prints as (S14).

Every other equation keeps its number of the form chapter.count, counted without the papers' ones.
Both the equation and each reference to it read `env.toc_fignumbers`, so that is where the labels go,
but only once the environment is saved: the next build compares its count with what was saved.
"""

import re

from pages import SAFE
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from svae_lib.verify import NUMBER

PAPER_EQUATION = re.compile(rf"equation-({NUMBER})", re.IGNORECASE)  # node ids are lower case


def number_equations(app: Sphinx, env: BuildEnvironment) -> None:
    for figures in env.toc_fignumbers.values():
        equations = figures.get("displaymath", {})
        count = 0
        for node_id, number in equations.items():
            if paper := PAPER_EQUATION.fullmatch(node_id):
                equations[node_id] = (paper[1].upper(),)
            else:
                count += 1
                equations[node_id] = (*number[:-1], count)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", number_equations)
    return SAFE
