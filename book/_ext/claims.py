r"""The claims ledger as pages, clickable both ways: equation, row of the ledger, function, proof.

The directive `claims` prints the ledger (svae_lib.verify) as a table, `proofs` a file of `tests/equations` with
an anchor at each proof. Every equation of the papers gets a link to its row.
"""

import ast
import re
from pathlib import Path

from docutils import nodes
from pages import SAFE, Cell, Directive
from sphinx import addnodes
from sphinx.application import Sphinx

from svae_lib import verify


def link(text: str, label: str) -> addnodes.pending_xref:
    r"""A link to one of the anchors below."""
    kind = {"refdomain": "std", "reftype": "ref", "reftarget": label, "refexplicit": True, "refwarn": True}
    return addnodes.pending_xref("", nodes.inline("", text), **kind)


class Claims(Directive):
    r"""The ledger: equation, its name and status, its proofs and what they observed, its functions."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "book" / "claims.json"))
        claims = verify.ledger(verify.read(root / "book"), root)
        heads = ("equation", "in words", "proofs, and the worst error they observed", "code")
        return [self.table(heads, [self.cells(claim) for claim in claims], "claims", (6, 24, 45, 25))]

    def cells(self, claim: verify.Claim) -> list[Cell]:
        number = [
            self.place(nodes.target(), f"claim-{claim.equation.lower()}"),
            self.paragraph(f"{{eq}}`{claim.equation}`"),
        ]
        words = claim.name if claim.status == "holds" else f"{claim.name} **{claim.status}**"
        listed = nodes.bullet_list()
        for proof in claim.proofs:
            listed += nodes.list_item("", nodes.paragraph("", "", link(proof.title, proof.anchor)))
        shown = (f"{{py:obj}}`{name.removeprefix('svae_lib.')} <{name}>`" for name in claim.functions)
        return [number, words, [nodes.paragraph("", claim.evidence), listed], ", ".join(shown)]


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
        return [
            self.place(nodes.target(), proof.anchor),
            nodes.paragraph("", "", *parts, nodes.Text(proof.title), classes=["proof"]),
        ]

    def code(self, lines: list[str]) -> list[nodes.Node]:
        text = "".join(lines).strip("\n")
        return [self.block(text, "python")] if text else []


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
    return SAFE
