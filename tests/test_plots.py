r"""What figures are made of: intervals of a set, the library's own lines, one panel per world."""

from __future__ import annotations

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from svae_lib import plots
from svae_lib.exact import World
from svae_lib.grid import Family, log_gaussian, mixture

X = torch.linspace(-4, 4, 41, dtype=torch.float64)


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def test_runs_are_intervals_of_neighbouring_cells() -> None:
    at = torch.arange(6.0)
    inside = torch.tensor([True, True, False, False, True, False])
    assert plots.runs(inside, at) == [(-0.5, 2.0), (3.5, 1.0)]
    assert plots.runs(torch.zeros(6, dtype=torch.bool), at) == []
    assert plots.runs(X.abs() > 1, X) == [pytest.approx((-4.1, 3.0)), pytest.approx((1.1, 3.0))]


def test_source_is_shown_as_it_stands() -> None:
    shown = plots.show_source(World.log_ratio, World.C_x, log_gaussian).data
    assert shown.startswith("```python\ndef log_ratio(self,") and shown.endswith("```")
    assert "def C_x(self)" in shown and "def log_gaussian(" in shown
    assert "\n    return self.p.log_prob(xz) - self.q.log_prob(xz)\n" in shown


def test_density_has_the_height_of_a_density() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    log_mass = log_gaussian(X, 0.0, 1.0).log_softmax(0)
    plots.density(left, X, log_mass, plots.Q)
    plots.density(right, X, log_mass, plots.Q, vertical=True)
    peak = (2 * torch.pi) ** -0.5
    assert left.lines[0].get_ydata().max() == pytest.approx(peak, rel=1e-3)
    assert right.lines[0].get_xdata().max() == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("vertical", [False, True])
def test_support_bars_span_the_set(vertical: bool) -> None:
    _, ax = plt.subplots()
    plots.support_bar(ax, X, X.abs() > 1, plots.Q, row=0, vertical=vertical, label="S")
    spans = [line.get_ydata() if vertical else line.get_xdata() for line in ax.lines]
    assert [list(span) for span in spans] == [pytest.approx([-4.1, -1.1]), pytest.approx([1.1, 4.1])]
    assert [text.get_text() for text in ax.texts] == ["S"]


@pytest.mark.parametrize("n", [1, 3])
def test_supports_draws_one_panel_per_world(n: int) -> None:
    plots.setup()
    z = torch.linspace(-4, 4, 31, dtype=torch.float64)
    with torch.no_grad():
        joints = Family(X, z, mixture(X, [0.5, 0.5], [-1.5, 1.5], 0.4), slope=4.0)()
    figure = plots.supports({f"world {k}": joints for k in range(n)}, eps=0.05)
    figure.canvas.draw()
    titles = [ax.get_title("left") for panel in figure.subfigs for ax in panel.axes]
    assert [t for t in titles if t] == [f"world {k}" for k in range(n)]


@pytest.mark.parametrize(("ends", "numbers"), [((100, 450), "100 150 200 300 400"), ((7, 400), "10 30 100 300")])
def test_a_logarithmic_axis_has_plain_numbers(ends: tuple[float, float], numbers: str) -> None:
    figure, ax = plt.subplots()
    ax.plot(ends, (0, 1))
    plots.log_scale(ax)
    figure.canvas.draw()
    low, high = ends
    shown = [label.get_text() for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert shown == numbers.split()
