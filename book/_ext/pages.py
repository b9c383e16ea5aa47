r"""What the directives of this book build their pages of: words, lines, tables, lists and places to link to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

SAFE = {"parallel_read_safe": True, "parallel_write_safe": True}
Cell = str | list[nodes.Node]  # MyST, or what has been made of it


class Directive(SphinxDirective):
    r"""A directive whose words are MyST."""

    @property
    def results(self) -> Path:
        r"""The folder of the records."""
        return Path(self.env.srcdir) / "results"

    def parsed(self, text: str) -> list[nodes.Node]:
        return self.state.inline_text(text, self.lineno)[0] if text else []

    def paragraph(self, text: str, **attributes) -> nodes.paragraph:
        return nodes.paragraph("", "", *self.parsed(text), **attributes)

    def block(self, text: str, language: str) -> nodes.literal_block:
        return nodes.literal_block(text, text, language=language)

    def place(self, node: nodes.Element, label: str) -> nodes.Element:
        r"""The node, as a place that links to the label lead to."""
        node["ids"], node["names"] = [label], [label]
        self.state.document.note_explicit_target(node)
        return node

    def section(self, label: str, title: str) -> nodes.section:
        section = self.place(nodes.section(), label)
        section += nodes.title("", title)
        return section

    def facts(self, found: Mapping[str, str]) -> nodes.field_list:
        r"""Names, each with its words."""
        listed = nodes.field_list(classes=["facts"])
        for name, text in found.items():
            listed += nodes.field("", nodes.field_name("", name), nodes.field_body("", self.paragraph(text)))
        return listed

    def table(
        self, heads: Sequence[str], rows: Sequence[Sequence[Cell]], name: str, widths: Sequence[int] = ()
    ) -> nodes.table:
        r"""A table, whose class is `name`; columns are equally wide if nothing else is said."""
        table, group = nodes.table(classes=[name]), nodes.tgroup(cols=len(heads))
        group += [nodes.colspec(colwidth=width) for width in widths or [1] * len(heads)]
        group += nodes.thead("", self._row(heads))
        group += nodes.tbody("", *map(self._row, rows))
        table += group
        return table

    def _row(self, cells: Sequence[Cell]) -> nodes.row:
        made = (cell if isinstance(cell, list) else [self.paragraph(str(cell))] for cell in cells)
        return nodes.row("", *(nodes.entry("", *cell) for cell in made))
