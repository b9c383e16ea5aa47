r"""Everything that defines a run in one frozen object, and `run`, which turns it into a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svae_lib import data, methods, metrics, records
from svae_lib.classifier import accuracy, load_classifier
from svae_lib.device import choose_device, describe
from svae_lib.errors import UserError
from svae_lib.mixtures import MIXTURES, Mixture
from svae_lib.models import Nets, build_model
from svae_lib.train import Diverged, Trainer, Training

Metrics = dict[str, metrics.Metric]
Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    r"""How much is spent on the numbers of a record."""

    score_samples: int = 10_000
    iw_samples: int = 5_000  # K
    iw_images: int = 1_000  # images on which the gap to the ELBO is measured


PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "quick": {"updates": 400, "log_every": 40, "score_samples": 300, "iw_samples": 500, "iw_images": 20},
        "cpu": {"updates": 2_500, "precision": "bf16", "iw_images": 50},
        "paper": {"updates": 200_000, "log_every": 1_000, "precision": "bf16", "score_samples": 50_000},
    },
    "points": {
        "quick": {"updates": 400, "log_every": 100, "score_samples": 2_500},
        "cpu": {"updates": 20_000, "log_every": 1_000, "score_samples": 2_500},
        "paper": {"updates": 200_000, "log_every": 10_000, "score_samples": 2_500},
    },
}

# "literal" is what the appendix prints; for points, of which it says nothing, plain MLPs. "stabilised" keeps nets of
# the same size and bounds the slope of the critic, which then no longer reads the quantisation of x, and sees where
# in the image a stroke is.
PLAIN_MLPS = {"z_dim": 2, "depth": 3, "norm": "none", "critic_norm": "none", "critic_dropout": 0.0, "batch": 128}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "literal": {},
        "stabilised": {
            "critic_dropout": 0.0, "critic_norm": "none", "critic_pool": "none",
            "instance_noise": 0.1, "penalty": 0.01, "lr": 3e-4, "critic_lr": 3e-4, "beta1": 0.5, "ema": 0.995,
        },
    },
    "points": {
        "literal": PLAIN_MLPS | {"lr": 1e-3, "critic_lr": 1e-3},
        "stabilised": PLAIN_MLPS | {"lr": 1e-3, "critic_lr": 1e-3, "beta1": 0.5, "penalty": 0.01, "ema": 0.999},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    r"""One run. Make it with `Experiment.make`; equal experiments give equal results on one machine."""

    dataset: str
    method: str
    profile: str
    setting: str
    seed: int
    nets: Nets = field(default_factory=Nets)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @staticmethod
    def make(
        dataset: str, method: str, profile: str = "quick", setting: str = "literal", seed: int = 0, **changes: Any
    ) -> Experiment:
        r"""Profile, then setting, then the method's own, then `changes` (any field of Nets, Training, Evaluation).

        Raises UserError for an unknown dataset, method, profile, setting or key, or a value of the wrong type.
        """
        kind_of_data = "points" if dataset in MIXTURES else "images"
        profiles, settings = PROFILES[kind_of_data], SETTINGS[kind_of_data]
        for kind, name, known in (
            ("dataset", dataset, data.DATASETS),
            ("method", method, methods.METHODS),
            ("profile", profile, profiles),
            ("setting", setting, settings),
        ):
            if name not in known:
                raise UserError(f"unknown {kind} '{name}'; choose one of: {', '.join(known)}")
        experiment = Experiment(dataset, method, profile, setting, seed)
        named = profiles[profile] | settings[setting] | methods.METHODS[method].defaults
        for key, value in (named | changes).items():
            experiment = experiment._with(key, value)
        return experiment

    def _with(self, key: str, value: Any) -> Experiment:
        for part in ("nets", "training", "evaluation"):
            old = getattr(getattr(self, part), key, None)
            if old is not None:
                return replace(self, **{part: replace(getattr(self, part), **{key: _typed(key, value, type(old))})})
        raise UserError(f"unknown key '{key}'; choose one of: {', '.join(keys())}")

    def flat(self) -> dict[str, Any]:
        r"""Every choice in one level, as records hold it."""
        nested = asdict(self)
        parts = [nested.pop(part) for part in ("nets", "training", "evaluation")]
        return nested | {key: value for part in parts for key, value in part.items()}

    @property
    def name(self) -> str:
        r"""dataset-method-setting-profile-sSEED, with a hash of what differs from the named defaults."""
        stem = f"{self.dataset}-{self.method}-{self.setting}-{self.profile}-s{self.seed}"
        if not self.changes:
            return stem
        return f"{stem}-{hashlib.sha256(json.dumps(sorted(self.changes.items())).encode()).hexdigest()[:6]}"

    @property
    def changes(self) -> dict[str, Any]:
        r"""What differs from the named profile and setting."""
        named = Experiment.make(self.dataset, self.method, self.profile, self.setting, self.seed).flat()
        return {key: value for key, value in self.flat().items() if value != named[key]}


def keys() -> list[str]:
    r"""The names that `--set` knows."""
    return [f.name for part in (Nets, Training, Evaluation) for f in fields(part)]


def _typed(key: str, value: Any, kind: type) -> Any:
    """`value` as `kind`; strings come from the command line."""
    try:
        converted = kind(value)
        if isinstance(value, str) or converted == value:
            return converted
    except (TypeError, ValueError):
        pass
    raise UserError(f"{key} must be of type {kind.__name__}, not '{value}'") from None


def prepare(experiment: Experiment, dataset: data.Dataset, device: torch.device) -> Trainer:
    r"""The trainer of an experiment, ready to `fit`."""
    method, identity = methods.METHODS[experiment.method], json.dumps(experiment.flat())
    model = build_model(experiment.nets, method, dataset.shape, experiment.seed)
    for net in (model.players, *model.critics):
        net.to(device, memory_format=torch.channels_last)
    split, held_out = dataset.train.to(device), dataset.validation.to(device)
    return Trainer(model, method, experiment.training, split, held_out, experiment.seed, identity)


def evaluate(experiment: Experiment, trainer: Trainer, dataset: data.Dataset) -> dict[str, metrics.Metric]:
    r"""Every number of a record, on the test split."""
    torch.manual_seed(experiment.seed)
    players, test = trainer.evaluated_players(), dataset.test.to(trainer.device).images
    if dataset.name in MIXTURES:
        return _evaluate_points(experiment, players, test, MIXTURES[dataset.name])
    return _evaluate_images(experiment, players, test, load_classifier(dataset, trainer.device))


@torch.no_grad()
def _evaluate_points(experiment: Experiment, players: nn.ModuleDict, x: Tensor, target: Mixture) -> Metrics:
    z = torch.randn(experiment.evaluation.score_samples, experiment.nets.z_dim)
    draws = players["decoder"](z).rsample()
    values = metrics.coverage(target, draws)
    values["score"] = metrics.classifier_score(target.log_posterior, draws)
    if "encoder" in players:
        x_hat = players["decoder"](players["encoder"](x).rsample()).rsample()
        values["l2"] = metrics.summary((x_hat - x).norm(dim=1))
        values["mse"] = metrics.summary((x_hat - x).square().sum(1))
    return values


def _evaluate_images(experiment: Experiment, players: nn.ModuleDict, images: Tensor, log_probs: Classifier) -> Metrics:
    how, decoder = experiment.evaluation, players["decoder"]
    values = {}
    if "encoder" in players:
        encoder = players["encoder"]
        distortion, rate = metrics.elbo_parts(encoder, decoder, images, dynamic=False)
        values = {"elbo_grey": metrics.summary(distortion + rate)}
        values |= {"distortion_grey": metrics.summary(distortion), "rate": metrics.summary(rate)}
        values |= metrics.dynamic_nll(encoder, decoder, images, how.iw_samples, min(how.iw_images, len(images)))
        values |= metrics.reconstruction_error(encoder, decoder, images)
    samples = metrics.sample_images(decoder, experiment.nets.z_dim, how.score_samples, images.device)
    values["score"] = metrics.classifier_score(log_probs, samples)
    return values


def real_data(dataset: data.Dataset, device: torch.device) -> dict[str, Any]:
    r"""The row that every score is judged by: the same classifier on the real test images."""
    if dataset.name in MIXTURES:
        target, x = MIXTURES[dataset.name], dataset.test.images
        return metrics.coverage(target, x) | {"score": metrics.classifier_score(target.log_posterior, x)}
    classifier, test = load_classifier(dataset, device), dataset.test.to(device)
    score = metrics.classifier_score(classifier, test.images)
    return {"score": score, "classifier_accuracy": accuracy(classifier, test)}


def run(
    experiment: Experiment,
    device: str = "auto",
    folder: Path | None = None,
    on_log: Callable[[dict], None] | None = None,
) -> dict[str, Any]:
    r"""Train (or resume), evaluate once on test, write the record with its pictures, and return it.

    A finished experiment is not repeated: its record is returned. A run that diverges leaves a record too.
    """
    folder = records.results_folder() if folder is None else folder
    done = records.read(folder, experiment.dataset, experiment.name)
    if done is not None:
        flat = experiment.flat()  # a key that is newer than the record had its present default
        if done["experiment"] != {key: flat.get(key) for key in done["experiment"]}:
            raise UserError(f"record {experiment.name} was made with other defaults; delete it to run again")
        return done
    chosen = choose_device(device)
    dataset = data.load(experiment.dataset)
    trainer = prepare(experiment, dataset, chosen)
    record = {"name": experiment.name, "status": "done", "experiment": experiment.flat(), "changes": experiment.changes}
    try:
        trainer.fit(data.cache() / "runs" / f"{experiment.name}.pt", on_log)
        record["metrics"] = evaluate(experiment, trainer, dataset)
        record["real_data"] = real_data(dataset, chosen)
        if dataset.name not in MIXTURES:
            records.write_pictures(folder, experiment, trainer.evaluated_players(), dataset.test.to(chosen).images)
    except Diverged as error:
        record |= {"status": "diverged", "reason": str(error), "metrics": {}}
    record |= {"history": trainer.history, "seconds": round(trainer.seconds, 1)}
    record["environment"] = records.environment(describe(chosen))
    records.write(folder, record)
    return record
