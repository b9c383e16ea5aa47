"""The page *Cost*: what is printed follows from nets and records, and without a record it says so."""

import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent

import cost_page  # noqa: E402

from svae_lib import bench, costs, records, timing  # noqa: E402
from svae_lib.experiment import Experiment  # noqa: E402

RATES = {"fp32": 1e11, "bf16": 5e11, "bandwidth": 1e10, "overhead": 1e-5}
CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_nb", "cost_page"]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["results"]
html_theme = "basic"
"""


@pytest.fixture(autouse=True, scope="module")
def two_nets():
    """Counted once for all tests."""
    cost_page.counted.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "FAMILIES", ("a1", "a3"))
        yield
    cost_page.counted.cache_clear()


def write_bench(folder, machine="Toy", device="cpu, 1 threads", **case):
    """A record as `svae bench` writes it, with one measured row and one that was not run."""
    case = {"dataset": "mnist"} | case
    label = bench.label(Experiment.make(method="svae-r", precision="bf16", **case))
    measured = timing.row(f"{label}: engine ÷ by hand", [0.9, 1.0, 1.1], aim="≤ 1.05", engine=0.123)
    return records.write_report(folder, {
        "name": f"bench-{timing.slug(machine)}", "effort": "full", "machine": machine, "load": [0.1, 1.0],
        "machines": [{"name": device, **RATES}], "rows": [measured, timing.missing("theirs", "pip install pythae")],
        "environment": {"date": "2026-01-02", "torch": "2.0", "device": device},
    })  # fmt: skip


def write_run(folder, seconds, seed):
    e = Experiment.make("mnist", "vae", "cpu", seed=seed)
    records.write(folder, {
        "name": e.name, "status": "done", "experiment": e.flat(), "changes": {}, "metrics": {}, "seconds": seconds,
        "environment": {"device": "cpu, 1 threads"},
    })  # fmt: skip


def test_without_records_the_page_says_what_to_run(tmp_path):
    assert cost_page.machines_table(tmp_path)["source"].tolist()[0] == "not run: `svae bench`"
    predicted = cost_page.predicted_table(tmp_path)
    assert set(predicted["measured update"]) == {"predicted, not measured"}
    assert set(predicted["nets, data"]) == {"a1, mnist", "a3, imagenet64"}
    assert len(predicted) == 2 * len(costs.PUBLISHED)


def test_a_record_fills_its_column(tmp_path):
    write_bench(tmp_path)
    rows = cost_page.predicted_table(tmp_path)
    (row,) = [row for _, row in rows[rows["machine"] == "Toy; cpu, 1 threads"].iterrows() if "a1" in row["nets, data"]]
    assert row["precision"] == "bf16" and row["measured update"] == "123 ms"
    cost = costs.cost(Experiment.make("mnist", "svae-r", precision="bf16"), costs.SHAPES["mnist"])
    expected = costs.predict(cost.update, costs.Machine("", **RATES)).seconds
    assert row["update"] == cost_page.duration(expected)
    assert row["epoch"] == cost_page.duration(expected * 60_000 / 64)


def test_a_measured_h200_takes_the_place_of_the_published_one(tmp_path):
    write_bench(tmp_path, "NVIDIA H200", "cuda, NVIDIA H200", dataset="imagenet64", batch=256)
    shown = cost_page.machines_table(tmp_path)
    (source,) = shown[shown["machine"].str.contains("H200")]["source"]
    assert source.startswith("measured 2026-01-02")
    epochs = cost_page.papers_table(tmp_path).query("machine.str.contains('H200')")["measured epoch"]
    assert epochs.tolist() == ["–", cost_page.duration(0.123 * 1_281_167 / 256)]


def test_runs_are_set_beside_the_prediction_for_their_own_device(tmp_path):
    for seed, seconds in enumerate((250.0, 500.0, 1_000.0)):
        write_run(tmp_path, seconds, seed)
    assert cost_page.runs_table(tmp_path)["predicted"].tolist() == ["no record of this device: `svae bench`"]
    write_bench(tmp_path, device="cpu, 8 threads")
    assert cost_page.runs_table(tmp_path)["predicted"].tolist() == ["no record of this device: `svae bench`"]
    write_bench(tmp_path)
    (row,) = cost_page.runs_table(tmp_path).to_dict("records")
    assert (row["runs"], row["ms an update"], row["fastest"], row["slowest"]) == (3, "200", "100", "400")
    assert float(row["measured ÷ predicted"]) == pytest.approx(200 / float(row["predicted"]), rel=0.1)


def test_durations_are_in_the_unit_of_a_reader():
    assert [cost_page.duration(s) for s in (2e-5, 0.0041, 1.5, 90, 7_200, 1.8e5)] == [
        "20 µs", "4.1 ms", "1.5 s", "1.5 min", "2 h", "2.08 days",
    ]  # fmt: skip


def test_the_page_is_built_and_read_again_only_when_a_record_comes(tmp_path):
    from sphinx.application import Sphinx

    source, out = tmp_path / "source", tmp_path / "out"
    (source / "results" / "mnist").mkdir(parents=True)
    shutil.copy(ROOT / "book" / "cost.md", source / "index.md")
    (source / "conf.py").write_text(CONF)

    def built():
        app = Sphinx(str(source), str(source), str(out), str(out), "html", status=None, warning=sys.stderr)
        app.build()
        page = re.sub(r"<.*?>", "", (out / "index.html").read_text(), flags=re.S)
        return " ".join(page.split()), app.env.all_docs["index"]

    before, read = built()
    assert built()[1] == read
    write_bench(source / "results")
    write_run(source / "results", 250.0, 0)
    after, read_again = built()
    assert read_again > read
    for text, first in (("svae bench", True), ("svae grid --only mnist", True), ("pip install pythae", False)):
        assert (f"not run: {text}" in before) is first and (f"not run: {text}" in after) is not first
    assert "a3, imagenet64" in after and "44 h" in after
