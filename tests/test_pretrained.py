"""Kept models: they are those of their records, and load without data or training."""

import functools
import math

import numpy as np
import pytest
import torch
from common import without_classifier
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svae_lib import classifier, cli, data, evaluation, experiment, levels, metrics, pretrained, records
from svae_lib.device import choose_device
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment

KEPT = pretrained.names()
FIRST = {name.partition("-")[0]: name for name in reversed(KEPT) if "-svae-" in name or "-vae-" in name}


def record_of(name):
    return records.read(records.results_folder(), name.partition("-")[0], name)


@functools.cache
def real(dataset):
    try:
        return data.load(dataset)
    except UserError as error:
        pytest.skip(f"needs data: {error}")


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_the_recorded_metrics_are_found_again(name, monkeypatch):
    dataset = real(name.partition("-")[0])
    model, record = pretrained.load(name, device="cpu"), record_of(name)
    images = pretrained.evenly(dataset.test.images, 500)
    measured = pretrained._measured(model.experiment, model.players, images)
    monkeypatch.setattr(pretrained, "_measured", lambda *_: measured)
    found = pretrained.check(model.experiment, model.players, images, record)
    errors, bounds = {"rmse_grey", "l2"}, {"rate", "elbo_grey", "elbo_dynamic", "bits_closed", "bits_open"}
    assert errors <= set(found) and len(bounds & set(found)) >= 2
    off = record | {"metrics": {k: m | {"value": 1.1 * m["value"]} for k, m in record["metrics"].items()}}
    with pytest.raises(UserError, match="and its record says"):
        pretrained.check(model.experiment, model.players, images, off)


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_the_recorded_score_or_coverage_is_found_again(name):
    model, record = pretrained.load(name, device="cpu"), record_of(name)
    judged = data.STACKED.get(model.experiment.dataset, model.experiment.dataset)
    if not (classifier.kept_file(judged).exists() or classifier.cached_file(judged).exists()):
        pytest.skip(f"there is no trained classifier of {judged}; `svae run {judged} vae` makes one")
    dataset = real(model.experiment.dataset)
    torch.manual_seed(0)
    samples = (model.sample(2_500) * 255).round().to(torch.uint8)
    known = record["metrics"]
    if dataset.name not in data.STACKED:
        found = metrics.classifier_score(classifier.load_classifier(dataset, torch.device("cpu")), samples)
        assert abs(found["value"] - known["score"]["value"]) <= 4 * found["se"]
    else:  # of so few samples the divergence of the modes has a bias of (modes − 1)/2n nats
        found = evaluation._score(dataset, torch.device("cpu"), samples)
        bias = (known["modes"]["value"] - 1) / 2 * (1 / 2_500 - 1 / known["modes"]["n"])
        assert abs(found["mode_kl"]["value"] - known["mode_kl"]["value"] - bias) < 0.1


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_model_draws_the_pictures_of_its_record(name):
    dataset, model = name.partition("-")[0], pretrained.load(name, device="cpu")
    torch.manual_seed(0)
    samples = model.sample(64)
    picture = np.asarray(Image.open(records.results_folder() / dataset / f"{name}.samples.png").convert("RGB"))
    side = samples.shape[-1] + 1  # with its frame
    for number, sample in enumerate(samples):
        row, column = divmod(number, 8)
        tile = picture[row * side + 1 : (row + 1) * side, column * side + 1 : (column + 1) * side]
        wanted = torch.from_numpy(tile.copy()).permute(2, 0, 1) / 255
        assert (sample - wanted).abs().max() < 0.02  # half precision, and one rounding each


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_model_has_a_record_and_is_small_and_rounded_within_its_noise(name):
    record, model = record_of(name), pretrained.load(name, device="cpu")
    assert model.experiment.name == name and record["status"] == "done"
    assert pretrained.path(name).stat().st_size <= 1e6 * pretrained.FILE_MB
    for key, difference in model.rounding.items():
        assert key == "pixel" or difference <= record["metrics"][key]["se"]


def test_all_kept_models_together_are_small():
    assert sum(pretrained.path(name).stat().st_size for name in KEPT) <= 1e6 * pretrained.ALL_MB


# Round trip ---------------------------------------------------------------------------------------------

SMALL = {"updates": 30, "batch": 32, "score_samples": 40, "iw_samples": 4, "iw_images": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run with an average: its folder of records, its record and its trainer's players."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        without_classifier(patch)
        made = Experiment.make("digits", "vae", "quick", "stabilised", **SMALL)
        folder = tmp_path_factory.mktemp("results")
        record = experiment.run(made, "cpu", folder)
        trainer = experiment.prepare(made, data.load("digits"), choose_device("cpu"))
        trainer.fit(experiment.checkpoint([made]))
        yield folder, record, trainer.evaluated_players()


def test_a_run_that_is_kept_comes_back(run, capsys):
    folder, record, players = run
    assert cli.main(["keep", record["name"], "--results", str(folder)]) == 0
    assert "half precision changed elbo_grey by" in capsys.readouterr().out
    state = torch.get_rng_state()
    model = pretrained.load(record["name"], folder, "cpu")
    assert torch.equal(state, torch.get_rng_state())
    for key, value in players.state_dict().items():
        close = torch.allclose(model.players.state_dict()[key], value, rtol=1e-3, atol=1e-6)
        assert close if value.dim() > 1 else torch.equal(model.players.state_dict()[key], value)
    images = data.load("digits").test.images
    error = (model.reconstruct(images) - levels.grey(images)).flatten(1).norm(dim=1).mean().item()
    assert math.isclose(error, record["metrics"]["l2"]["value"], abs_tol=1e-3)
    samples = model.sample(3)
    assert samples.shape == (3, 1, 8, 8) and 0 <= samples.min() and samples.max() <= 1


def test_weights_that_do_not_fit_their_record_are_not_kept(run, tmp_path):
    folder, record, _ = run
    worse = record["metrics"]["l2"] | {"value": 2 * record["metrics"]["l2"]["value"]}
    records.write(tmp_path, record | {"metrics": record["metrics"] | {"l2": worse}})
    with pytest.raises(UserError, match="its record says"):
        pretrained.keep(record["name"], tmp_path)
    assert not pretrained.names(tmp_path)


@pytest.mark.parametrize("limit", ["FILE_MB", "ALL_MB"])
def test_a_large_model_is_refused_and_nothing_is_written(run, limit, tmp_path, monkeypatch):
    _, record, _ = run
    records.write(tmp_path, record)
    monkeypatch.setattr(pretrained, limit, 0.01)
    with pytest.raises(UserError, match=r"would (take|grow to) \d"):
        pretrained.keep(record["name"], tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_what_rounding_would_spoil_is_kept_whole(run, tmp_path):
    _, record, _ = run
    exact = {key: metric | {"se": 1e-12} for key, metric in record["metrics"].items()}
    records.write(tmp_path, record | {"metrics": exact})
    pretrained.keep(record["name"], tmp_path)
    assert pretrained.load(record["name"], tmp_path).rounding == {}
    assert {w.dtype for w in load_file(pretrained.path(record["name"], tmp_path)).values()} == {
        torch.float32, torch.int64,
    }  # fmt: skip


def test_a_damaged_or_foreign_file_is_one_sentence(run, tmp_path):
    folder, record, _ = run
    pretrained.keep(record["name"], folder)
    good, bad = pretrained.path(record["name"], folder), pretrained.path("bad", tmp_path)
    bad.parent.mkdir()
    with safe_open(good, "pt") as opened:
        header = opened.metadata()
    weights = load_file(good)
    for content in (b"", good.read_bytes()[:5_000], b"no weights" * 100):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.safetensors is not a kept model; delete it"):
            pretrained.load("bad", tmp_path)
    save_file(weights, bad)
    with pytest.raises(UserError, match="is not a kept model"):
        pretrained.load("bad", tmp_path)
    save_file(weights, bad, header | {"experiment": '{"dataset": "digits"}'})
    with pytest.raises(UserError, match="is not a kept model"):
        pretrained.load("bad", tmp_path)
    save_file(weights, bad, header | {"shape": "[1, 12, 12]"})
    with pytest.raises(UserError, match="holds other nets than those of digits-vae"):
        pretrained.load("bad", tmp_path)


def test_a_users_error_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    folder, record, _ = run
    pretrained.keep(record["name"], folder)
    model = pretrained.load(record["name"], folder, "cpu")
    with pytest.raises(UserError, match=r"wants uint8 images of shape \(N, \*\(1, 8, 8\)\)"):
        model.reconstruct(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(UserError, match="there is no kept model 'none-such'; choose one of: digits-vae"):
        pretrained.load("none-such", folder)
    with pytest.raises(UserError, match="is not the record of a finished run"):
        pretrained.keep("digits-none-such", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["keep", record["name"], "--results", str(folder)]) == 2
    assert "there is no training checkpoint" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a kept model on a graphics card needs a CUDA device")
def test_a_kept_model_is_the_same_on_a_graphics_card(run):
    folder, record, _ = run
    pretrained.keep(record["name"], folder)
    images = data.load("digits").test.images[:50]
    here, there = (pretrained.load(record["name"], folder, device).reconstruct(images) for device in ("cpu", "cuda"))
    assert there.device.type == "cuda" and torch.allclose(here, there.cpu(), atol=1e-4)


def test_a_gan_has_no_reconstructions():
    gans = [name for name in KEPT if "-dcgan-" in name]
    if not gans:
        pytest.skip("no GAN is kept")
    with pytest.raises(UserError, match="has no encoder"):
        pretrained.load(gans[0], device="cpu").reconstruct(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
