"""Sets on disk: sources read right, converted whole or not at all, drawn from without filling the memory."""

import hashlib
import io
import mmap
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from svae_lib import arrays, cli, data, evaluation, experiment, imagenet
from svae_lib.classifier import Classifier
from svae_lib.errors import UserError

SUBSETS = [*data.root().glob("tiny-imagenet-200"), *data.root().glob("tiny-imagenet-200*.zip")]
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("SVAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def save(path, level, size=(64, 64), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level, 2 * level, 3 * level)).save(path, "JPEG", quality=95)


@pytest.fixture
def tiny(root):
    """Tiny ImageNet's layout: two classes with ten images each, one of them grey, and three for validation."""
    top = root / "tiny-imagenet-200"
    for label, kind in enumerate(("n01443537", "n01629819")):
        for number in range(10):
            path = top / "train" / kind / "images" / f"{kind}_{number}.JPEG"
            save(path, 40 * label + number, mode="L" if (label, number) == (1, 4) else "RGB")
        (top / "train" / kind / f"{kind}_boxes.txt").write_text("n_0.JPEG\t0\t0\t63\t63\n")
    for number in range(3):
        save(top / "val" / "images" / f"val_{number}.JPEG", 80)
        save(top / "test" / "images" / f"test_{number}.JPEG", 85)
    kinds = ("n01629819", "n01443537", "n01629819")
    rows = [f"val_{number}.JPEG\t{kind}\t0\t32\t44\t62\n" for number, kind in enumerate(kinds)]
    (top / "val" / "val_annotations.txt").write_text("".join(rows))
    return top


def zipped(folder):
    """The same files as a zip archive instead of a folder."""
    target = folder.with_name(f"{folder.name}-subset.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    folder.rename(folder.parent / "elsewhere")
    return target


@pytest.mark.parametrize("as_zip", [False, True])
def test_layout_of_tiny_imagenet(tiny, as_zip):
    if as_zip:
        zipped(tiny).rename(tiny.with_suffix(".zip"))
        (tiny.parent / "tiny-imagenet-200-part.zip").write_text("not looked at, for the whole is there")
    assert "18 train, 2 validation, 3 test samples of shape (3, 64, 64), verified" in data.fetch("tiny_imagenet")
    d = data.load("tiny_imagenet")
    assert d.train.labels.tolist() == [0] * 9 + [1] * 9 and d.test.labels.tolist() == [1, 0, 1]
    levels = d.train.images.float().mean((2, 3))  # JPEG rounds
    torch.testing.assert_close(levels[8], torch.tensor([8.0, 16, 24]), atol=2, rtol=0)
    torch.testing.assert_close(levels[13], torch.full((3,), 44.0), atol=2, rtol=0)  # the grey one
    level = d.validation.images[1].float().mean((1, 2))
    torch.testing.assert_close(level, torch.tensor([49.0, 98, 147]), atol=2, rtol=0)
    assert d.test.images[:, 0].float().mean() == pytest.approx(80, abs=2)


def batch(path, seed, size=64, **changes):
    """One file of the downsampled archives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, 12_288), np.uint8)
    labels = [1 + (seed + n) % 1_000 for n in range(size)]
    content = pickle.dumps({"data": pixels, "labels": labels, "mean": pixels.mean(0)} | changes, protocol=3)
    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # as NumPy 1 wrote it
    path.write_bytes(content)
    return pixels


@pytest.fixture
def archives(root):
    folder = root / "imagenet64"
    folder.mkdir()
    for number in range(1, 11):
        batch(folder / f"train_data_batch_{number}", number)
    batch(folder / "val_data", 0)
    return folder


def test_layout_of_the_downsampled_archives(archives):
    assert "635 train, 5 validation, 64 test samples" in data.fetch("imagenet64")
    d = data.load("imagenet64")
    second = batch(archives / "again", 2)  # the 64th to 127th training image; the 127th, counted from 0, is held out
    assert torch.equal(d.train.images[64:127].flatten(1), torch.from_numpy(second[:-1]))
    assert torch.equal(d.validation.images[0].flatten(), torch.from_numpy(second[-1]))
    assert d.train.labels[64:67].tolist() == [2, 3, 4] and d.test.labels[:3].tolist() == [0, 1, 2]
    assert d.test.images[5, 1, 2, 3] == batch(archives / "again", 0)[5, 4_096 + 2 * 64 + 3]


def test_imagenet_folder_is_resized_by_a_box_filter(root):
    for kind in ("n01", "n02"):
        for number in range(64):
            save(root / "imagenet" / "train" / kind / f"{kind}_{number}.JPEG", 60, size=(70, 64))
    striped = np.zeros((256, 128, 3), np.uint8)
    striped[::4] = 200  # every box of 4 × 2 has the mean 50
    (root / "imagenet" / "val" / "n02").mkdir(parents=True)
    Image.fromarray(striped).save(root / "imagenet" / "val" / "n02" / "x.png")
    data.fetch("imagenet64")
    d = data.load("imagenet64")
    assert [len(s) for s in (d.train, d.validation, d.test)] == [127, 1, 1] and d.test.labels.tolist() == [1]
    assert set(d.test.images.unique().tolist()) == {50}


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet64"])
def test_a_missing_source_is_explained(root, name, capsys):
    assert cli.main(["data", name]) == 2
    message = capsys.readouterr().err
    assert str(root) in message and ("image-net.org" if name == "imagenet64" else "zip") in message
    with pytest.raises(UserError, match=f"run `svae data {name}`"):
        data.load(name)


def test_tiny_imagenet_is_downloaded_whole_or_not_at_all(tiny, monkeypatch):
    import svae_lib._torchvision  # noqa: F401, I001  (must come before torchvision)
    from torchvision.datasets import utils

    def download(url, root, name, md5):
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, name).write_bytes(content[: None if online else 999])
        if not online:
            raise RuntimeError("the line is dead")

    content, online = zipped(tiny).read_bytes(), False
    monkeypatch.setattr(utils, "download_url", download)
    monkeypatch.delenv("SVAE_DATA")
    with pytest.raises(UserError, match="could not be downloaded .the line is dead.; put http"):
        data.fetch("tiny_imagenet")
    assert not [path for path in data.cache().rglob("*") if path.is_file()]
    online = True
    assert "18 train" in data.fetch("tiny_imagenet")
    assert (data.root() / "tiny-imagenet-200.zip").read_bytes() == content


TINY_FAULTS = {
    "cut image": "no readable image",
    "no annotations": "val_annotations.txt in .* is missing",
    "unknown class": "does not fit",
    "missing image": "val_1.JPEG in .* is missing",
    "cut zip": "not a complete",
    "altered zip": "damaged",
    "no images": "too few images for the (train|validation) split",
}


@pytest.mark.parametrize("fault", TINY_FAULTS)
def test_a_damaged_tiny_imagenet_leaves_nothing(tiny, fault):
    table = tiny / "val" / "val_annotations.txt"
    if fault == "cut image":
        victim = next(tiny.rglob("*_7.JPEG"))
        victim.write_bytes(victim.read_bytes()[:-90])
    elif fault == "no annotations":
        table.unlink()
    elif fault == "unknown class":
        table.write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    elif fault == "missing image":
        (tiny / "val" / "images" / "val_1.JPEG").unlink()
    elif fault == "no images":
        (tiny / "train").rename(tiny / "elsewhere")
        table.write_text("")
    else:
        archive = zipped(tiny)
        content = archive.read_bytes()
        middle = content.rindex(b"\xff\xda") + 20  # in the pixels of the last image
        cut, altered = content[:-30], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        archive.write_bytes(cut if fault == "cut zip" else altered)
    with pytest.raises(UserError, match=TINY_FAULTS[fault]):
        data.fetch("tiny_imagenet")
    assert not list(data.cache().rglob("*.npy"))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


BATCH_FAULTS = {
    "missing": "train_data_batch_7 is missing",
    "cut": "damaged, or no part",
    "few labels": "damaged, or no part",
    "label 0": "damaged, or no part",
    "32 x 32": "damaged, or no part",
    "floats": "damaged, or no part",
    "runs": "asks to run",
}


@pytest.mark.parametrize("fault", BATCH_FAULTS)
def test_a_damaged_archive_leaves_nothing(archives, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    victim = archives / "train_data_batch_7"
    changes = {
        "few labels": {"labels": [1]},
        "label 0": {"labels": [0] * 64},
        "32 x 32": {"data": np.zeros((64, 3_072), np.uint8)},
        "floats": {"data": np.zeros((64, 12_288))},
        "runs": {"mean": Attack()},
    }
    batch(victim, 7, **changes.get(fault, {}))
    if fault == "cut":
        victim.write_bytes(victim.read_bytes()[:-500_000])
    elif fault == "missing":
        victim.unlink()
    with pytest.raises(UserError, match=BATCH_FAULTS[fault]):
        data.fetch("imagenet64")
    assert not list(data.cache().rglob("*.npy")) and not (tmp_path / "attacked").exists()


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(archives, monkeypatch):
    def interrupted(path):
        yield from blocks(path)
        if path.name == "train_data_batch_4":
            assert list(data.cache().rglob("train.npy")), "it was at work"
            raise KeyboardInterrupt

    blocks = imagenet._batch
    monkeypatch.setattr(imagenet, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.fetch("imagenet64")
    assert not list(data.cache().rglob("*.npy"))
    monkeypatch.setattr(imagenet, "_batch", blocks)
    killed = imagenet.folder("imagenet64").with_name("imagenet64.unfinished")
    killed.mkdir(parents=True)
    (killed / "rubbish").write_text("left by a conversion that was killed")
    data.fetch("imagenet64")
    names = [path.name for path in imagenet.folder("imagenet64").parent.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(["SHA256SUMS", *(f"{s}{w}.npy" for s in arrays.SPLITS for w in ("", "_labels"))])


def test_a_full_disk_is_one_sentence(archives, monkeypatch):
    monkeypatch.setattr(arrays, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        data.fetch("imagenet64")
    assert not imagenet.folder("imagenet64").exists()


@pytest.mark.parametrize("victim", ["train.npy", "train_labels.npy", "SHA256SUMS"])
@pytest.mark.parametrize("fault", ["altered", "cut", "emptied", "missing"])
def test_damaged_arrays_are_refused(archives, victim, fault):
    data.fetch("imagenet64")
    path = imagenet.folder("imagenet64") / victim
    content = path.read_bytes()
    path.unlink()
    if fault != "missing":
        middle = len(content) // 2
        altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"altered": altered, "cut": content[:-4_096], "emptied": b""}[fault])
    check = data.fetch if victim == "SHA256SUMS" else data.load  # the latter trusts files older than their checksum
    with pytest.raises(UserError, match="is damaged; delete it and run `svae data imagenet64`"):
        check("imagenet64")


def test_a_change_that_hides_its_date_is_found_by_the_thorough_check(archives):
    data.fetch("imagenet64")
    path = imagenet.folder("imagenet64") / "train.npy"
    with path.open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        last = file.read(1)
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(0, 0))
    data.load("imagenet64")
    with pytest.raises(UserError, match="is damaged"):
        data.fetch("imagenet64")


def test_the_checksum_file_is_the_customary_one(archives):
    data.fetch("imagenet64")
    folder = imagenet.folder("imagenet64")
    digest = hashlib.sha256((folder / "test.npy").read_bytes()).hexdigest()
    assert f"{digest}  test.npy" in (folder / "SHA256SUMS").read_text().splitlines()


def test_runs_from_disk_equal_runs_from_memory(archives, monkeypatch):
    judge = Classifier(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10)).eval()
    monkeypatch.setattr(evaluation, "load_classifier", lambda *_: judge)
    data.fetch("imagenet64")
    mapped = data.load("imagenet64")
    splits = (mapped.train, mapped.validation, mapped.test)
    in_memory = data.Dataset("imagenet64", *(data.Split(s.images.clone(), s.labels) for s in splits))
    ends = []
    for dataset in (mapped, in_memory):
        changes = {"updates": 2, "batch": 4, "log_every": 2, "architecture": "a1", "z_dim": 4, "hidden": 8}
        changes |= {"iw_samples": 2, "iw_images": 2, "score_samples": 20}
        chosen = experiment.Experiment.make("imagenet64", "vae", **changes)
        trainer = experiment.prepare(chosen, dataset, CPU)
        assert trainer.data.images.data_ptr() == dataset.train.images.data_ptr(), "the CPU copies nothing"
        trainer.fit()
        weights = torch.cat([p.flatten() for p in trainer.model.players.parameters()])
        ends.append((weights, experiment.evaluate(chosen, trainer, dataset)))
    (mapped_weights, mapped_metrics), (weights, metrics) = ends
    assert torch.equal(mapped_weights, weights) and mapped_metrics == metrics


def test_another_device_gets_all_of_it_or_says_that_it_cannot(archives, monkeypatch):
    data.fetch("imagenet64")
    train = data.load("imagenet64").train
    assert train.to(CPU) is train
    assert train.to(torch.device("meta")).images.shape == train.images.shape

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="do not fit on meta; train with --device cpu"):
        train.to(torch.device("meta"))


def test_images_that_are_too_many_for_a_device_are_sent_batch_by_batch(archives, monkeypatch):
    data.fetch("imagenet64")
    train = data.load("imagenet64").train
    meta = torch.device("meta")
    assert train.near(CPU) is train
    monkeypatch.setattr(arrays.memory, "available", lambda device: 3 * train.images.nbytes)
    assert type(train.near(meta)) is data.Split
    monkeypatch.setattr(arrays.memory, "available", lambda device: train.images.nbytes)
    streamed = train.near(meta)
    assert streamed.draw(5).shape == (5, *imagenet.SHAPE) and streamed.draw(5).device == meta
    here = arrays.Streamed(train.images, train.labels, train, CPU)
    torch.manual_seed(0)
    batches = [here.draw(4), here.draw(4), here.draw(3)]
    torch.manual_seed(0)
    rows = [torch.randint(len(train), (size,)) for size in (4, 4, 4, 3)]  # one of four waits
    for batch, expected in zip(batches, (rows[0], rows[1], rows[3]), strict=True):
        assert torch.equal(batch, train.images[expected])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_sent_to_cuda_arrive_whole(archives):
    data.fetch("imagenet64")
    train, cuda = data.load("imagenet64").train, torch.device("cuda")
    streamed = arrays.Streamed(train.images, train.labels, train, cuda)
    torch.manual_seed(0)
    batches = [streamed.draw(16) for _ in range(50)]
    torch.manual_seed(0)
    for batch in batches:
        assert torch.equal(batch.cpu(), train.images[torch.randint(len(train), (16,))])


def resident():
    """Memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_all_of_imagenet_is_addressed_in_little_memory(tmp_path):
    count, size = 1_281_167, 12_288
    path = tmp_path / "train.npy"
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 64, 64)}
    marked = [0, count - 1, *np.random.default_rng(0).integers(1, count - 1, 20).tolist()]
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(arrays.HEADER + count * size)
        for row in marked:
            file.seek(arrays.HEADER + row * size)
            file.write(np.random.default_rng(row).integers(0, 256, size, np.uint8))
    if path.stat().st_blocks * 512 > 100e6:
        pytest.skip("this file system writes the holes of a file")
    np.save(tmp_path / "train_labels.npy", np.zeros(count, np.int64))
    split = arrays.open_split(path)
    for row in marked:
        expected = np.random.default_rng(row).integers(0, 256, size, np.uint8)
        assert torch.equal(split.take(torch.tensor([row])).flatten(), torch.from_numpy(expected))
    generator = torch.Generator().manual_seed(0)
    before = resident()
    for _ in range(300):
        images = split.take(torch.randint(count, (64,), generator=generator))
    assert images.shape == (64, 3, 64, 64)
    assert resident() - before < 200


@pytest.mark.skipif(not SUBSETS, reason="Tiny ImageNet is not in SVAE_DATA or the user's cache")
def test_tiny_imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SVAE_DATA", str(SUBSETS[0].parent))
    data.fetch("tiny_imagenet")
    d = data.load("tiny_imagenet")
    per_class = [split.labels.bincount() for split in (d.train, d.validation, d.test)]
    for counts in per_class:
        assert len(counts) == 200 and counts.unique().numel() == 1, "every class is equally frequent"
    assert len(d.train) == 9 * len(d.validation) and d.shape == (3, 64, 64)
    mean = d.validation.images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4802, 0.4481, 0.3975]), atol=0.01, rtol=0)  # as often published
