r"""The claims ledger as pages, clickable both ways: equation, row of the ledger, function, proof.

The directive `claims` prints the ledger (svae_lib.verify) as a table, `proofs` a file of `tests/equations` with
an anchor at each proof. Every equation of the papers gets a link to its row.
"""

import ast
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from svae_lib import verify


def link(text: str, label: str) -> addnodes.pending_xref:
    r"""A link to one of the anchors below."""
    kind = {"refdomain": "std", "reftype": "ref", "reftarget": label, "refexplicit": True, "refwarn": True}
    return addnodes.pending_xref("", nodes.inline("", text), **kind)


class Directive(SphinxDirective):
    def anchor(self, label: str) -> nodes.target:
        node = nodes.target("", "", ids=[label], names=[label])
        self.state.document.note_explicit_target(node)
        return node

    def parsed(self, text: str) -> list[nodes.Node]:
        return self.state.inline_text(text, self.lineno)[0] if text else []


class Claims(Directive):
    r"""The ledger: equation, its name and status, its proofs and what they observed, its functions."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "book" / "claims.json"))
        claims = verify.ledger(verify.read(root / "book"), root)
        table, group = nodes.table(classes=["claims"]), nodes.tgroup(cols=4)
        group += [nodes.colspec(colwidth=width) for width in (6, 24, 45, 25)]
        heads = ("equation", "in words", "proofs, and the worst error they observed", "code")
        group += nodes.thead("", self.row([nodes.paragraph("", head)] for head in heads))
        group += nodes.tbody("", *(self.row(self.cells(claim)) for claim in claims))
        table += group
        return [table]

    def row(self, cells) -> nodes.row:
        return nodes.row("", *(nodes.entry("", *cell) for cell in cells))

    def cells(self, claim: verify.Claim) -> list[list[nodes.Node]]:
        number = [self.anchor(f"claim-{claim.equation.lower()}")]
        number += [nodes.paragraph("", "", *self.parsed(f"{{eq}}`{claim.equation}`"))]
        name = self.parsed(claim.name)
        if claim.status != "holds":
            name += [nodes.Text(" "), nodes.strong("", claim.status)]
        listed = nodes.bullet_list()
        for proof in claim.proofs:
            listed += nodes.list_item("", nodes.paragraph("", "", link(proof.title, proof.anchor)))
        shown = (f"{{py:obj}}`{name.removeprefix('svae_lib.')} <{name}>`" for name in claim.functions)
        code = self.parsed(", ".join(shown))
        evidence = [nodes.paragraph("", claim.evidence), listed]
        return [number, [nodes.paragraph("", "", *name)], evidence, [nodes.paragraph("", "", *code)]]


class Proofs(Directive):
    r"""One file of `tests/equations`, as it is, cut at its proofs."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "tests" / "equations" / self.arguments[0]
        self.env.note_dependency(str(path))
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        found, begin = [], 0
        for node in ast.parse(source).body:
            proof = verify.Proof(path.name, getattr(node, "name", ""))
            if not isinstance(node, ast.FunctionDef) or not proof.equations:
                continue
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            found += self.code(lines[begin:first]) + self.heading(proof) + self.code(lines[first : node.end_lineno])
            begin = node.end_lineno
        return found + self.code(lines[begin:])

    def heading(self, proof: verify.Proof) -> list[nodes.Node]:
        rows = [link(number, f"claim-{number.lower()}") for number in proof.equations]
        parts = [part for row in rows for part in (row, nodes.Text(" · "))]
        return [self.anchor(proof.anchor), nodes.paragraph("", "", *parts, nodes.Text(proof.title), classes=["proof"])]

    def code(self, lines: list[str]) -> list[nodes.Node]:
        text = "".join(lines).strip("\n")
        return [nodes.literal_block(text, text, language="python")] if text else []


def link_equations(app: Sphinx, document: nodes.document) -> None:
    r"""Under each equation of the papers, a link to its row of the ledger."""
    for equation in list(document.findall(nodes.math_block)):
        if re.fullmatch(verify.NUMBER, equation.get("label") or ""):
            row = link("proofs and code", f"claim-{equation['label'].lower()}")
            equation.parent.insert(equation.parent.index(equation) + 1, nodes.paragraph("", "", row, classes=["claim"]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("claims", Claims)
    app.add_directive("proofs", Proofs)
    app.connect("doctree-read", link_equations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
