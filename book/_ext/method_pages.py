r"""The pages of methods: what the registry, the library's source and the run records say is printed from there.

`{method-section} NAME` is the section of one method; what it holds is prose. `{methods}` lists all methods,
`{lines} f g` shows functions of the library, given as module.name.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import pandas as pd
from docutils import nodes
from pages import SAFE, Directive
from sphinx.application import Sphinx

from svae_lib import gans, objectives, records
from svae_lib.draws import Method, lrt
from svae_lib.methods import METHODS
from svae_lib.mixtures import MIXTURES
from svae_lib.verify import NUMBER

DATASETS = ("ring8", "grid25", "mnist", "cifar10")  # of which every method says what it did, or "not run"
OTHERS = ("stacked_digits", "stacked_mnist", "tiny_imagenet", "imagenet64")  # named where there are records
ENCODERS = {
    "gaussian": "Gaussian", "planar": "planar flow", "iaf": "inverse autoregressive flow",
    "implicit": "draws without a density",
}  # fmt: skip
CRITICS = {"xz": "f(x, z)", "x": "f(x)", "xx": "f(x, x̂)", "energy": "f(x), the error of an autoencoder"}
HALVES = "{eq}`grad-wake` and {eq}`grad-sleep`"
SHARED = (lrt, objectives.critic_lrt, gans.of_x, gans.of_features, gans.lowered)  # shown once, by `lines`
SHOWN = ("methods", "gans", "objectives", "ipm")  # modules whose functions are shown when a method calls them


def equations(text: str) -> str:
    r"""The registry's words for an equation, with links: "S14 + halves" -> "{eq}`S14` + {eq}`...`"."""
    return re.sub(NUMBER, r"{eq}`\g<0>`", text).replace("halves", HALVES)


def made_of(function: Callable) -> list[Callable]:
    r"""The functions that a factory was given; none for a function of its own."""
    if "<locals>" not in function.__qualname__:
        return []
    return [cell.cell_contents for cell in function.__closure__ or () if callable(cell.cell_contents)]


def expression(function: Callable) -> str:
    r"""How it is made: `of_x(symmetric)`, or its name."""
    name = function.__qualname__.partition(".")[0]
    parts = made_of(function)
    return f"{name}({', '.join(map(expression, parts))})" if parts else name


def reached(function: Callable) -> Iterator[Callable]:
    r"""The function, or what a factory made it of, and the library's functions that these call, in order."""
    parts = made_of(function)
    for part in parts:
        yield from reached(part)
    if parts:
        return
    yield function
    module = inspect.getmodule(function)
    for name in re.findall(r"\b(?:objectives\.|ipm\.)?[a-z]\w*(?=\()", inspect.getsource(function)):
        home, _, attribute = name.rpartition(".")
        called = getattr(import_module(f"svae_lib.{home}") if home else module, attribute, None)
        known = inspect.isfunction(called) and called.__module__.removeprefix("svae_lib.") in SHOWN
        if known and called is not function:
            yield from reached(called)


def source(function: Callable) -> str:
    r"""Its lines, of the docstring the first paragraph."""
    text = textwrap.dedent(inspect.getsource(function))
    return re.sub(r'(r"""(?:[^"\n]+\n)*?[^"\n]+)\n\n.*?"""', r'\1"""', text, count=1, flags=re.S).rstrip()


def code(method: Method) -> str:
    r"""Critic, players and what follows a critic step: how they are made, and the functions that they are made of."""
    made = {"critic": method.critic, "player": method.player, "after_critic": method.after_critic}
    made = {name: function for name, function in made.items() if function is not None}
    heads = [f"{name} = {expression(f)}" for name, f in made.items() if made_of(f) or f is lrt]
    bodies = dict.fromkeys(f for top in made.values() for f in reached(top) if f not in SHARED)
    return "\n\n".join(filter(None, ["\n".join(heads), *map(source, bodies)]))


def values(named) -> str:
    return ", ".join(f"`{key} = {value!r}`" for key, value in named.items())


def facts(method: Method) -> dict[str, str]:
    r"""What the registry says of a method, in MyST."""
    defaults = dict(method.defaults)
    encoder, decoder = (defaults.pop(player, "gaussian") for player in ("encoder", "decoder"))
    drawn = {"gaussian": "Bernoulli pixels; on natural images and points a Gaussian", "point": "no noise"}
    critics = "; ".join(CRITICS[kind] for kind in method.critics) or "none"
    critics += f", {defaults['critic_outputs']} numbers each" if "critic_outputs" in defaults else ""
    found = {
        "critic maximises": equations(method.critic_equation) if method.critic else "–",
        "players maximise": equations(method.player_equation),
        "encoder": ENCODERS.get(encoder, encoder) if method.codes else "none",
        "decoder": drawn.get(decoder, decoder),
        "critics": critics,
        "defaults": values(defaults) + (f"; on points {values(method.on_points)}" if method.on_points else ""),
        "data": " and ".join(method.data) + ("" if method.separable else "; its seeds are run one by one"),
    }
    return {name: text for name, text in found.items() if text}


def command(dataset: str, method: str, setting: str, profile: str, seeds: Sequence[int]) -> str:
    r"""What repeats the runs of one row of `records.our_rows`."""
    setting, *changes = setting.split()
    parts = [f"svae run {dataset} {method} --profile {profile}", *(f"--set {change}" for change in changes)]
    parts += [f"--setting {setting}"] if setting != "literal" else []
    first, last = min(seeds), max(seeds)
    in_a_row = 1 < len(seeds) == last - first + 1
    said = [f"{first}-{last}"] if in_a_row else sorted(seeds)
    return "\n".join(" ".join([*parts, f"--seed {seed}"]) for seed in said)


def rows_of(method: str, dataset: str, folder: Path | None = None) -> pd.DataFrame:
    r"""The records of a method on a dataset, one row a setting, each with the command that repeats it."""
    rows = records.our_rows(dataset, folder)
    rows = rows[rows["method"] == method] if len(rows) else rows
    if not len(rows):
        return pd.DataFrame()
    rows["command"] = [
        command(dataset, method, setting, profile, [run["experiment"]["seed"] for run in runs])
        for (name, setting, profile, _), runs in records.grouped(dataset, folder).items()
        if name == method
    ]
    shown = [heading for heading, _ in records.columns(dataset).values() if any(rows[heading] != "–")]
    return rows[["setting", "profile", "seeds", *shown, "minutes", "command"]]


class MethodSection(Directive):
    r"""Summary, prose, facts, lines, records."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in METHODS:
            raise self.error(f"there is no method '{name}'; svae methods lists them")
        method = METHODS[name]
        section = self.section(f"method-{name}", name)
        section += self.paragraph(method.summary[0].upper() + method.summary[1:] + ".")
        self.state.nested_parse(self.content, self.content_offset, section)
        section += self.facts(facts(method))
        section += self.block(code(method), "python")
        for dataset in (*DATASETS, *OTHERS):
            if ("points" if dataset in MIXTURES else "images") in method.data:
                section += self.measured(name, dataset)
        return [section]

    def measured(self, name: str, dataset: str) -> list[nodes.Node]:
        self.env.note_reread()  # a record may have come or gone
        found = rows_of(name, dataset, self.results)
        if not len(found):
            if dataset in OTHERS:
                return []
            asked = command(dataset, name, "literal", "cpu", range(10 if dataset in MIXTURES else 1))
            return [self.paragraph(f"**{dataset}**: not run; `{asked}`")]
        *heads, _ = found.columns
        table = self.table(heads, found[heads].values.tolist(), "measured")
        return [self.paragraph(f"**{dataset}**"), table, self.block("\n".join(found["command"]), "text")]


class MethodList(Directive):
    r"""All methods, with links to their sections."""

    def run(self) -> list[nodes.Node]:
        rows = []
        for method in METHODS.values():
            link = f"{{ref}}`{method.name} <method-{method.name}>`"
            critic = equations(method.critic_equation) if method.critic else "–"
            rows.append([link, method.summary, critic, equations(method.player_equation)])
        return [self.table(["method", "in words", "critic", "players"], rows, "methods")]


class Lines(Directive):
    r"""Functions of the library as they are, but for the later paragraphs of their docstrings."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        shown = []
        for path in self.arguments:
            module, *names = path.split(".")
            found = import_module(f"svae_lib.{module}")
            for name in names:
                found = getattr(found, name)
            shown.append(source(found))
        return [self.block("\n\n".join(shown), "python")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("method-section", MethodSection)
    app.add_directive("methods", MethodList)
    app.add_directive("lines", Lines)
    return SAFE
