r"""Tiny ImageNet, and ImageNet at 64 × 64, converted once into arrays on disk (`svae_lib.arrays`).

`svae data NAME` reads what is in `data.root()` and writes into the user's cache. Images pass through in blocks, the
folder of arrays appears when it is complete, and sources are never altered.

Test is the official validation set, for the official test sets have no labels. Validation is every tenth (Tiny
ImageNet) or every 128th (ImageNet) training image. Labels are positions in the sorted list of class folders; the
downsampled archives have an order of their own, and keep it: theirs less one.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from svae_lib import arrays, data
from svae_lib.arrays import BLOCK, Block
from svae_lib.errors import UserError

SHAPE = (3, 64, 64)
HELD_OUT = {"tiny_imagenet": 10, "imagenet64": 128}  # one of so many training images is for validation
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

Source = tuple[Iterable[Block], Iterable[Block]]  # training images, test images


def folder(name: str) -> Path:
    r"""Where the arrays of a dataset are."""
    return data.cache() / "arrays" / name


def load(name: str, thorough: bool = False) -> data.Dataset:
    r"""The converted dataset, its checksums compared where a file has changed, or in full if `thorough`.

    Raises UserError if it has not been converted, or is damaged.
    """
    place = folder(name)
    if not place.is_dir():
        raise UserError(f"{name} is not in {place.parent}; run `svae data {name}`")
    try:
        return data.Dataset(name, *arrays.read(place, thorough))
    except (OSError, EOFError, ValueError):
        raise UserError(f"{place} is damaged; delete it and run `svae data {name}`") from None


# Conversion -------------------------------------------------------------------------------


def fetch(name: str) -> data.Dataset:
    r"""Convert the dataset unless that has been done, and compare every byte with the checksums."""
    if not folder(name).exists():
        convert(name)
    return load(name, thorough=True)


def convert(name: str) -> None:
    r"""Write the arrays of a dataset, all or none. Raises UserError if its source is missing, damaged or empty."""
    place = folder(name)
    unfinished = place.with_name(f"{name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
    train, test = SOURCES[name](data.root())
    try:
        unfinished.mkdir(parents=True)
        arrays.write(unfinished, train, test, HELD_OUT[name])
        os.rename(unfinished, place)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# Sources ----------------------------------------------------------------------------------


class _Files:
    """The files of a folder or of a zip archive, by their names inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path) if path.is_file() else None
        except zipfile.BadZipFile:
            raise UserError(f"{path} is not a complete zip archive; fetch it again") from None

    def names(self) -> list[str]:
        if self.zip:
            return sorted(self.zip.namelist())
        walk = os.walk(self.path, followlinks=True)
        return sorted(Path(top, name).relative_to(self.path).as_posix() for top, _, names in walk for name in names)

    def read(self, name: str) -> bytes:
        try:
            return self.zip.read(name) if self.zip else (self.path / name).read_bytes()
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{name} in {self.path} is missing or damaged; fetch or unpack it again") from None

    def image(self, name: str) -> np.ndarray:
        """(3, 64, 64) uint8: grey becomes RGB; another size or shape is scaled whole to the square, by a box filter.

        So were the official archives made (Chrabaszcz et al. 2017).
        """
        from PIL import Image

        content = self.read(name)
        try:
            image = Image.open(io.BytesIO(content)).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise UserError(f"{name} in {self.path} is no readable image; fetch or unpack it again") from None
        if image.size != SHAPE[1:]:
            image = image.resize(SHAPE[1:], Image.Resampling.BOX)
        return np.asarray(image).transpose(2, 0, 1)

    def blocks(self, labelled: list[tuple[str, int]]) -> Iterator[Block]:
        with ThreadPool() as pool, tqdm(total=len(labelled), unit=" images", disable=None) as bar:
            for start in range(0, len(labelled), BLOCK):
                names, labels = zip(*labelled[start : start + BLOCK], strict=True)
                yield np.stack(pool.map(self.image, names)), np.array(labels)
                bar.update(len(names))


def _tiny_imagenet(root: Path) -> Source:
    """The folder tiny-imagenet-200, or its zip archive as it is, or a part of it: any tiny-imagenet-200*.zip."""
    found = [root / "tiny-imagenet-200"] if (root / "tiny-imagenet-200").is_dir() else []
    found += sorted(root.glob("tiny-imagenet-200*.zip"), key=lambda path: len(path.name))  # the whole before a part
    if not found and not os.environ.get("SVAE_DATA"):
        found = [_download(root)]
    if not found:
        raise UserError(f"Tiny ImageNet is not in {root}; put {TINY_URL} there, or unset SVAE_DATA and have it fetched")
    files = _Files(found[0])
    names = files.names()
    matches = [re.search(r"(?:^|/)train/(n\d+)/images/[^/]+\.JPEG$", name) for name in names]
    classes = {name: label for label, name in enumerate(sorted({match[1] for match in matches if match}))}
    train = [(match.string, classes[match[1]]) for match in matches if match]
    table = next((name for name in names if name.endswith("val/val_annotations.txt")), "val/val_annotations.txt")
    try:
        rows = [line.split("\t")[:2] for line in files.read(table).decode().splitlines()]
        test = [(table.replace("val_annotations.txt", f"images/{name}"), classes[kind]) for name, kind in rows]
    except (KeyError, ValueError):
        raise UserError(f"{table} in {found[0]} does not fit the training images; fetch or unpack it again") from None
    return files.blocks(train), files.blocks(test)


def _download(root: Path) -> Path:
    from svae_lib._torchvision import torchvision

    path = root / Path(TINY_URL).name
    unfinished = path.with_suffix(".unfinished")
    try:
        torchvision.datasets.utils.download_url(TINY_URL, str(root), unfinished.name, TINY_MD5)
        return unfinished.rename(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Tiny ImageNet could not be downloaded ({error}); put {TINY_URL} into {root}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _imagenet64(root: Path) -> Source:
    """The downsampled archives, unpacked into imagenet64; else class folders in imagenet/train and imagenet/val."""
    archives, original = root / "imagenet64", root / "imagenet"
    if archives.is_dir():
        *train, test = [archives / f"train_data_batch_{number}" for number in range(1, 11)] + [archives / "val_data"]
        for path in (*train, test):
            if not path.exists():
                raise UserError(f"{path} is missing; unpack all of Imagenet64_train_part1, _part2 and _val there")
        return itertools.chain.from_iterable(map(_batch, train)), _batch(test)
    if not original.is_dir():
        raise UserError(
            f"ImageNet is not in {root}, and its licence does not let us fetch it: register at image-net.org and"
            f" unpack Imagenet64_train_part1.zip, Imagenet64_train_part2.zip and Imagenet64_val.zip into {archives},"
            f" or put the class folders of the full images into {original}/train and {original}/val"
        )
    files = _Files(original)
    matches = [re.match(r"(train|val)/([^/]+)/[^/]+\.(?:jpe?g|png)$", name, re.IGNORECASE) for name in files.names()]
    matches = [match for match in matches if match]
    classes = {name: label for label, name in enumerate(sorted({match[2] for match in matches}))}
    parts = ([(m.string, classes[m[2]]) for m in matches if m[1] == part] for part in ("train", "val"))
    train, test = map(files.blocks, parts)
    return train, test


def _batch(path: Path) -> Iterator[Block]:
    """One file of the downsampled archives: a pickled dictionary, unpickled into arrays or not at all."""
    try:
        with path.open("rb") as file:
            content = data.Arrays(file, encoding="bytes").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = content["data"].reshape(-1, *SHAPE), np.array(content["labels"]) - 1
        fits = images.dtype == np.uint8 and labels.shape == (len(images),) and set(labels) <= set(range(1000))
    except UserError:
        raise
    except Exception:  # a damaged pickle raises any kind
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged, or no part of the downsampled ImageNet; fetch or unpack it again")
    for start in tqdm(range(0, len(images), BLOCK), desc=path.name, disable=None):
        rows = slice(start, start + BLOCK)
        yield images[rows].copy(), labels[rows]  # a view would keep this file's images while the next file is read


SOURCES: dict[str, Callable[[Path], Source]] = {"tiny_imagenet": _tiny_imagenet, "imagenet64": _imagenet64}
