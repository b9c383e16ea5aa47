r"""The pictures beside a record: samples, reconstructions, the training images nearest to samples, ways between codes.

Nobody can see a number. All are made from fixed seeds and the first test images, so those of two runs can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from svae_lib import metrics
from svae_lib.data import Dataset
from svae_lib.levels import Axis, grey

if TYPE_CHECKING:
    from svae_lib.experiment import Experiment

SAMPLES, COLUMNS, STEPS, WAYS = 64, 10, 10, 4


@torch.no_grad()
def write(folder: Path, experiment: Experiment, players: nn.ModuleDict, dataset: Dataset, device: torch.device) -> None:
    r"""Write the pictures of a run as NAME.KIND.png into the folder of its dataset.

    samples: 8 × 8 decoder means at z ~ p(z); neighbours: ten of them over the nearest training images;
    reconstructions: ten test images x over x̂; interpolations: from one test image to another, four times, ten steps.
    The last two need an encoder. Of points it is NAME.draws.npy, 500 draws.
    """
    from svae_lib._torchvision import torchvision

    torch.manual_seed(0)
    stem = folder / experiment.dataset / experiment.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    decoder, nets = players["decoder"], experiment.nets
    if len(dataset.shape) == 1:
        draws = decoder(torch.randn(500, nets.z_dim, device=device)).rsample()
        return np.save(f"{stem}.draws.npy", draws.cpu().numpy())

    def save(kind: str, images: Tensor, columns: int) -> None:
        torchvision.utils.save_image(images.cpu(), f"{stem}.{kind}.png", nrow=columns, padding=1)

    samples = metrics.sample_images(decoder, nets.z_dim, SAMPLES, device, nets.axis)
    save("samples", grey(samples), 8)
    alike = nearest(samples[:COLUMNS], dataset.train.images)
    save("neighbours", grey(torch.cat([samples[:COLUMNS].cpu(), alike])), COLUMNS)
    if "encoder" in players:
        x = dataset.test.images[: max(COLUMNS, 2 * WAYS)].to(device)
        again = metrics.reconstruct(players["encoder"], decoder, x[:COLUMNS], nets.axis)
        save("reconstructions", torch.cat([grey(x[:COLUMNS]), again]), COLUMNS)
        save("interpolations", interpolate(players, x[:WAYS], x[WAYS : 2 * WAYS], nets.axis), STEPS)


def nearest(images: Tensor, among: Tensor) -> Tensor:
    r"""For each of uint8 `images` (N, C, H, W) the one `among` (M, C, H, W) at the smallest Euclidean distance.

    On the CPU and block by block, for the latter may be larger than memory.
    """
    wanted = images.cpu().flatten(1).double()
    best, found = torch.full((len(images),), torch.inf, dtype=torch.float64), torch.zeros(len(images), dtype=torch.long)
    for start in range(0, len(among), 2_000):
        block = among[start : start + 2_000].cpu().flatten(1).double()
        distance, row = torch.cdist(wanted, block).min(1)
        found = torch.where(distance < best, start + row, found)
        best = torch.minimum(distance, best)
    return among[found.to(among.device)].cpu()


def interpolate(players: nn.ModuleDict, a: Tensor, b: Tensor, axis: Axis) -> Tensor:
    r"""Decoder means at (1 − t) μ_φ(a) + t μ_φ(b), 0 ≤ t ≤ 1; uint8 a, b (N, C, H, W) -> grey (N·STEPS, C, H, W)."""
    from_, to = (metrics.proposal(players["encoder"](axis.see(x))).mean for x in (a, b))
    codes = torch.lerp(from_[:, None], to[:, None], torch.linspace(0, 1, STEPS, device=a.device)[None, :, None])
    return axis.back(players["decoder"](codes.flatten(0, 1)).mean)
