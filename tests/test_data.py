"""Datasets: shapes, splits that do not overlap, verified files, one sentence for every fault."""

import gzip
from pathlib import Path

import pytest
import torch

from svae_lib import data
from svae_lib.errors import UserError

HAS_MNIST = (data.root() / "MNIST" / "raw").is_dir()
needs_mnist = pytest.mark.skipif(not HAS_MNIST, reason="MNIST is not in SVAE_DATA or the user's cache")


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


def test_binarise_has_the_grey_image_as_its_mean():
    x = torch.tensor([0.0, 0.25, 0.5, 1.0])
    draws = data.binarise(x.expand(40_000, 4), torch.Generator().manual_seed(0))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.all((draws.mean(0) - x).abs() <= 4 * (x * (1 - x) / 40_000).sqrt())


def test_unknown_dataset():
    with pytest.raises(UserError, match="unknown dataset 'mnits'; choose one of: digits"):
        data.load("mnits")


def test_missing_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("SVAE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="MNIST is not in .*svae data mnist"):
        data.load("mnist")


@needs_mnist
@pytest.mark.parametrize("fault, message", [("truncated", "cannot be unpacked"), ("altered", "wrong checksum")])
def test_damaged_mnist(tmp_path, monkeypatch, fault, message):
    source, target = data.root() / "MNIST" / "raw", tmp_path / "MNIST" / "raw"
    target.mkdir(parents=True)
    for name in data.MNIST_MD5:
        plain = source / name
        content = plain.read_bytes() if plain.exists() else gzip.decompress((source / f"{name}.gz").read_bytes())
        (target / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    victim = target / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    bad = content[:100] if fault == "truncated" else gzip.compress(gzip.decompress(content)[:-1] + b"\xff")
    victim.write_bytes(bad)
    monkeypatch.setenv("SVAE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=message):
        data.load("mnist")
    assert victim.read_bytes() == bad, "a damaged file is reported, not touched"


def test_root_is_decided_by_the_environment(monkeypatch):
    monkeypatch.setenv("SVAE_DATA", "~/somewhere")
    assert data.root() == Path("~/somewhere").expanduser().resolve()
    monkeypatch.delenv("SVAE_DATA")
    assert data.root().parent == data.cache().resolve()


def test_torchvision_imports_after_the_cure():
    import svae_lib._torchvision  # noqa: F401, I001  (must come before torchvision)
    import torchvision

    assert torchvision.datasets.MNIST
