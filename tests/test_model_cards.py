"""The page *Models*: a card says what file and record say, and nothing else."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent

import model_cards  # noqa: E402

from svae_lib import records  # noqa: E402
from svae_lib.data import DATASETS  # noqa: E402
from svae_lib.mixtures import MIXTURES  # noqa: E402

NAME = "stacked_digits-dcgan-stabilised-cpu-s0-3e7ec4"
CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_nb", "model_cards"]
exclude_patterns = ["results"]
html_theme = "basic"
"""


def build(source):
    """The page's HTML, and what Sphinx complained of."""
    (source / "book").mkdir(exist_ok=True)
    (source / "conf.py").write_text(CONF)
    (source / "index.md").write_text("# Index\n\n```{toctree}\nbook/models\n```\n\n(method-dcgan)=\n## dcgan\n")
    (source / "book" / "models.md").write_text("# Models\n\n```{model-cards}\n```\n")
    options = ["-q", "-b", "html", str(source), str(source / "html")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options], capture_output=True, text=True)
    return (source / "html" / "book" / "models.html").read_text(encoding="utf-8"), done.stderr


def text_of(html):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", html)))


def test_a_card_follows_file_and_record(tmp_path):
    results = tmp_path / "results"
    for file in records.results_folder().glob(f"*/{NAME}*"):
        (results / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, results / file.parent.name)
    page, complaints = build(tmp_path)
    assert not complaints
    record, words = records.read(results, "stacked_digits", NAME), text_of(page)
    assert f'model = pretrained.load("{NAME}")' in words
    assert record["environment"]["commit"] in page and 'href="../index.html#method-dcgan"' in page
    assert f"{record['metrics']['modes']['value']:.1f}" in words and "1 of 1" in words
    assert "CC BY 4.0" in words and "MIT" in words and "not for" in words and "bad at" in words
    assert list((tmp_path / "html" / "_images").glob("*.samples.png"))
    records.path(results, "stacked_digits", NAME).unlink()
    page, complaints = build(tmp_path)
    assert not complaints and "Metrics: not run" in page and record["environment"]["commit"] not in page


def test_places_and_weaknesses_are_counted_among_the_finished_runs():
    def record(l2, score, n=5):
        found = {"l2": {"value": l2, "se": 0.1, "n": 5}, "score": {"value": score, "se": 0.1, "n": 5}}
        return {"experiment": {"dataset": "mnist"}, "metrics": found, "real_data": {"score": {"value": 9.8, "n": n}}}

    runs = [record(1, 5), record(2, 9), record(3, 1)]
    assert [model_cards.place("l2", run["metrics"]["l2"]["value"], runs) for run in runs] == [(1, 3), (2, 3), (3, 3)]
    assert model_cards.place("score", 9, runs) == (1, 3)
    assert model_cards.weakness(runs[1], runs) == "score of its samples 9.00, of real images 9.80"
    assert model_cards.weakness(runs[2], runs).endswith("RMSE, L2 (3 of 3), score (3 of 3)")
    few = record(0.5, 8, n=300)  # real images of another number
    assert model_cards.weakness(few, runs) == "no metric is worse than in most runs of its data set"
    assert model_cards.metric_rows(few, runs)[1][3] == "9.80 (n = 300)"
    assert model_cards.metric_rows(runs[0], runs) == [
        ["RMSE, L2", "1.00 ± 0.10", "5", "–", "1 of 3"], ["score", "5.00 ± 0.10", "5", "9.80", "2 of 3"],
    ]  # fmt: skip


def test_the_terms_of_every_set_of_images_are_stated():
    assert set(DATASETS) - set(MIXTURES) == set(model_cards.DATA)
