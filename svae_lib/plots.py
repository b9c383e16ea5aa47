r"""Figures: one look and one meaning of colours for the whole book.

Blue is always q (data, encoder), vermilion always p (prior, decoder), green the critic. The three are
told apart in every common form of colour blindness (palette of Okabe and Ito).
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from matplotlib.transforms import offset_copy
from torch import Tensor

from svae_lib.grid import Joints, support

if TYPE_CHECKING:
    from IPython.display import Markdown  # notebooks have it; the library runs without

Q, P, CRITIC, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"


def setup() -> None:
    r"""The look of every figure: sharp on dense screens, white ground in dark pages too, open axes."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("retina")
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=[Q, P, CRITIC, "#CC79A7", "#E69F00", "#56B4E9"],
        rc={
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.labelcolor": "0.15",
            "font.size": 10,
            "axes.labelsize": 10.5,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "legend.fontsize": 9.5,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "mathtext.fontset": "cm",
        },
    )


def show_source(*objects: Callable | property) -> Markdown:
    r"""The library's own lines, as a code block: functions, methods, properties or classes."""
    from IPython.display import Markdown

    functions = [o.fget if isinstance(o, property) else o for o in objects]
    code = "\n".join(textwrap.dedent(inspect.getsource(f)) for f in functions)
    return Markdown(f"```python\n{code}```")


def density(ax: Axes, at: Tensor, log_mass: Tensor, colour: str, label: str = "", vertical: bool = False) -> None:
    r"""Draw a table of log-masses as a density over its points, filled lightly; `vertical` over the y-axis."""
    height = log_mass.exp() / (at[1] - at[0])
    (ax.fill_betweenx if vertical else ax.fill_between)(at, height, color=colour, alpha=0.15, lw=0)
    ax.plot(*((height, at) if vertical else (at, height)), color=colour, label=label)


def runs(inside: Tensor, at: Tensor) -> list[tuple[float, float]]:
    r"""A set of cells as intervals (start, length)."""
    half = float(at[1] - at[0]) / 2
    intervals: list[tuple[float, float]] = []
    for point in at[inside].tolist():
        if intervals and point - half <= sum(intervals[-1]) + half / 2:
            intervals[-1] = (intervals[-1][0], point + half - intervals[-1][0])
        else:
            intervals.append((point - half, 2 * half))
    return intervals


def support_bar(
    ax: Axes, at: Tensor, inside: Tensor, colour: str, row: int, vertical: bool = False, label: str = ""
) -> None:
    r"""Draw a set of cells as thick bars outside the axes: below them, or to their left if `vertical`.

    `row` 0 is next to the axes; `label` is written at the end of the row.
    """
    away = -6.5 - 9 * row  # points
    along = ax.get_yaxis_transform() if vertical else ax.get_xaxis_transform()
    transform = offset_copy(along, ax.figure, x=away * vertical, y=away * (not vertical), units="points")
    for start, length in runs(inside, at):
        ends = [start, start + length]
        xy = ([0, 0], ends) if vertical else (ends, [0, 0])
        ax.plot(*xy, color=colour, lw=4, solid_capstyle="butt", transform=transform, clip_on=False)
    if label:
        ax.annotate(label, (1.02, 0), (0, away), "axes fraction", "offset points", va="center")


def supports(worlds: Mapping[str, Joints], eps: float) -> Figure:
    r"""Figures 1 and 2 of paper S from real densities, one panel per world.

    Middle: the ε-supports of q_φ(x, z) and p_θ(x, z). Above and beside: the marginals, with their
    ε-supports as bars. Tinted: where only p has support (vermilion) or only q (blue).
    """
    one = len(worlds) == 1
    figure = plt.figure(figsize=(6.4, 5.2) if one else (8, 4.1))
    panels = figure.subfigures(1, len(worlds), squeeze=False)[0]
    for (title, joints), panel in zip(worlds.items(), panels, strict=True):
        corner = _panel(panel, title, joints, eps)
        if one:
            corner.legend(handles=_legend(eps), loc="center left", bbox_to_anchor=(-0.25, 0.5), handlelength=1.3)
    if not one:
        figure.legend(handles=_legend(eps), loc="outside lower center", ncols=5, handlelength=1.3, columnspacing=1.2)
    return figure


def _legend(eps: float) -> list[Patch | Line2D]:
    return [
        Patch(facecolor=Q, alpha=0.6, label="$q$: data, encoder"),
        Patch(facecolor=P, alpha=0.6, label="$p$: prior, decoder"),
        Line2D([], [], color=GREY, lw=4, label=rf"support, $\epsilon$ = {eps:g}"),
        Patch(facecolor=P, alpha=0.15, label="only $p$"),
        Patch(facecolor=Q, alpha=0.15, label="only $q$"),
    ]


def _panel(figure: SubFigure, title: str, joints: Joints, eps: float) -> Axes:
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 2.6], width_ratios=[2.6, 1], hspace=0, wspace=0)
    plane = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=plane)
    beside = figure.add_subplot(grid[1, 1], sharey=plane)
    corner = figure.add_subplot(grid[0, 1])
    in_x, in_z = {}, {}
    for colour, joint, x_marginal, z_marginal, row in [
        (P, joints.log_p, joints.p_x, joints.p_z, 1),
        (Q, joints.log_q, joints.q_x, joints.q_z, 0),
    ]:
        edge = float(joint[support(joint, eps)].min())  # the support is where the joint exceeds this level
        plane.contourf(joints.x, joints.z, joint.T, levels=[edge, 0], colors=colour, alpha=0.3)
        plane.contour(joints.x, joints.z, joint.T, levels=[edge], colors=colour, linewidths=1.2, linestyles="solid")
        in_x[colour], in_z[colour] = support(x_marginal, eps), support(z_marginal, eps)
        density(above, joints.x, x_marginal, colour)
        density(beside, joints.z, z_marginal, colour, vertical=True)
        support_bar(above, joints.x, in_x[colour], colour, row)
        support_bar(beside, joints.z, in_z[colour], colour, row, vertical=True)
    for colour, other in [(P, Q), (Q, P)]:
        for inside, at, span in [(in_x, joints.x, plane.axvspan), (in_z, joints.z, plane.axhspan)]:
            for start, length in runs(inside[colour] & ~inside[other], at):
                span(start, start + length, color=colour, alpha=0.08, lw=0)
    plane.set(
        xlabel="data $x$",
        ylabel="code $z$",
        xlim=(-4.2, 4.2),
        ylim=(-3.6, 3.6),
        xticks=range(-4, 5, 2),
        yticks=range(-3, 4),
    )
    above.set(title=title, ylim=(0, None))
    beside.set(xlim=(0, None))
    for ax in (above, beside, corner):
        ax.axis("off")
    return corner


def image_grid(ax: Axes, images: Tensor, columns: int, row_labels: Sequence[str] = ()) -> None:
    r"""Draw images (N, C, H, W) in [0, 1] row by row, `columns` to a row; a label for each row if given."""
    from svae_lib._torchvision import torchvision

    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=1, pad_value=1.0)
    ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    height = images.shape[2] + 1
    ax.set(xticks=[], yticks=[height * (row + 0.5) for row in range(len(row_labels))], yticklabels=row_labels)
    ax.tick_params(length=0)


def log_scale(ax: Axes) -> None:
    r"""A logarithmic horizontal axis with plain numbers on it, more of them the shorter it is."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if high < 20 * low else (1, 3)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
