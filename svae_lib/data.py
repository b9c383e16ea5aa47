r"""Datasets: one uint8 tensor per split. Embedded ones need no download; MNIST and CIFAR-10 come by torchvision.

Sets too large for memory stay on disk (`svae_lib.arrays`).

The root of the downloadable sets is decided here and nowhere else: `SVAE_DATA` if set, otherwise
the user's cache. With `SVAE_DATA` set nothing is ever downloaded or written there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svae_lib.errors import UserError
from svae_lib.mixtures import MIXTURES

MNIST_MD5 = {  # of the decompressed files; the .gz may have been written by any gzip
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CIFAR10_MD5 = {  # as published
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
STACKED = {"stacked_digits": "digits", "stacked_mnist": "mnist"}  # after Srivastava et al. 2017
NATURAL = ("patches32", "patches64", "cifar10", "tiny_imagenet", "imagenet64")
DOWNLOADS = {"mnist": "MNIST", "cifar10": "CIFAR10"}  # our name -> torchvision's
ON_DISK = ("tiny_imagenet", "imagenet64")


@dataclass(frozen=True)
class Split:
    r"""Images (N, C, H, W) uint8, or points (N, d) float, and integer labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> Tensor:
        r"""The images of these rows."""
        return self.images[rows]

    def draw(self, count: int) -> Tensor:
        r"""`count` random images, with replacement."""
        return self.take(torch.randint(len(self), (count,), device=self.images.device))

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def near(self, device: torch.device) -> Split:
        r"""The split as batches are drawn from it, on a device that need not hold all of it."""
        return self.to(device)


@dataclass(frozen=True)
class Dataset:
    r"""Three disjoint splits. Models are chosen on `validation`; `test` is used once, at the end."""

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        r"""(C, H, W) of one image, or (d,) of one point."""
        return tuple(self.train.images.shape[1:])


def root() -> Path:
    r"""Where downloadable datasets live: `SVAE_DATA`, else `~/.cache/svae_lib/data`."""
    return Path(os.environ.get("SVAE_DATA") or cache() / "data").expanduser().resolve()


def cache() -> Path:
    r"""The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svae_lib"


def load(name: str) -> Dataset:
    r"""The dataset called `name`. Raises UserError if it is unknown, missing or corrupt."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}'; choose one of: {', '.join(DATASETS)}")
    return DATASETS[name]()


def load_images(name: str) -> Dataset:
    r"""The dataset called `name`, which must hold images. Raises UserError as `load` does, and for points."""
    if name in MIXTURES:
        raise UserError(f"{name} holds points, and this needs images")
    return load(name)


def fetch(name: str) -> str:
    r"""Find, or download where that is allowed, convert, and verify a dataset; says where it is and how big."""
    if name in ON_DISK:
        from svae_lib import imagenet

        data, where = imagenet.fetch(name), imagenet.folder(name)
    else:
        source = STACKED.get(name, name)
        if source in DOWNLOADS and not os.environ.get("SVAE_DATA"):
            _download(source, root())
        data = load(name)
        where = root() if source in DOWNLOADS else "drawn" if name in MIXTURES else "inside scikit-learn (no download)"
    sizes = ", ".join(f"{len(getattr(data, s))} {s}" for s in ("train", "validation", "test"))
    return f"{name}: {sizes} samples of shape {data.shape}, verified, {where}"


def _split(name: str, images: np.ndarray, labels: np.ndarray, held_out: int) -> Dataset:
    """Shuffle once with a fixed seed; the last two blocks of `held_out` images are validation and test."""
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = torch.from_numpy(images[order]), torch.from_numpy(labels[order])
    cut = len(images) - 2 * held_out
    bounds = ((0, cut), (cut, cut + held_out), (cut + held_out, len(images)))
    return Dataset(name, *(Split(images[a:b].contiguous(), labels[a:b]) for a, b in bounds))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return _split("digits", images, bunch.target.astype(np.int64), 300)


def _patches(side: int) -> Dataset:
    """Non-overlapping colour patches of scikit-learn's two photographs; the label is the photograph."""
    from sklearn.datasets import load_sample_images

    patches, labels = [], []
    for label, photo in enumerate(load_sample_images().images):
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        tiles = image.unfold(1, side, side).unfold(2, side, side)
        tiles = tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side)
        patches.append(tiles.numpy())
        labels += [label] * len(tiles)
    count = len(labels)
    return _split(f"patches{side}", np.concatenate(patches), np.array(labels), count // 8)


def _stacked(name: str) -> Dataset:
    """Three random images of a set of digits as the three colours of one; its label 0..999 spells their labels."""
    generator, digits = torch.Generator().manual_seed(0), load(STACKED[name])

    def stack(split: Split) -> Split:
        rows = torch.randint(len(split), (len(split), 3), generator=generator)
        return Split(split.images[rows].squeeze(2), split.labels[rows] @ torch.tensor([100, 10, 1]))

    return Dataset(name, *map(stack, (digits.train, digits.validation, digits.test)))


def _points(name: str, train: int) -> Dataset:
    """Draws of a mixture whose modes and density are known."""
    generator = torch.Generator().manual_seed(0)
    splits = (Split(*MIXTURES[name].sample(count, generator)) for count in (train, 2_500, 2_500))
    return Dataset(name, *splits)


def _mnist() -> Dataset:
    folder = root() / "MNIST" / "raw"
    images, labels, test_images, test_labels = (_read_idx(folder, name) for name in MNIST_MD5)
    images, test_images = images[:, None], test_images[:, None]
    return Dataset(
        "mnist",
        Split(images[:50_000], labels[:50_000]),
        Split(images[50_000:], labels[50_000:]),
        Split(test_images, test_labels),
    )


def _way_to(name: str) -> str:
    """What to do about files that are not there: nothing is ever downloaded into a folder of the user's own."""
    if os.environ.get("SVAE_DATA"):
        return f"put it there, or unset SVAE_DATA and run `svae data {name}`"
    return f"run `svae data {name}`, or set SVAE_DATA"


def _read_idx(folder: Path, name: str) -> Tensor:
    """One idx file, plain or gzipped, verified before it is used."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"MNIST is not in {folder.parent.parent}; {_way_to('mnist')}") from None
    except (OSError, EOFError, gzip.zlib.error):
        raise UserError(f"{zipped} cannot be unpacked; delete it and {_way_to('mnist')}") from None
    if hashlib.md5(content).hexdigest() != MNIST_MD5[name]:
        raise UserError(f"{folder / name} has the wrong checksum; delete it and {_way_to('mnist')}")
    dims = content[3]
    shape = np.frombuffer(content, ">i4", dims, 4)
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    tensor = torch.from_numpy(array.copy())
    return tensor if dims == 3 else tensor.long()


def _cifar10() -> Dataset:
    folder = root() / "cifar-10-batches-py"
    *train, validation, test = (_read_batch(folder / name) for name in CIFAR10_MD5)
    joined = Split(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return Dataset("cifar10", joined, validation, test)


def _read_batch(path: Path) -> Split:
    """One batch file of CIFAR-10: verified before it is unpickled, and unpickled into arrays or not at all."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"CIFAR-10 is not in {path.parent.parent}; {_way_to('cifar10')}") from None
    if hashlib.md5(content).hexdigest() != CIFAR10_MD5[path.name]:
        raise UserError(f"{path} has the wrong checksum; delete it and {_way_to('cifar10')}")
    batch = Arrays(io.BytesIO(content), encoding="bytes").load()
    images = torch.from_numpy(batch[b"data"].reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.tensor(batch[b"labels"]))


class Arrays(pickle.Unpickler):
    r"""Unpickles plain containers of numbers, text and NumPy arrays; no other class or function is ever called."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise UserError(f"the data file asks to run {module}.{name}; it is not the published one, delete it")
        return self.allowed[module, name]


def _on_disk(name: str) -> Dataset:
    from svae_lib import imagenet

    return imagenet.load(name)


def _download(name: str, folder: Path) -> None:
    from svae_lib._torchvision import torchvision

    try:
        getattr(torchvision.datasets, DOWNLOADS[name])(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} could not be downloaded to {folder} ({error}); put it there by hand") from None


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "patches32": lambda: _patches(32),
    "patches64": lambda: _patches(64),
    "mnist": _mnist,
    "cifar10": _cifar10,
    "tiny_imagenet": lambda: _on_disk("tiny_imagenet"),
    "imagenet64": lambda: _on_disk("imagenet64"),
    "stacked_digits": lambda: _stacked("stacked_digits"),
    "stacked_mnist": lambda: _stacked("stacked_mnist"),
    "ring8": lambda: _points("ring8", 50_000),
    "grid25": lambda: _points("grid25", 50_000),
    "alice5": lambda: _points("alice5", 2_048),
}
