"""Datasets: shapes, splits that do not overlap, verified files, one sentence for every fault."""

import gzip
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from svae_lib import data, levels
from svae_lib.errors import UserError

HAS_MNIST = (data.root() / "MNIST" / "raw").is_dir()
needs_mnist = pytest.mark.skipif(not HAS_MNIST, reason="MNIST is not in SVAE_DATA or the user's cache")

HAS_CIFAR10 = (data.root() / "cifar-10-batches-py").is_dir()


@pytest.mark.parametrize("name, shape", [("digits", (1, 8, 8)), ("patches32", (3, 32, 32)), ("patches64", (3, 64, 64))])
def test_embedded_sets(name, shape):
    d = data.load(name)
    assert d.shape == shape
    for split in (d.train, d.validation, d.test):
        assert split.images.dtype == torch.uint8 and len(split.images) == len(split.labels) > 0
    images = torch.cat([s.images.flatten(1) for s in (d.train, d.validation, d.test)])
    assert images.max() > 200 and images.min() < 50


def test_splits_are_the_same_every_time_and_disjoint():
    a, b = data.load("digits"), data.load("digits")
    assert torch.equal(a.test.images, b.test.images)
    rows = [{bytes(i.numpy().tobytes()) for i in s.images} for s in (a.train, a.validation, a.test)]
    assert len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2]) == 0


@needs_mnist
def test_mnist():
    d = data.load("mnist")
    assert [len(s) for s in (d.train, d.validation, d.test)] == [50_000, 10_000, 10_000]
    assert d.shape == (1, 28, 28) and d.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.skipif(not HAS_CIFAR10, reason="CIFAR-10 is not in SVAE_DATA or the user's cache")
def test_cifar10():
    d = data.load("cifar10")
    assert [len(s) for s in (d.train, d.validation, d.test)] == [40_000, 10_000, 10_000]
    assert d.shape == (3, 32, 32) and d.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert len(d.train.labels.bincount()) == 10 and d.test.labels.bincount().tolist() == [1_000] * 10
    assert d.test.images[0, :, 0, 0].tolist() == [158, 112, 49]  # red, green, blue


def test_binarise_has_the_grey_image_as_its_mean():
    x = torch.tensor([0.0, 0.25, 0.5, 1.0])
    draws = levels.binarise(x.expand(40_000, 4), torch.Generator().manual_seed(0))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.all((draws.mean(0) - x).abs() <= 4 * (x * (1 - x) / 40_000).sqrt())


def test_unknown_dataset():
    with pytest.raises(UserError, match="unknown dataset 'mnits'; choose one of: digits"):
        data.load("mnits")


def test_missing_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("SVAE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="MNIST is not in .*; put it there, or unset SVAE_DATA and run"):
        data.load("mnist")
    monkeypatch.delenv("SVAE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="MNIST is not in .*; run `svae data mnist`, or set SVAE_DATA"):
        data.load("mnist")


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """MNIST's layout with three images to a file, and checksums that fit."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in data.MNIST_MD5:
        sizes = (3, 28, 28) if "images" in name else (3,)
        values = (np.arange(np.prod(sizes)) % 10).astype(np.uint8)
        content = bytes([0, 0, 8, len(sizes)]) + np.array(sizes, ">i4").tobytes() + values.tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(data.MNIST_MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.setenv("SVAE_DATA", str(tmp_path))
    return folder


@pytest.mark.parametrize("fault, message", [("truncated", "cannot be unpacked"), ("altered", "wrong checksum")])
def test_damaged_mnist(small_mnist, fault, message):
    assert data.load("mnist").test.labels.tolist() == [0, 1, 2]
    victim = small_mnist / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    bad = content[:-9] if fault == "truncated" else gzip.compress(gzip.decompress(content)[:-1] + b"\xff")
    victim.write_bytes(bad)
    with pytest.raises(UserError, match=message):
        data.load("mnist")
    assert victim.read_bytes() == bad, "a damaged file is reported, not touched"


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """CIFAR-10's layout with two images to a file, and checksums that fit."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for label, name in enumerate(data.CIFAR10_MD5):
        pixels = (np.arange(2 * 3072) % 256).astype(np.uint8).reshape(2, 3072)
        content = pickle.dumps({b"data": pixels, b"labels": [label] * 2}, protocol=3)
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # as NumPy 1 wrote it
        (folder / name).write_bytes(content)
        monkeypatch.setitem(data.CIFAR10_MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.setenv("SVAE_DATA", str(tmp_path))
    return folder


def test_layout_of_cifar10(small_cifar10):
    d = data.load("cifar10")
    assert [s.labels.tolist() for s in (d.train, d.validation, d.test)] == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4], [5, 5]]
    assert d.test.images.shape == (2, 3, 32, 32) and d.test.images.dtype == torch.uint8
    assert d.test.images[0, 1, 2, 3] == (1024 + 2 * 32 + 3) % 256
    assert "8 train, 2 validation, 2 test samples" in data.fetch("cifar10")


def test_stacked_digits_come_from_where_the_digits_do(tmp_path, monkeypatch):
    asked = []
    monkeypatch.delenv("SVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "_download", lambda name, folder: asked.append(name))
    assert data.fetch("stacked_digits").endswith("inside scikit-learn (no download)") and not asked
    with pytest.raises(UserError, match="MNIST is not in"):
        data.fetch("stacked_mnist")  # nothing came
    assert asked == ["mnist"]


@pytest.mark.parametrize("fault", ["truncated", "altered", "missing"])
def test_damaged_cifar10(small_cifar10, fault):
    victim = small_cifar10 / "data_batch_3"
    content = victim.read_bytes()
    victim.unlink()
    if fault != "missing":
        victim.write_bytes(content[:99] if fault == "truncated" else content[:-9] + b"x" + content[-8:])
    with pytest.raises(UserError, match="is not in.*svae data cifar10" if fault == "missing" else "wrong checksum"):
        data.load("cifar10")


def test_a_pickle_runs_nothing(small_cifar10, monkeypatch, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    genuine = data.CIFAR10_MD5["test_batch"]
    for content in (pickle.dumps({b"data": Attack()}, 3), b"cbuiltins\neval\n(S'1'\ntR."):
        (small_cifar10 / "test_batch").write_bytes(content)
        monkeypatch.setitem(data.CIFAR10_MD5, "test_batch", genuine)
        with pytest.raises(UserError, match="wrong checksum"):
            data.load("cifar10")
        monkeypatch.setitem(data.CIFAR10_MD5, "test_batch", hashlib.md5(content).hexdigest())
        with pytest.raises(UserError, match="asks to run"):
            data.load("cifar10")
    assert not (tmp_path / "attacked").exists()


def test_root_is_decided_by_the_environment(monkeypatch):
    monkeypatch.setenv("SVAE_DATA", "~/somewhere")
    assert data.root() == Path("~/somewhere").expanduser().resolve()
    monkeypatch.delenv("SVAE_DATA")
    assert data.root().parent == data.cache().resolve()


def test_torchvision_imports_after_the_cure():
    import svae_lib._torchvision  # noqa: F401, I001  (must come before torchvision)
    import torchvision

    assert torchvision.datasets.MNIST


def test_stacked_digits_are_three_digits_and_their_label():
    stacked, digits = data.load("stacked_digits"), data.load("digits")
    assert stacked.shape == (3, 8, 8) and len(stacked.test) == len(digits.test)
    pairs = zip(digits.test.images, digits.test.labels.tolist(), strict=True)
    one = {image.numpy().tobytes(): label for image, label in pairs}
    image, label = stacked.test.images[7], int(stacked.test.labels[7])
    assert [one[channel.numpy().tobytes()] for channel in image] == [int(d) for d in f"{label:03d}"]
