r"""The classifiers behind the scores of samples: one for each dataset, trained by `svae classifier DATASET`.

`Small` is the architecture that the papers' group published for MNIST: conv 5×5-32, BN, ReLU, pool; conv 5×5-64, pool;
1024, BN, ReLU, dropout; 10. Inputs in [−½, ½]; training images are rotated by up to ±15° and shifted by up to ±2
pixels; Adam 1e-4 there, a one-cycle schedule to 3e-3 here (an order of magnitude fewer epochs). `Residual` is for
natural images. Scores made with either are never called inception scores or FIDs: they compare models with one
another and with real data, not with numbers made with the published Inception net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from svae_lib import data, levels, metrics
from svae_lib.augment import picked
from svae_lib.checkpoints import read_checkpoint, write_checkpoint
from svae_lib.device import usable
from svae_lib.errors import UserError
from svae_lib.files import whole
from svae_lib.records import results_folder

EPOCHS = {"mnist": 12, "digits": 60, "cifar10": 30, "tiny_imagenet": 12, "imagenet64": 3}
BATCH = 128


class Classifier(nn.Module):
    r"""Grey images (B, C, H, W) in [0, 1] -> log-probabilities (B, classes); the last layer of `net` is linear."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        r"""What the last layer sees, (B, width)."""
        return self.net[:-1](x - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5).float().log_softmax(1)


class Small(Classifier):
    r"""The published net for MNIST, with its augmentation."""

    smoothing, precision = 0.0, "fp32"

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(
            nn.Conv2d(shape[0], 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * (shape[1] // 4) * (shape[2] // 4), 1024), nn.BatchNorm1d(1024), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(1024, classes),
        )  # fmt: skip

    def optimiser(self, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimiser = torch.optim.Adam(self.parameters())
        return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)

    @staticmethod
    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        r"""Rotate each image by up to ±15° and shift it by up to ±1/14 of its side (2 pixels of 28)."""
        uniform = 2 * torch.rand(3, len(x), generator=generator).to(x.device) - 1
        angle, shift = uniform[0] * math.radians(15), uniform[1:] / 7  # grid_sample's side is 2
        rows = torch.stack([angle.cos(), -angle.sin(), shift[0], angle.sin(), angle.cos(), shift[1]], 1)
        grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


def _block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity())


class Skip(nn.Module):
    r"""x + two blocks of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Residual(Classifier):
    r"""Eight 3×3 convolutions and a linear layer with two shortcuts, 1.3 million parameters for ten classes.

    Images above 32 pixels are halved once more, after the first convolution.
    Flips and random crops, smoothed labels, SGD with momentum and one cycle of the step size, in bf16.
    Source: after Page 2018, "How to train your ResNet", with fewer channels.
    """

    smoothing, precision = 0.1, "bf16"

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(
            _block(shape[0], 32, pool=shape[1] > 32), _block(32, 64, pool=True), Skip(64), _block(64, 128, pool=True),
            _block(128, 224, pool=True), Skip(224), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(224, classes),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def optimiser(self, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimiser = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, pct_start=0.25)

    @staticmethod
    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        r"""Flip half of the images, and move each by up to 1/8 of its side; what comes in is the border's mirror."""
        count, _, height, width = x.shape
        most = height // 8
        flip = torch.rand(count, generator=generator).to(x.device) < 0.5
        row, column = torch.randint(2 * most + 1, (2, count, 1), generator=generator).to(x.device)
        x = F.pad(torch.where(flip[:, None, None, None], x.flip(3), x), [most] * 4, mode="reflect")
        side = torch.arange(max(height, width), device=x.device)
        return picked(x, row + side[:height], column + side[:width])


# Those that come with the book, for they are too costly to be trained unasked; others are in the user's cache.
KEPT: dict[str, type[Classifier]] = {
    "mnist": Small, "cifar10": Residual, "tiny_imagenet": Residual, "imagenet64": Residual
}  # fmt: skip


def new_classifier(dataset: data.Dataset) -> Classifier:
    r"""An untrained net of the kind that fits the dataset."""
    return KEPT.get(dataset.name, Small)(dataset.shape, int(dataset.train.labels.max()) + 1)


# Training -----------------------------------------------------------------------------------------------


def train_classifier(
    dataset: data.Dataset, device: torch.device, seed: int = 0, begun: Path | None = None,
    say: Callable[[int, int, float], None] | None = None,
) -> Classifier:  # fmt: skip
    r"""Train on the training split. Deterministic on one machine for a given seed.

    `begun` keeps the state after each epoch and is resumed from; `say` gets epoch, epochs, and the accuracy on the
    first 2,000 validation images.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = new_classifier(dataset).to(device)
        generator = torch.Generator().manual_seed(seed)
        train, epochs = dataset.train.to(device), EPOCHS.get(dataset.name, 20)
        half = usable(net.precision, device) == "bf16"
        few = data.Split(dataset.validation.images[:2_000], dataset.validation.labels[:2_000]).to(device)
        optimiser, schedule = net.optimiser(epochs * batches_in(train))
        parts, start = {"net": net, "optimiser": optimiser, "schedule": schedule}, 0
        if begun is not None and begun.exists():
            start = _resume(parts, generator, read_checkpoint(begun))
        for epoch in tqdm(range(start, epochs), desc="classifier", initial=start, total=epochs, disable=None):
            for x, y in _shuffled(train, generator):
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    log_p = net(net.augment(x, generator))
                optimiser.zero_grad()
                F.cross_entropy(log_p, y, label_smoothing=net.smoothing).backward()
                optimiser.step()
                schedule.step()
            if begun is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"epoch": epoch + 1, "random": torch.get_rng_state(), "generator": generator.get_state()}
                write_checkpoint(state, begun)
            if say is not None:
                say(epoch + 1, epochs, accuracy(net.eval(), few))
                net.train()
    return net.eval()


def batches_in(train: data.Split) -> int:
    r"""Whole batches of an epoch; of fewer images than a batch, one of all."""
    return max(1, len(train) // BATCH)


def _shuffled(train: data.Split, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    device = train.labels.device
    order = torch.randperm(len(train), generator=generator).to(device)
    for rows in order.split(BATCH)[: batches_in(train)]:
        yield levels.grey(train.take(rows)), train.labels[rows]


def _resume(parts: dict, generator: torch.Generator, state: dict) -> int:
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    generator.set_state(state["generator"])
    return state["epoch"]


# Kept classifiers ---------------------------------------------------------------------------------------


def kept_file(name: str) -> Path:
    r"""Where the weights that come with the book are, if there are any for this dataset."""
    return results_folder() / "classifiers" / f"{name}.safetensors"


def keep(net: Classifier, name: str) -> Path:
    r"""Write the weights in half precision, which costs no accuracy; returns the path."""
    path = kept_file(name)
    state = {key: v.half() if v.is_floating_point() else v for key, v in net.state_dict().items()}
    with whole(path) as new:
        save_file({key: v.cpu().contiguous() for key, v in state.items()}, new)
    return path


def cached_file(name: str) -> Path:
    r"""Where the user's own classifier of a dataset is, or will be."""
    return data.cache() / f"classifier-{name}.pt"


def make_classifier(dataset: data.Dataset, device: torch.device, say: Callable[[int, int, float], None]) -> None:
    r"""Train the classifier of a dataset, unless there is one; resumes after the last whole epoch."""
    cached = cached_file(dataset.name)
    if kept_file(dataset.name).exists() or cached.exists():
        return
    begun = cached.with_suffix(".begun.pt")
    net = train_classifier(dataset, device, 0, begun, say)
    if dataset.name in KEPT:
        keep(net, dataset.name)
    else:
        write_checkpoint(net.state_dict(), cached)
    begun.unlink(missing_ok=True)


def load_classifier(dataset: data.Dataset, device: torch.device) -> Classifier:
    r"""The classifier of this dataset: the kept one, the cached one, or, if that takes minutes, one trained now.

    Raises UserError if there is none and training takes longer.
    """
    kept, path = kept_file(dataset.name), cached_file(dataset.name)
    if kept.exists():
        try:
            state = load_file(kept)
        except SafetensorError:
            raise UserError(f"{kept} is damaged; have git restore it, or delete it and train it again") from None
    else:
        if not path.exists():
            if dataset.name in KEPT:
                raise UserError(f"there is no classifier of {dataset.name} yet; run `svae classifier {dataset.name}`")
            write_checkpoint(train_classifier(dataset, device).state_dict(), path)
        state = read_checkpoint(path)
    net = new_classifier(dataset)
    try:
        net.load_state_dict(state)
    except RuntimeError:
        file = kept if kept.exists() else path
        raise UserError(f"{file} holds another net than the classifier of {dataset.name}; delete it") from None
    return net.to(device).eval()


@torch.no_grad()
def accuracy(net: Classifier, split: data.Split) -> float:
    r"""Fraction of `split` that is classified correctly."""
    found = torch.cat([net(x).argmax(1) for x in metrics.batches(split.images)])
    return (found == split.labels).float().mean().item()
