r"""The classifier behind the score of samples: the architecture that the papers' group published for MNIST.

conv 5×5-32, BN, ReLU, pool; conv 5×5-64, pool; 1024, BN, ReLU, dropout; 10. Inputs in [−½, ½]; training
images are rotated by up to ±15° and shifted by up to ±2 pixels; Adam 1e-4 there, a one-cycle schedule to
3e-3 here (an order of magnitude fewer epochs). It is trained once per dataset and kept in the user's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from svae_lib import data
from svae_lib.train import read_checkpoint, write_checkpoint

EPOCHS = {"mnist": 6, "digits": 60}


class Classifier(nn.Module):
    r"""Grey images (B, C, H, W) in [0, 1] -> log-probabilities (B, classes)."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(shape[0], 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * (shape[1] // 4) * (shape[2] // 4), 1024), nn.BatchNorm1d(1024), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(1024, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5).log_softmax(1)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    r"""Rotate each image by up to ±15° and shift it by up to ±1/14 of its side (2 pixels of 28)."""
    uniform = 2 * torch.rand(3, len(x), generator=generator).to(x.device) - 1
    angle, shift = uniform[0] * math.radians(15), uniform[1:] / 7  # grid_sample's side is 2
    rows = torch.stack([angle.cos(), -angle.sin(), shift[0], angle.sin(), angle.cos(), shift[1]], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train_classifier(dataset: data.Dataset, device: torch.device, seed: int = 0) -> Classifier:
    r"""Train on the training split. Deterministic on one machine for a given seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = Classifier(dataset.shape, int(dataset.train.labels.max()) + 1).to(device)
        generator = torch.Generator().manual_seed(seed)
        train, epochs, batch = dataset.train.to(device), EPOCHS.get(dataset.name, 20), 128
        steps = epochs * (len(train) // batch)
        optimiser = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        for _ in tqdm(range(epochs), desc="classifier", disable=None):
            order = torch.randperm(len(train), generator=generator).to(device)
            for rows in order.split(batch)[: len(train) // batch]:
                x = augment(data.grey(train.take(rows)), generator)
                loss = F.nll_loss(net(x), train.labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return net.eval()


def load_classifier(dataset: data.Dataset, device: torch.device, seed: int = 0) -> Classifier:
    r"""The cached classifier of this dataset, trained now if there is none yet."""
    path = data.cache() / f"classifier-{dataset.name}-{seed}.pt"
    if not path.exists():
        write_checkpoint(train_classifier(dataset, device, seed).state_dict(), path)
    net = Classifier(dataset.shape, int(dataset.train.labels.max()) + 1)
    net.load_state_dict(read_checkpoint(path))
    return net.to(device).eval()


@torch.no_grad()
def accuracy(net: Classifier, split: data.Split) -> float:
    r"""Fraction of `split` that is classified correctly."""
    images, labels = split.images.split(250), split.labels.split(250)
    hits = [(net(data.grey(x)).argmax(1) == y).float() for x, y in zip(images, labels, strict=True)]
    return torch.cat(hits).mean().item()
