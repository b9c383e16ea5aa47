"""The pictures beside a record show what they say."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from svae_lib import data, experiment, metrics, pictures
from svae_lib.experiment import Experiment

CPU = torch.device("cpu")


def test_the_nearest_image_is_found_across_blocks():
    among = torch.randint(256, (4_500, 3, 4, 4), dtype=torch.uint8)
    rows = torch.tensor([3, 2_000, 4_499])
    close = among[rows].float().add(2).clamp(max=255).to(torch.uint8)  # not the image itself, but nothing is nearer
    assert torch.equal(pictures.nearest(close, among), among[rows])
    for image, found in zip(close, pictures.nearest(close, among[:1_000]), strict=True):
        distance = (among[:1_000].float() - image.float()).square().sum((1, 2, 3))
        assert torch.equal(found, among[distance.argmin()])


def tiles(path, side=8):
    """The grey images of a picture, which a pixel separates; (rows, columns, 1, side, side)."""
    pixels = torch.from_numpy(np.array(Image.open(path)))[1:, 1:, 0]
    cells = pixels.unflatten(1, (-1, side + 1)).unflatten(0, (-1, side + 1)).transpose(1, 2)
    return cells[:, :, None, :side, :side]


@pytest.mark.parametrize("method, kinds", [("vae", 4), ("dcgan", 2)])
def test_pictures_of_a_run(tmp_path, method, kinds):
    digits, e = data.load("digits"), Experiment.make("digits", method, updates=1)
    players = experiment.prepare(e, digits, CPU).evaluated_players()
    pictures.write(tmp_path, e, players, digits, CPU)
    written = {path.name.removeprefix(f"{e.name}."): path for path in (tmp_path / "digits").iterdir()}
    names = [f"{k}.png" for k in ("samples", "neighbours", "reconstructions", "interpolations")[:kinds]]
    assert sorted(written) == sorted(names)
    samples, (drawn, alike) = tiles(written["samples.png"]), tiles(written["neighbours.png"])
    assert samples.shape[:2] == (8, 8) and torch.equal(drawn, samples.flatten(0, 1)[:10])
    assert torch.equal(alike, pictures.nearest(drawn, digits.train.images))
    if method == "vae":
        shown, again = tiles(written["reconstructions.png"])
        assert torch.equal(shown, digits.test.images[:10])
        x_hat = metrics.reconstruct(**players, images=shown)
        assert_close(again.float(), 255 * x_hat, rtol=0, atol=0.51)  # rounded to a level


def test_a_way_between_two_images_begins_and_ends_at_their_reconstructions():
    patches, e = data.load("patches32"), Experiment.make("patches32", "vae")
    players = experiment.prepare(e, patches, CPU).evaluated_players()
    axis, x = e.nets.axis, patches.test.images
    with torch.no_grad():
        way = pictures.interpolate(players, x[:2], x[2:4], axis).unflatten(0, (2, -1))
    for end, images in ((0, x[:2]), (-1, x[2:4])):
        assert_close(way[:, end], metrics.reconstruct(**players, images=images, axis=axis), atol=1e-5, rtol=0)
    assert not torch.equal(way[:, 0], way[:, 1])
