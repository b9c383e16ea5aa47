"""Classifiers that resume and are kept small, and what is measured with their features, against other people's code."""

import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import svae_lib._torchvision  # noqa: F401  (before whatever imports torchvision)
from svae_lib import classifier, cli, data, evaluation, levels, metrics, quality, records
from svae_lib.data import Dataset, Split
from svae_lib.errors import UserError

CPU = torch.device("cpu")


def draws(count, dim, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mix + shift


# Distances -----------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_on_the_axes_is_in_closed_form():
    """(m_a − m_b)² + (σ_a − σ_b)² for each coordinate."""
    x = torch.tensor([-1.0, 1.0]).double()
    corners = torch.cartesian_prod(x, x)  # uncorrelated, variance 4/3 with n − 1
    a, b = corners * torch.tensor([1.0, 2.0]), corners * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -2.0])
    expected = 1 + 4 + 4 / 3 * ((1 - 3) ** 2 + (2 - 0.5) ** 2)
    assert quality.frechet_distance(a, b).item() == pytest.approx(expected)
    assert quality.frechet_distance(a, a).item() == pytest.approx(0.0, abs=1e-9)


class Given(nn.Module):
    """Features as they are, for torchmetrics."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


def test_distances_are_torchmetrics_fid_and_kid():
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Given(12))
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = draws(300, 12), draws(200, 12, seed=1, shift=0.3)
    fid.set_dtype(torch.float64)
    for x, real in ((a, True), (b, False)):
        fid.update(x.double(), real)
    assert_close(quality.frechet_distance(a, b), fid.compute().double(), rtol=1e-4, atol=1e-4)
    whole = quality.kernel_distance(a[:200], b, subsets=2, size=200)["value"]
    assert whole == pytest.approx(kid.poly_mmd(a[:200].double(), b.double()).item(), rel=1e-4)


def test_distances_and_score_are_torch_fidelitys():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = draws(300, 12), draws(200, 12, seed=1, shift=0.3)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    assert quality.frechet_distance(a, b).item() == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    kid = kid_features_to_metric(a[:200].double(), b.double(), kid_subsets=1, kid_subset_size=200, verbose=False)
    ours = quality.kernel_distance(a[:200], b, subsets=2, size=200)["value"]
    assert ours == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-4)
    logits = 2 * draws(300, 10, seed=2)
    score = metrics.classifier_score(lambda x: x.log_softmax(1), logits, splits=3)
    isc = isc_features_to_metric(logits, splits=3, shuffle=False)
    assert score["value"] == pytest.approx(isc["inception_score_mean"], rel=1e-4)


def test_kernel_distance_of_a_distribution_to_itself_is_zero_within_its_error():
    x = draws(2_000, 5)
    same, other = x[:1_000], x[1_000:]
    near = quality.kernel_distance(same, other, subsets=20, size=200)
    far = quality.kernel_distance(same, other + 0.5, subsets=20, size=200)
    assert abs(near["value"]) < 6 * near["se"] < far["value"]  # subsets overlap: their error is a little small


def test_published_measures_are_asked_for_and_their_absence_is_one_sentence(monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity")
    images, asked = torch.zeros(20, 3, 8, 8, dtype=torch.uint8), {}

    def calculate(**how):
        asked.update(how)
        score = {"inception_score_mean": 2.0, "inception_score_std": 0.1}
        kernel = {"kernel_inception_distance_mean": 0.5, "kernel_inception_distance_std": 0.2}
        return score | kernel | {"frechet_inception_distance": 30.0}

    monkeypatch.setattr(fidelity, "calculate_metrics", calculate)
    found = quality.inception(images, images[:10])
    assert {name: metric["value"] for name, metric in found.items()} == {"is": 2.0, "fid": 30.0, "kid": 0.5}
    assert len(asked["input1"]) == 20 and asked["input1"][0].dtype == torch.uint8 and asked["kid_subset_size"] == 10

    def offline(**_):
        raise OSError("no route")

    monkeypatch.setattr(fidelity, "calculate_metrics", offline)
    with pytest.raises(UserError, match="need the Inception weights and failed"):
        quality.inception(images, images)


# Images --------------------------------------------------------------------------------------------------


def test_degradations_by_hand():
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 1] = 90
    assert torch.equal(quality.blur(image), torch.full_like(image, 10))
    grey = torch.full((1, 1, 100, 100), 128, dtype=torch.uint8)
    assert quality.noise(grey).float().std().item() == pytest.approx(25.5, rel=0.05)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two classes that a line tells apart, under the name of a set whose classifier is kept, in the test's folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "results_folder", lambda chosen=None: tmp_path)
    monkeypatch.setattr(classifier, "BATCH", 16)
    monkeypatch.setattr(classifier, "EPOCHS", {"cifar10": 3})
    images = torch.randint(40, 90, (96, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(96) % 2
    images[labels == 1] += 100
    parts = (Split(images[a:b], labels[a:b]) for a, b in ((0, 64), (64, 80), (80, 96)))
    dataset = Dataset("cifar10", *parts)
    monkeypatch.setattr(data, "load", lambda name: dataset)
    return dataset


def test_training_resumes_in_the_same_bits(small, tmp_path):
    whole = classifier.train_classifier(small, CPU)
    said = []

    def stop(epoch, epochs, accuracy):
        said.append((epoch, epochs))
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classifier.train_classifier(small, CPU, 0, tmp_path / "begun.pt", stop)
    again = classifier.train_classifier(small, CPU, 0, tmp_path / "begun.pt")
    assert said == [(1, 3), (2, 3)]
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_fewer_images_than_a_batch_are_one_batch(monkeypatch):
    full = data.load("patches64")
    parts = (Split(s.images[..., :8, :8].contiguous(), s.labels) for s in (full.train, full.validation, full.test))
    patches = Dataset("patches64", *parts)
    assert len(patches.train) < classifier.BATCH
    monkeypatch.setitem(classifier.EPOCHS, "patches64", 2)
    trained = classifier.train_classifier(patches, CPU)
    assert torch.isfinite(trained(levels.grey(patches.test.images))).all()


def test_the_command_trains_once_keeps_a_small_file_and_reports(small, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="no classifier of cifar10 yet; run `svae classifier cifar10`"):
        classifier.load_classifier(small, CPU)
    monkeypatch.setitem(classifier.EPOCHS, "cifar10", 12)  # with room to tell both classes apart
    command = ["classifier", "cifar10", "--device", "cpu", "--results", str(tmp_path)]
    assert cli.main(command) == 0
    kept = tmp_path / "classifiers" / "cifar10.safetensors"
    assert kept.stat().st_size < 3e6 and not list((tmp_path / "cache").rglob("*begun*"))
    report = json.loads((tmp_path / "classifier-cifar10.json").read_text())
    assert report["metrics"]["test_accuracy"]["value"] == 1.0
    assert report["metrics"]["class_missing_score"]["value"] == pytest.approx(1.0, abs=0.05)
    assert report["metrics"]["test_score"]["value"] > report["metrics"]["class_missing_score"]["value"] + 0.1
    assert report["metrics"]["noise_fcd"]["value"] > report["metrics"]["test_fcd"]["value"]
    shown = quality.ruler(report)
    assert list(shown.columns) == ["score", "FCD", "KCD"] and list(shown.index) == list(quality.RULER.values())
    assert shown.loc["test, noise of 0.1", "FCD"] == round(report["metrics"]["noise_fcd"]["value"], 2)
    written = kept.stat().st_mtime_ns
    assert cli.main(command) == 0 and kept.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("test_accuracy") == 2
    assert classifier.accuracy(classifier.load_classifier(small, CPU), small.test) == 1.0
    monkeypatch.setattr(records, "results_folder", lambda chosen=None: tmp_path)
    real = evaluation.real_data(small, CPU)
    assert real.pop("classifier_accuracy") == 1.0
    assert real == {key: report["metrics"][f"test_{key}"] for key in ("score", "fcd", "kcd")}


def test_a_record_of_natural_images_has_score_and_distances(small):
    net = classifier.new_classifier(small).eval()
    values = quality.quality(net, small.test.images, quality.features(net, quality.reference(small, CPU)))
    assert set(values) == {"score", "fcd", "kcd"} <= set(records.columns("cifar10"))
    assert all(math.isfinite(value["value"]) for value in values.values())


def test_sets_that_lie_by_class_are_mixed(small):
    count = len(small.train)
    by_class = data.Split(small.train.images, torch.arange(count) // (count // 10))
    lying = data.Dataset("tiny_imagenet", by_class, small.validation, small.test)
    assert torch.equal(quality.in_mixed_order(small), torch.arange(count))
    rows = quality.in_mixed_order(lying)
    assert torch.equal(rows.sort().values, torch.arange(count))
    assert len(by_class.labels[rows[: count // 2]].unique()) == len(by_class.labels.unique())
    assert torch.equal(quality.reference(lying, CPU), small.train.images[rows[: count // 2]])


def test_half_precision_costs_nothing(small):
    net = classifier.train_classifier(small, CPU)
    classifier.keep(net, small.name)
    kept = classifier.load_classifier(small, CPU)
    x = levels.grey(small.test.images)
    assert_close(kept(x).exp(), net(x).exp(), rtol=0, atol=2e-3)


def test_a_damaged_kept_classifier_is_one_sentence(small):
    classifier.keep(classifier.train_classifier(small, CPU), small.name)
    file = classifier.kept_file(small.name)
    file.write_bytes(file.read_bytes()[:1_000])
    with pytest.raises(UserError, match="cifar10.safetensors is damaged") as caught:
        classifier.load_classifier(small, CPU)
    assert "\n" not in str(caught.value)


def test_crops_and_flips_show_the_same_image():
    """What a crop shows, somewhere inside the mirrored border, is in the image; whole images are only flipped."""
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(2_000, 3, 8, 8)
    seen = classifier.Residual.augment(x, torch.Generator().manual_seed(0))
    assert seen.shape == x.shape and set(seen.unique().tolist()) <= set(range(64))
    centre = seen[:, 0, 4, 4]
    assert {27.0, 28.0, 35.0, 36.0} <= set(centre.tolist())
    rises = (seen[:, 0, 4, 5] > centre).float().mean()
    assert abs(rises - 0.5) < 4 * 0.5 / 2_000**0.5  # half are flipped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a classifier on a graphics card needs a CUDA device")
def test_a_classifier_on_a_graphics_card_learns_and_measures_as_on_the_cpu(small):
    device = torch.device("cuda")
    net = classifier.train_classifier(small, device)
    assert classifier.accuracy(net, small.test.to(device)) == 1.0
    on_card = quality.features(net, small.test.images.to(device))
    assert_close(quality.features(net.cpu(), small.test.images), on_card, rtol=1e-2, atol=1e-2)
