r"""Everything that defines a run in one frozen object, and `run`, which turns it into a record."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svae_lib import data, distributed, evaluation, memory, methods, metrics, pictures, quality, records
from svae_lib.device import choose_device, describe, usable
from svae_lib.distributed import SharedTrainer
from svae_lib.draws import Method, Model
from svae_lib.ensembles import alone, stack
from svae_lib.errors import UserError
from svae_lib.evaluation import Evaluation
from svae_lib.mixtures import MIXTURES
from svae_lib.models import Nets, build_model
from svae_lib.settings import A3, APPENDIX, PROFILES, SETTINGS
from svae_lib.train import Diverged, Trainer, Training


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
        r"""Profile, then the data set's nets, then setting, then the method's own, then `changes`.

        `changes` are any fields of Nets, Training and Evaluation.
        Raises UserError for an unknown dataset, method, profile, setting or key, or a value of the wrong type.
        """
        kind_of_data = "points" if dataset in MIXTURES else "images"
        kind_of_nets = "natural" if dataset in data.NATURAL else kind_of_data
        settings = SETTINGS[kind_of_nets]
        profiles = PROFILES["large" if APPENDIX.get(dataset) is A3 else kind_of_nets]
        for kind, name, known in (
            ("dataset", dataset, data.DATASETS),
            ("method", method, methods.METHODS),
            ("profile", profile, profiles),
            ("setting", setting, settings),
        ):
            if name not in known:
                raise UserError(f"unknown {kind} '{name}'; choose one of: {', '.join(known)}")
        row = methods.METHODS[method]
        if kind_of_data not in row.data:
            raise UserError(f"{method} needs {' or '.join(row.data)}, and {dataset} holds {kind_of_data}")
        experiment = Experiment(dataset, method, profile, setting, seed)
        named = profiles[profile] | APPENDIX.get(dataset, {}) | settings[setting] | row.defaults
        named |= row.on_points if kind_of_data == "points" else {}
        for key, value in (named | changes).items():
            experiment = experiment._with(key, value)
        if experiment.training.batch < 2:
            raise UserError("batch must be at least 2: batch normalisation and spreads need it")
        if experiment.nets.critic_outputs > 1 and "critic_outputs" not in row.defaults:
            raise UserError(f"the critic of {method} gives one score: critic_outputs must be 1")
        return experiment

    def _with(self, key: str, value: Any) -> Experiment:
        for part in ("nets", "training", "evaluation"):
            if key in {f.name for f in fields(getattr(self, part))}:
                old = getattr(getattr(self, part), key)
                return replace(self, **{part: replace(getattr(self, part), **{key: _typed(key, value, type(old))})})
        raise UserError(f"unknown key '{key}'; choose one of: {', '.join(keys())}")

    def flat(self) -> dict[str, Any]:
        r"""Every choice in one level, as records hold it; the engine is none, for it decides no number."""
        nested = asdict(self)
        nested["training"].pop("engine")
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
        converted = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(value)
        if (isinstance(value, str) or converted == value) and math.isfinite(converted if kind is float else 0):
            return converted
    except (TypeError, ValueError, KeyError, OverflowError):
        pass
    wanted = {float: "a finite number", int: "a whole number", bool: "true or false"}.get(kind, "text")
    raise UserError(f"{key} must be {wanted}, not '{value}'")


def prepare(experiment: Experiment, dataset: data.Dataset, device: torch.device) -> Trainer:
    r"""The trainer of an experiment, ready to `fit`."""
    return prepare_together([experiment], dataset, device)


def prepare_together(experiments: Sequence[Experiment], dataset: data.Dataset, device: torch.device) -> Trainer:
    r"""One trainer for experiments that differ in seed, lr and critic_lr only; several have their nets stacked.

    Raises UserError where runs cannot share a batch.
    """
    first, method = experiments[0], methods.METHODS[experiments[0].method]
    identity = json.dumps([experiment.flat() for experiment in experiments])
    try:
        made = [build_model(e.nets, method, dataset.shape, e.seed) for e in experiments]
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        raise UserError("these nets do not fit into memory; choose narrower ones") from None
    model = made[0] if len(made) == 1 else _stacked(made, experiments, method)
    for net in (model.players, *model.critics):
        net.to(device, memory_format=torch.channels_last)  # on one CPU core 2 to 6 % faster with MNIST's nets
    split, held_out = dataset.train.near(device), dataset.validation.to(device)
    training = replace(first.training, precision=usable(first.training.precision, device))
    make = SharedTrainer if distributed.count() > 1 else Trainer
    return make(model, method, training, split, held_out, first.seed, identity, len(made))


def _stacked(made: list[Model], experiments: Sequence[Experiment], method: Method) -> Model:
    first = experiments[0]
    for e in experiments:
        own = replace(e.training, lr=first.training.lr, critic_lr=first.training.critic_lr)
        if replace(e, seed=first.seed, training=own) != first:
            raise UserError(f"{e.name} and {first.name} differ in more than seed and step sizes; run them one by one")
    if not method.separable:
        raise UserError(f"the objective of {method.name} is no mean over samples; run its seeds one by one")
    if first.training.clip and len({e.training.critic_lr for e in experiments}) > 1:  # stored in units of the pace
        raise UserError("clipped critics with different critic_lr cannot be trained together; run them one by one")
    pace = torch.tensor([e.training.lr / first.training.lr for e in experiments])
    critic_pace = torch.tensor([e.training.critic_lr / first.training.critic_lr for e in experiments])
    encoder = stack([m.encoder for m in made], pace) if method.codes else None
    critics = [stack(nets, critic_pace) for nets in zip(*(m.critics for m in made), strict=True)]
    return Model(encoder, stack([m.decoder for m in made], pace), critics, made[0].z_dim)


def evaluate(
    experiment: Experiment, trainer: Trainer, dataset: data.Dataset, number: int = 0
) -> dict[str, metrics.Metric]:
    r"""Every number of a record, on the test split; `number` is that of the run among those trained together."""
    torch.manual_seed(experiment.seed)
    players = evaluated(trainer, number)
    nets = experiment.nets
    return evaluation.evaluate(players, dataset, trainer.device, nets.z_dim, experiment.evaluation, nets.axis)


def evaluated(trainer: Trainer, number: int) -> nn.ModuleDict:
    r"""The players of one of the runs trained together."""
    players = trainer.evaluated_players()
    return players if trainer.runs == 1 else alone(players, number)


def run(
    experiment: Experiment,
    device: str = "auto",
    folder: Path | None = None,
    on_log: Callable[[dict], None] | None = None,
) -> records.Record:
    r"""Train (or resume), evaluate once on test, write the record with its pictures, and return it.

    A finished experiment is not repeated: its record is returned. A run that diverges leaves a record too.
    """
    return run_together([experiment], device, folder, on_log)[0]


def run_together(
    experiments: Sequence[Experiment],
    device: str = "auto",
    folder: Path | None = None,
    on_log: Callable[[dict], None] | None = None,
) -> list[records.Record]:
    r"""`run` for experiments that differ in seed and step sizes only, trained as one (`svae_lib.ensembles`)."""
    folder = records.results_folder(folder)
    found = {e.name: finished(e, folder) for e in experiments}
    missing = [e for e in experiments if found[e.name] is None]
    if missing:
        chosen = distributed.join(choose_device(device))
        first = missing[0]
        (folder / first.dataset).mkdir(parents=True, exist_ok=True)  # or fail before the training
        dataset = data.load(first.dataset)
        trainer = prepare_together(missing, dataset, chosen)
        trainer.environment = records.environment(describe(chosen))
        shared: records.Record = {}
        if first.evaluation.inception:
            quality.inception_is_possible(dataset.shape)
        if trainer.writes:
            shared["real_data"] = evaluation.real_data(dataset, chosen)
        reason = ""
        try:
            trainer.fit(checkpoint(missing), on_log)
        except Diverged as error:
            reason = str(error)
        shared |= {"environment": trainer.environment, "history": trainer.history, "engine": trainer.engine}
        shared["seconds"] = round(trainer.seconds / len(missing), 1)
        shared |= {"together": len(missing)} if len(missing) > 1 else {}
        shared |= {"processes": distributed.count()} if distributed.count() > 1 else {}
        for number, e in enumerate(missing if trainer.writes else ()):
            start = time.perf_counter()
            record = found[e.name] = _record(e, trainer, dataset, number, reason) | shared
            record["evaluation_seconds"] = round(time.perf_counter() - start, 1)
            if record["status"] == "done":
                pictures.write(folder, e, evaluated(trainer, number), dataset, chosen)
        for e in missing if trainer.writes else ():  # last and at once: who finds some trains only the others again
            records.write(folder, found[e.name])
        found = distributed.from_first(found)
    return list(found.values())


def run_all(experiments: Sequence[Experiment], *options: Any) -> list[records.Record]:
    r"""The experiments of one method, together where that is possible, one by one where it is not."""
    if stackable(experiments[0]) and distributed.count() == 1:
        return run_together(experiments, *options)
    return [run(experiment, *options) for experiment in experiments]


def stackable(experiment: Experiment) -> bool:
    r"""Whether seeds of this experiment are trained as one: plain nets on points, and a separable objective."""
    nets = experiment.nets
    plain = {nets.norm, nets.critic_norm} <= {"none", "batch"} and nets.encoder in ("gaussian", "implicit", "planar")
    plain = plain and nets.components == 1 and not (nets.spectral or experiment.training.patience)
    return experiment.dataset in MIXTURES and plain and methods.METHODS[experiment.method].separable


def checkpoint(experiments: Sequence[Experiment]) -> Path:
    r"""Where experiments that are trained as one keep their state."""
    return data.cache() / "runs" / f"{experiments[0].name}-{len(experiments)}.pt"


def finished(experiment: Experiment, folder: Path) -> records.Record | None:
    r"""The record of an experiment, if there is one. Raises UserError if it is damaged or of other defaults."""
    done = records.read(folder, experiment.dataset, experiment.name)
    flat = experiment.flat()  # a key that is newer than the record had its present default
    if done is not None and done["experiment"] != {key: flat.get(key) for key in done["experiment"]}:
        both = f"{records.path(folder, experiment.dataset, experiment.name)} and {checkpoint([experiment])}"
        raise UserError(f"record {experiment.name} was made with other defaults; to run again delete {both}")
    return done


def _record(
    experiment: Experiment, trainer: Trainer, dataset: data.Dataset, number: int, reason: str
) -> records.Record:
    values = {} if reason else evaluate(experiment, trainer, dataset, number)
    if infinite := [key for key, value in values.items() if not math.isfinite(value["value"])]:
        values, reason = {}, f"training diverged: {', '.join(infinite)} not finite; lower lr or raise penalty"
    outcome = {"status": "diverged", "reason": reason} if reason else {"status": "done"}
    described = {"experiment": experiment.flat(), "changes": experiment.changes}
    return {"name": experiment.name} | outcome | described | {"metrics": values}
