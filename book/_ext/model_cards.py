r"""The page *Models*: `{model-cards}` prints a card for every kept model, from its file and the record of its run."""

import math
from pathlib import Path

from docutils import nodes
from pages import SAFE, Directive
from sphinx.application import Sphinx

from svae_lib import pretrained, records
from svae_lib.pretrained import Pretrained

MANY_ARE_BETTER = ("score", "modes", "high_quality")  # of the other metrics, little
UCI_DIGITS = "handwritten digits of 8 × 8 pixels (Alpaydin and Kaynak, at UCI and in scikit-learn), CC BY 4.0"
MNIST = "handwritten digits of 28 × 28 pixels (LeCun, Cortes and Burges), CC BY-SA 3.0 according to its distributors"
IMAGENET = "ImageNet's photographs at 64 × 64 pixels, under its terms: research, not commerce"
STACKED = "three random images as the three colours of one: "
DATA = {  # what a model has seen, and under which terms
    "mnist": MNIST,
    "digits": UCI_DIGITS,
    "stacked_digits": STACKED + UCI_DIGITS,
    "stacked_mnist": STACKED + MNIST,
    "patches32": "patches of the two photographs in scikit-learn, CC BY",
    "patches64": "patches of the two photographs in scikit-learn, CC BY",
    "cifar10": "photographs of ten kinds, 32 × 32 pixels (Krizhevsky), published without a licence",
    "tiny_imagenet": IMAGENET,
    "imagenet64": IMAGENET,
}
PURPOSE = "research and teaching on generative models"
NOT_FOR = (
    "images unlike those of its data set; reading or recognising anything; decisions about people; a judgement of what "
    "the method could do with more training"
)


def place(metric: str, value: float, others: list[records.Record]) -> tuple[int, int]:
    r"""Rank of a value among the finished runs of its data set that have it, 1 the best, and their number."""
    values = [r["metrics"][metric]["value"] for r in others if metric in r["metrics"]]
    sign = -1 if metric in MANY_ARE_BETTER else 1
    return 1 + sum(sign * other < sign * value for other in values), len(values)


def metric_rows(record: records.Record, others: list[records.Record]) -> list[list[str]]:
    r"""Rows of metric, value ± standard error, n, real test data, place among the runs of its data set."""
    rows = []
    for metric, (heading, decimals) in records.columns(record["experiment"]["dataset"]).items():
        found, real = record["metrics"].get(metric), record["real_data"].get(metric)
        if found is None:
            continue
        digits = decimals if not 0 < found["se"] < 10**-decimals else math.ceil(-math.log10(found["se"]))
        value = f"{found['value']:.{digits}f}" + (f" ± {found['se']:.{digits}f}" if found["se"] else "")
        aim = f"{real['value']:.{decimals}f}" if real else "–"
        aim += f" (n = {real['n']:,})" if real and real["n"] != found["n"] else ""
        rank, count = place(metric, found["value"], others)
        rows.append([heading, value, f"{found['n']:,}", aim, f"{rank} of {count}"])
    return rows


def weakness(record: records.Record, others: list[records.Record]) -> str:
    r"""How far samples are from as many real images, and where most of the other runs of the data set are better."""
    found, real, said, worse = record["metrics"], record["real_data"], [], []
    for metric, (heading, decimals) in records.columns(record["experiment"]["dataset"]).items():
        if metric in found and metric in real and real[metric]["n"] == found[metric]["n"]:
            ours, aim = (f"{values[metric]['value']:.{decimals}f}" for values in (found, real))
            said.append(f"{heading} of its samples {ours}, of real images {aim}")
        if metric in found:
            rank, count = place(metric, found[metric]["value"], others)
            worse += [f"{heading} ({rank} of {count})"] if rank > (count + 1) / 2 else []
    said += [f"worse than most runs of its data set: {', '.join(worse)}"] if worse else []
    return "; ".join(said) or "no metric is worse than in most runs of its data set"


def precision(model: Pretrained, record: records.Record | None) -> str:
    r"""How the weights are kept, and what that changed."""
    changed = dict(model.rounding)
    if not changed:
        return "single precision"
    text = f"half precision, which changed a pixel by at most {changed.pop('pixel'):.1g}"
    if not (changed and record):
        return text
    worst = max(value / record["metrics"][key]["se"] for key, value in changed.items())
    return f"{text} and a metric by at most {worst:.1g} of its standard error"


def facts(model: Pretrained, size: int, record: records.Record | None, others: list[records.Record]) -> dict[str, str]:
    r"""What a card lists, in MyST; the file has `size` bytes."""
    e, made = model.experiment, record["environment"] if record else {}
    changes = "".join(f", `{key} = {value!r}`" for key, value in e.changes.items())
    weights = sum(value.numel() for value in model.players.parameters())
    return {
        "data": DATA.get(e.dataset, e.dataset),
        "method": f"{{ref}}`{e.method} <method-{e.method}>`, setting {e.setting}{changes}",
        "trained": f"{e.training.updates:,} updates of {e.training.batch} images, profile {e.profile}, seed {e.seed}",
        "made by": f"commit `{made['commit']}`, {made['date']}, {made['device']}" if made else "no record",
        "size": f"{weights:,} parameters, {size / 1e6:.1f} MB in {precision(model, record)}",
        "licence": "MIT, as the book; the data have their own, above",
        "for": PURPOSE,
        "not for": NOT_FOR,
        "bad at": weakness(record, others) if record else "not known without the record",
    }


class ModelCards(Directive):
    r"""One section for each kept model."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # a model or a record may have come or gone
        cards = [self.card(name, self.results) for name in pretrained.names(self.results)]
        return cards or [self.paragraph("No model is kept; `svae keep NAME` keeps that of a finished run.")]

    def card(self, name: str, folder: Path) -> nodes.section:
        model, dataset = pretrained.load(name, folder, "cpu"), name.partition("-")[0]
        record = records.read(folder, dataset, name)
        others = [other for other in records.read_all(dataset, folder) if other["status"] == "done"]
        section = self.section(f"model-{name}".replace("_", "-"), name)
        picture = folder / dataset / f"{name}.samples.png"
        if picture.exists():
            alt = f"64 samples of the model {name}, eight in a row."
            section += nodes.image(uri=f"/results/{dataset}/{picture.name}", alt=alt, width="40%")
        section += self.facts(facts(model, pretrained.path(name, folder).stat().st_size, record, others))
        if record is not None:
            heads = ["metric", "value", "n", "real test data", "place among the runs"]
            section += self.table(heads, metric_rows(record, others), "measured")
        else:
            section += self.paragraph("Metrics: not run; the record of this model is missing.")
        lines = ["from svae_lib import pretrained", f'model = pretrained.load("{name}")', "images = model.sample(16)"]
        section += self.block("\n".join(lines), "python")
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("model-cards", ModelCards)
    return SAFE
