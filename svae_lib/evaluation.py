r"""What is measured of a trained model: the right metrics of `svae_lib.metrics` for its kind and its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svae_lib import metrics, quality, records
from svae_lib.autoregressive import PixelModel
from svae_lib.classifier import accuracy, load_classifier
from svae_lib.data import STACKED, Dataset, load
from svae_lib.densities import Point
from svae_lib.errors import UserError
from svae_lib.levels import Axis, Cells, Grey
from svae_lib.mixtures import MIXTURES, Mixture

Metrics = dict[str, metrics.Metric]


@dataclass(frozen=True)
class Evaluation:
    r"""How much is spent on the numbers of a record."""

    score_samples: int = 10_000
    pixelwise_samples: int = 100  # the same, of models that draw pixel by pixel: a pass of the net for each
    iw_samples: int = 5_000  # K
    iw_images: int = 1_000  # images on which the gap to the ELBO is measured
    inception: bool = False  # also the published IS, FID and KID of colour images, whose weights are then downloaded

    def __post_init__(self) -> None:
        least = {"score_samples": 2, "pixelwise_samples": 2, "iw_samples": 1, "iw_images": 2}  # or no spread
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} must be at least {value}, not {getattr(self, name)}")


def evaluate(
    players: nn.ModuleDict, dataset: Dataset, device: torch.device, z_dim: int, how: Evaluation, axis: Axis = Grey
) -> Metrics:
    r"""Every number of a record, on the test split; `axis` is what grey levels are to the nets."""
    if dataset.name in MIXTURES:
        return _points(players, dataset.test.to(device).images, MIXTURES[dataset.name], z_dim, how)
    return _images(players, dataset, device, z_dim, how, axis)


@torch.no_grad()
def _points(players: nn.ModuleDict, x: Tensor, target: Mixture, z_dim: int, how: Evaluation) -> Metrics:
    draws = players["decoder"](torch.randn(how.score_samples, z_dim, device=x.device)).rsample().cpu()  # as the target
    values = metrics.coverage(target, draws)
    values["score"] = metrics.classifier_score(target.log_posterior, draws)
    if "encoder" in players:
        x_hat = players["decoder"](players["encoder"](x).rsample()).rsample()
        values["l2"] = metrics.summary((x_hat - x).norm(dim=1))
        values["mse"] = metrics.summary((x_hat - x).square().sum(1))
    return values


def _images(
    players: nn.ModuleDict, dataset: Dataset, device: torch.device, z_dim: int, how: Evaluation, axis: Axis
) -> Metrics:
    decoder = players["decoder"]
    values = on_images(players, dataset.test.to(device).images, how, axis)
    count = min(how.score_samples, how.pixelwise_samples) if isinstance(decoder, PixelModel) else how.score_samples
    samples = metrics.sample_images(decoder, z_dim, count, device, axis)
    values |= _score(dataset, device, samples)
    return values | (quality.inception(samples, dataset.train.images) if how.inception else {})


def on_images(players: nn.ModuleDict, images: Tensor, how: Evaluation, axis: Axis = Grey) -> Metrics:
    r"""What is measured on given uint8 images: bounds and reconstruction error, or the exact likelihood."""
    decoder = players["decoder"]
    if isinstance(decoder, PixelModel):
        return metrics.exact_nll(decoder, images)
    if "encoder" not in players:
        return {}
    values = _likelihood(players["encoder"], decoder, images, how, axis)
    return values | metrics.reconstruction_error(players["encoder"], decoder, images, axis)


def _likelihood(encoder: nn.Module, decoder: nn.Module, images: Tensor, how: Evaluation, axis: Axis) -> Metrics:
    q = metrics.proposal(encoder(axis.see(images[:1])))
    if isinstance(q, Point) or isinstance(decoder(q.mean), Point):  # nets that draw without a density
        return {}
    few = min(how.iw_images, len(images))
    if axis is Cells:
        return metrics.discrete_nll(encoder, decoder, images, how.iw_samples, few)
    distortion, rate = metrics.elbo_parts(encoder, decoder, images)
    values = {"elbo_grey": metrics.summary(distortion + rate)}
    values |= {"distortion_grey": metrics.summary(distortion), "rate": metrics.summary(rate)}
    return values | metrics.dynamic_nll(encoder, decoder, images, how.iw_samples, few)


def _score(dataset: Dataset, device: torch.device, images: Tensor) -> Metrics:
    if dataset.name in STACKED:  # three digits an image: which of the thousand combinations are there?
        return metrics.stacked_coverage(load_classifier(load(STACKED[dataset.name]), device), images)
    net = load_classifier(dataset, device)
    if dataset.name == "digits":  # too few images for the covariance of a thousand features
        return {"score": metrics.classifier_score(net, images)}
    return quality.quality(net, images, quality.features(net, quality.reference(dataset, device)))


def real_data(dataset: Dataset, device: torch.device) -> dict[str, Any]:
    r"""The row that every score is judged by: the same measure on the real test data."""
    if dataset.name in MIXTURES:
        target, points = MIXTURES[dataset.name], dataset.test.images
        return metrics.coverage(target, points) | {"score": metrics.classifier_score(target.log_posterior, points)}
    report = records.read_report(f"classifier-{dataset.name}")
    if report is not None:  # measured once, with the classifier
        values = {k.removeprefix("test_"): v for k, v in report["metrics"].items() if k.startswith("test_")}
        hits = values.pop("accuracy")
        return values | {"classifier_accuracy": hits["value"]}
    test = dataset.test.to(device)
    values = _score(dataset, device, test.images)
    if dataset.name not in STACKED:
        values["classifier_accuracy"] = accuracy(load_classifier(dataset, device), test)
    return values
