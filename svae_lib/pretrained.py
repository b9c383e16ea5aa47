r"""Kept models: encoder and decoder of a finished run as a small file that loads in a moment, without data.

`svae keep NAME` makes results/checkpoints/NAME.safetensors from the run's own training checkpoint, so nothing is
trained again. Matrices and filters are kept in half precision, where that changes no metric by more than the standard
error in the record; biases and the statistics of BatchNorm, which are few and cost most when rounded, stay as they are.
The header holds what rebuilds the nets: the experiment, the shape of an image, and what rounding changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from svae_lib import data, evaluation, levels, metrics, records
from svae_lib.checkpoints import read_checkpoint
from svae_lib.device import choose_device
from svae_lib.errors import UserError
from svae_lib.evaluation import Evaluation
from svae_lib.experiment import Experiment, checkpoint
from svae_lib.files import whole
from svae_lib.methods import METHODS
from svae_lib.mixtures import MIXTURES
from svae_lib.models import build_model

FILE_MB, ALL_MB = 3, 25  # what a clone of the book should have to carry
CHECKED = 2_000  # test images on which the weights are held against the record
CHEAP = Evaluation(iw_samples=1, iw_images=2)  # the bound with many draws is too costly to be repeated


@dataclass(frozen=True)
class Pretrained:
    r"""A kept model, ready to draw and to reconstruct: `players` has its decoder and, where there is one, encoder."""

    experiment: Experiment
    players: nn.ModuleDict
    shape: tuple[int, int, int]  # of an image
    rounding: dict[str, float]  # what half precision changed: metric -> difference; nothing if the file is not in half

    @property
    def device(self) -> torch.device:
        return next(self.players.parameters()).device

    def sample(self, count: int) -> Tensor:
        r"""`count` decoder means at z ~ N(0, I), grey in [0, 1]; (count, C, H, W)."""
        nets = self.experiment.nets
        return levels.grey(metrics.sample_images(self.players["decoder"], nets.z_dim, count, self.device, nets.axis))

    def reconstruct(self, images: Tensor) -> Tensor:
        r"""x̂, the decoder mean at the encoder mean, of uint8 images (N, C, H, W); grey in [0, 1], of that shape.

        Raises UserError if the model has no encoder, or was trained on images of another shape.
        """
        if "encoder" not in self.players:
            raise UserError(f"{self.experiment.name} has no encoder, so it can only sample")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"{self.experiment.name} wants uint8 images of shape (N, *{self.shape}), not {given}")
        return metrics.reconstruct(**self.players, images=images.to(self.device), axis=self.experiment.nets.axis)


def path(name: str, folder: Path | None = None) -> Path:
    r"""Where the model of a run is kept, or would be; `folder` is that of the records."""
    return records.results_folder(folder) / "checkpoints" / f"{name}.safetensors"


def names(folder: Path | None = None) -> list[str]:
    r"""The kept models, in alphabetical order."""
    return sorted(file.stem for file in path("", folder).parent.glob("*.safetensors"))


def load(name: str, folder: Path | None = None, device: str = "auto") -> Pretrained:
    r"""The kept model of that name, in eval mode; needs no data, and leaves the random stream as it was.

    Raises UserError if there is none, or if the file is damaged or holds other nets than it says.
    """
    file = path(name, folder)
    if not file.exists():
        raise UserError(f"there is no kept model '{name}'; choose one of: {', '.join(names(folder)) or 'none'}")
    try:
        with safe_open(file, "pt") as opened:
            header = {key: json.loads(text) for key, text in (opened.metadata() or {}).items()}
        weights = load_file(file)
        experiment = Experiment.make(**header["experiment"])
        shape, rounding = tuple(header["shape"]), header["rounding"]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{file} is not a kept model; delete it and run `svae keep {name}`") from None
    players = _players(experiment, shape, weights, file)
    return Pretrained(experiment, players.to(choose_device(device)), shape, rounding)


def keep(name: str, folder: Path | None = None) -> Path:
    r"""Write the players of a finished run of images into results/checkpoints, and return the path.

    They come from the training checkpoint in the user's cache. Raises UserError if that is missing or does not give
    the metrics of the record, and if the file, or all of them together, would be too large.
    """
    record = records.read(records.results_folder(folder), name.partition("-")[0], name)
    if record is None or record["status"] != "done":
        raise UserError(f"'{name}' is not the record of a finished run; choose one of {records.results_folder(folder)}")
    experiment = Experiment.make(**record["experiment"])
    if experiment.dataset in MIXTURES:
        raise UserError(f"{name} is a model of points, which is trained in a minute; only those of images are kept")
    dataset, trained = data.load(experiment.dataset), checkpoint([experiment])
    if not trained.exists():
        raise UserError(f"there is no training checkpoint {trained}; delete the record of {name} and run it again")
    weights = _evaluated(read_checkpoint(trained))
    full = _players(experiment, dataset.shape, weights, trained)
    half = {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}
    rounded = _players(experiment, dataset.shape, half, trained)
    images = evenly(dataset.test.images, CHECKED)
    found = check(experiment, full, images, record)
    rounding = _difference(found, _measured(experiment, rounded, images))
    rounding["pixel"] = _largest_change(experiment, full, rounded, images)
    if not all(value <= record["metrics"][key]["se"] for key, value in rounding.items() if key in found):
        half, rounding = weights, {}
    header = {"experiment": record["experiment"], "shape": dataset.shape, "rounding": rounding}
    return _write(half, {key: json.dumps(value) for key, value in header.items()}, path(name, folder))


def check(experiment: Experiment, players: nn.ModuleDict, images: Tensor, record: records.Record) -> evaluation.Metrics:
    r"""Bounds and errors of the players on test images, measured anew, as far as the record has them.

    Raises UserError if one of them is further from the record than four standard errors.
    """
    found = _measured(experiment, players, images)
    found = {key: metric for key, metric in found.items() if key in record["metrics"]}
    for key, metric in found.items():
        known = record["metrics"][key]["value"]
        if not abs(metric["value"] - known) <= 4 * metric["se"]:
            raise UserError(
                f"the weights of {experiment.name} give {key} = {metric['value']:.4g}, and its record says {known:.4g};"
                " delete the record and run it again"
            )
    return found


def evenly(images: Tensor, count: int) -> Tensor:
    r"""`count` images, evenly from first to last: the first half of MNIST's test images is easier than the second."""
    return images[:: max(1, len(images) // count)][:count]


# Inside -------------------------------------------------------------------------------------------------


def _evaluated(state: dict) -> dict[str, Tensor]:
    """Of the state of a trainer the players that were evaluated: the best, the averaged, or the last ones."""
    if "stop" in state:
        return state["stop"]["best"]
    if "average" in state:  # AveragedModel keeps a count beside its module
        start = "module."
        return {key.removeprefix(start): value for key, value in state["average"].items() if key.startswith(start)}
    return state["players"]


def _players(experiment: Experiment, shape: tuple[int, ...], weights: dict[str, Tensor], file: Path) -> nn.ModuleDict:
    with torch.random.fork_rng():
        players = build_model(experiment.nets, METHODS[experiment.method], shape, 0).players.eval()
    try:
        players.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{file} holds other nets than those of {experiment.name}; delete it") from None
    return players


def _measured(experiment: Experiment, players: nn.ModuleDict, images: Tensor) -> evaluation.Metrics:
    with torch.random.fork_rng():
        torch.manual_seed(experiment.seed)
        found = evaluation.on_images(players, images, CHEAP, experiment.nets.axis)
    return {key: metric for key, metric in found.items() if not key.startswith("iw_")}


def _difference(a: evaluation.Metrics, b: evaluation.Metrics) -> dict[str, float]:
    return {key: abs(a[key]["value"] - b[key]["value"]) for key in a}


def _largest_change(experiment: Experiment, full: nn.ModuleDict, rounded: nn.ModuleDict, images: Tensor) -> float:
    """Of a pixel in [0, 1]: in reconstructions, or in samples of a model without an encoder."""
    nets = experiment.nets
    if "encoder" in full:
        a, b = (metrics.reconstruct(**players, images=images, axis=nets.axis) for players in (full, rounded))
    else:
        z = torch.randn(100, nets.z_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            a, b = (nets.axis.back(players["decoder"](z).mean) for players in (full, rounded))
    return (a - b).abs().max().item()


def _write(weights: dict[str, Tensor], header: dict[str, str], file: Path) -> Path:
    """All or nothing, and only if it is small enough."""
    content = save({key: value.contiguous() for key, value in weights.items()}, header)
    others = sum(other.stat().st_size for other in file.parent.glob("*.safetensors") if other != file) / 1e6
    size = len(content) / 1e6
    if size > FILE_MB:
        raise UserError(f"{file.stem} would take {size:.1f} MB, and a kept model may take {FILE_MB}")
    if size + others > ALL_MB:
        raise UserError(f"{file.parent} would grow to {size + others:.1f} MB, above {ALL_MB}; delete a model from it")
    with whole(file) as new:
        new.write_bytes(content)
    return file
