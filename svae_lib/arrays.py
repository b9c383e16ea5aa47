r"""Splits on disk: images in a memory map, from which training draws batches without reading the rest.

A folder holds, for each of three splits, SPLIT.npy with images (N, C, H, W) uint8 and SPLIT_labels.npy with (N,) int64,
and their checksums in SHA256SUMS, which `sha256sum -c` understands too.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svae_lib import memory
from svae_lib.data import Split
from svae_lib.errors import UserError

SPLITS = ("train", "validation", "test")
BLOCK = 512  # images in memory at a time
HEADER = 128  # bytes; NumPy leaves room in them for any number of images

Block = tuple[np.ndarray, np.ndarray]  # images (n, C, H, W) uint8, labels (n,)


@dataclass(frozen=True)
class Mapped(Split):
    r"""A split whose images lie in a file. Rows are read when they are drawn, and their memory is given back at once.

    On the CPU nothing is ever copied as a whole. Any other device gets all images of the split, or `to` raises
    UserError if they do not fit. For training they may take half of its memory, else batches are sent (`Streamed`).
    """

    file: mmap.mmap

    def take(self, rows: Tensor) -> Tensor:
        self._advise("MADV_RANDOM")  # else the system reads far more, in case neighbours are wanted
        images = self.images[rows]
        self._advise("MADV_DONTNEED")
        return images

    def to(self, device: torch.device) -> Split:
        if device.type == "cpu":
            return self
        try:
            images = torch.empty(self.images.shape, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            size = self.images.nbytes / 1e9
            raise UserError(f"{size:.1f} GB of images do not fit on {device}; train with --device cpu") from None
        self._advise("MADV_SEQUENTIAL")
        for target, block in zip(images.split(BLOCK), self.images.split(BLOCK), strict=True):
            target.copy_(block)
            self._advise("MADV_DONTNEED")
        return Split(images, self.labels.to(device))

    def near(self, device: torch.device) -> Split:
        if device.type == "cpu" or self.images.nbytes < memory.available(device) / 2:
            return self.to(device)
        return Streamed(self.images, self.labels, self, device)

    def _advise(self, advice: str) -> None:
        """Tell the system how the file is read, and when this process is done with what it has read."""
        if hasattr(mmap, advice):
            self.file.madvise(getattr(mmap, advice))


@dataclass(frozen=True)
class Streamed(Split):
    r"""A split that its device has no room for: a thread reads and sends the next batch while the last is worked on.

    Rows are drawn on the CPU, one batch ahead: a resumed run skips the batch that was waiting.
    """

    mapped: Mapped
    device: torch.device
    waiting: dict[int, Future] = field(default_factory=dict, init=False)  # by the number of images
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)

    def draw(self, count: int) -> Tensor:
        batch = self.waiting.pop(count, None) or self._order(count)
        self.waiting[count] = self._order(count)
        images, sent = batch.result()
        if sent is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(sent)
            images.record_stream(here)  # its memory must not be given away before this stream has read it
        return images

    def _order(self, count: int) -> Future:
        return self.thread.submit(self._send, torch.randint(len(self), (count,)))

    def _send(self, rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        images = self.mapped.take(rows)
        if self.device.type != "cuda":
            return images.to(self.device), None
        with torch.cuda.stream(_sender(self.device)):
            images = images.pin_memory().to(self.device, non_blocking=True)
            return images, torch.cuda.current_stream(self.device).record_event()


@cache
def _sender(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies, which go on beside the work of other streams."""
    return torch.cuda.Stream(device)


# Reading ----------------------------------------------------------------------------------


def read(folder: Path, thorough: bool = False) -> list[Mapped]:
    r"""The three splits of a folder. A file older than its checksum is trusted, unless `thorough`: hashing takes time.

    Raises ValueError, EOFError or OSError if a file is missing or damaged.
    """
    verify(folder, thorough)
    return [open_split(folder / f"{split}.npy") for split in SPLITS]


def open_split(path: Path) -> Mapped:
    r"""Images as a tensor over the memory map of SPLIT.npy, labels from SPLIT_labels.npy.

    Raises ValueError or OSError if the files are not such arrays.
    """
    labels = np.load(path.with_name(f"{path.stem}_labels.npy"))
    with path.open("rb") as opened:
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        if dtype != np.uint8 or shape[:1] != labels.shape:
            raise ValueError(f"{path} holds other arrays")
        start, file = opened.tell(), mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings(action="ignore"):  # torch knows no read-only tensors; nobody writes to this one
        images = torch.frombuffer(file, dtype=torch.uint8, offset=start, count=math.prod(shape))
    return Mapped(images.view(shape), torch.from_numpy(labels), file)


def verify(folder: Path, thorough: bool) -> None:
    r"""Compare the files with SHA256SUMS; raises ValueError or OSError if one is missing or another."""
    sums = folder / "SHA256SUMS"
    digests = dict(reversed(line.split("  ")) for line in sums.read_text().splitlines())
    if set(digests) != {f"{split}{what}.npy" for split in SPLITS for what in ("", "_labels")}:
        raise ValueError(f"{sums} lists other files")
    for name, digest in digests.items():
        newer = (folder / name).stat().st_mtime_ns >= sums.stat().st_mtime_ns
        if (thorough or newer) and _sha256(folder / name) != digest:
            raise ValueError(f"{name} has the wrong checksum")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing ----------------------------------------------------------------------------------


def write(folder: Path, train: Iterable[Block], test: Iterable[Block], held_out: int) -> None:
    r"""Write three splits as the blocks come; every `held_out`-th training image is for validation.

    Raises UserError if a split would be empty.
    """
    with _Writer(folder / "train.npy") as kept, _Writer(folder / "validation.npy") as held:
        start = 0
        for images, labels in train:
            validation = np.arange(start, start + len(labels)) % held_out == held_out - 1
            kept.add(images[~validation], labels[~validation])
            held.add(images[validation], labels[validation])
            start += len(labels)
    with _Writer(folder / "test.npy") as writer:
        for images, labels in test:
            writer.add(images, labels)
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))


class _Writer:
    """Appends images to an .npy file, whose header is written when their number is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.labels = path, []

    def __enter__(self) -> _Writer:
        self.file = self.path.open("wb")
        self.file.seek(HEADER)
        return self

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.shape = images.shape[1:]
        self.file.write(np.ascontiguousarray(images))
        self.labels.extend(labels)

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self.file:
            if kind is not None:
                return
            if not self.labels:
                raise UserError(f"there are too few images for the {self.path.stem} split; is the source complete?")
            np.save(self.path.with_name(f"{self.path.stem}_labels.npy"), np.array(self.labels, np.int64))
            self.file.seek(0)
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.labels), *self.shape)}
            np.lib.format.write_array_header_1_0(self.file, header)
            assert self.file.tell() == HEADER
