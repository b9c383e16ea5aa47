"""Pixel models: masses that sum to one, no look ahead, exact likelihoods, draws from what they say."""

import math

import pytest
import torch
from torch.distributions import Bernoulli
from torch.testing import assert_close

from svae_lib import data, experiment, metrics
from svae_lib.autoregressive import LogisticMixture, Masked, PixelCNN, PixelRNN, Softmax, levels, skew, unskew
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.levels import grey
from svae_lib.methods import METHODS
from svae_lib.models import build_model

REAL = torch.float64
MODELS = {
    "pixelcnn": lambda shape: PixelCNN(shape, hidden=6, depth=3, components=3),
    "pixelrnn": lambda shape: PixelRNN(shape, hidden=24 if math.prod(shape) > 2 else 6, depth=2),
}
both = pytest.mark.parametrize("kind", MODELS)


def model(kind, shape, size=0.2, dtype=REAL):
    """A small net with weights of the given size, so that everything depends on everything it sees."""
    torch.manual_seed(0)
    made = MODELS[kind](shape).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    return made


def mixture(count, channels, seed=0, components=4):
    """Components from needles to plains, inside and outside of the range of grey."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(), (channels,), (channels,), (channels, channels)]
    logits, centre, log_scale, coupling = (
        torch.randn(1, components, *size, 1, 1, generator=g, dtype=REAL).expand(count, components, *size, 1, 1)
        for size in sizes
    )
    return LogisticMixture(logits, 1.5 * centre, 3 * log_scale - 3, coupling.tanh())


def all_colours(channels):
    ticks = torch.arange(256, dtype=REAL) / 255
    return torch.cartesian_prod(*[ticks] * channels).reshape(-1, channels, 1, 1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_masses_of_all_colours_sum_to_one(channels, seed):
    x = all_colours(channels)
    total = mixture(len(x), channels, seed).log_prob(x).exp().sum()
    assert_close(total, torch.ones((), dtype=REAL), rtol=0, atol=1e-9)
    logits = torch.randn(1, channels, 256, 1, 1, dtype=REAL).expand(len(x), -1, -1, -1, -1)
    assert_close(Softmax(logits).log_prob(x).exp().sum(), torch.ones((), dtype=REAL), rtol=0, atol=1e-9)


def test_the_mass_of_a_colour_is_the_mixture_written_out():
    g = torch.Generator().manual_seed(5)
    x = (torch.randint(256, (200, 3, 1, 1), generator=g) / 255).to(REAL)
    x[:20, 0], x[20:40, 1], x[40:60, 2] = 0, 1, 0  # open cells too
    p = mixture(200, 3)
    value = 2 * x[..., 0, 0] - 1
    total = torch.zeros(200, dtype=REAL)
    weights = p.logits[0, :, 0, 0].softmax(0)
    for k, weight in enumerate(weights):
        mass = torch.ones(200, dtype=REAL) * weight
        a = p.coupling[0, k, :, :, 0, 0]
        offsets = [0, a[1, 0] * value[:, 0], a[2, 0] * value[:, 0] + a[2, 1] * value[:, 1]]
        for c in range(3):
            centre, scale = p.centre[0, k, c] + offsets[c], p.log_scale[0, k, c].exp()
            above = torch.where(value[:, c] == 1, 1, ((value[:, c] + 1 / 255 - centre) / scale).sigmoid())
            below = torch.where(value[:, c] == -1, 0, ((value[:, c] - 1 / 255 - centre) / scale).sigmoid())
            mass = mass * (above - below).reshape(-1)
        total = total + mass
    assert_close(p.log_prob(x)[:, 0, 0].exp(), total, rtol=1e-9, atol=1e-14)


def test_the_farthest_level_has_a_finite_mass_and_slope():
    centre = torch.full((1, 1, 1, 1, 1), -1.0, requires_grad=True)
    log_scale = torch.full((1, 1, 1, 1, 1), -7.0, requires_grad=True)
    p = LogisticMixture(torch.zeros(1, 1, 1, 1), centre, log_scale, torch.zeros(1, 1, 1, 1, 1, 1))
    log_mass = p.log_prob(torch.full((1, 1, 1, 1), 254 / 255))
    log_mass.backward(torch.ones_like(log_mass))
    assert log_mass.item() == pytest.approx(-507 / 255 * math.exp(7), rel=1e-5)  # the near end of the cell, in scales
    assert centre.grad.isfinite() and log_scale.grad.isfinite() and centre.grad > 0


def sees(made, shape, channel, row, column):
    """Which numbers of x the distribution of one channel of one pixel depends on, by autograd; (C, H, W) bool."""
    torch.manual_seed(1)
    x = torch.rand(1, *shape, dtype=REAL, requires_grad=True)
    p = made.pixels(x)
    here = [t[..., row, column] for t in p]
    if isinstance(p, Softmax):
        value = here[0][:, channel].square().sum()
    else:  # with the coupling, but the colours held to be earlier ones are taken from x
        moved = p.moved_centre((2 * x - 1)[:, None], channel)[..., row, column]
        value = moved.square().sum() + here[0].square().sum() + here[2][:, :, channel].square().sum()
    return torch.autograd.grad(value, x)[0][0] != 0


def earlier(shape, channel, row, column):
    """What it may depend on: all channels of the pixels before, and the channels before of its own."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, :row], mask[:, row, :column], mask[:channel, row, column] = True, True, True
    return mask


@both
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5)])
def test_a_pixel_depends_on_all_earlier_ones_and_on_no_others(kind, shape):
    made = model(kind, shape)
    for channel in range(shape[0]):
        for row, column in [(0, 0), (0, 3), (1, 0), (2, 2), (3, 0), (3, 4)]:
            assert torch.equal(sees(made, shape, channel, row, column), earlier(shape, channel, row, column))


def test_a_look_ahead_would_be_seen():
    made, colours = model("pixelrnn", (3, 4, 5)), torch.arange(3)
    made.image = Masked(colours, torch.arange(24) * 3 // 24, 7, own=True).to(REAL)
    assert not torch.equal(sees(made, (3, 4, 5), 1, 2, 2), earlier((3, 4, 5), 1, 2, 2))


@both
def test_rows_below_have_no_say(kind):
    made, x = model(kind, (3, 4, 5)), torch.rand(2, 3, 4, 5, dtype=REAL)
    for cut, whole in zip(made.pixels(x[:, :, :2]), made.pixels(x), strict=True):
        assert_close(cut, whole[..., :2, :], rtol=1e-9, atol=1e-9)


def test_skew_lays_diagonals_into_columns_and_back():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    skewed = skew(x)
    assert skewed.shape == (1, 1, 3, 6)
    assert skewed[0, 0, :, 3].tolist() == [3, 6, 9]
    assert torch.equal(unskew(skewed), x)


@both
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 1)])
def test_draws_follow_the_density(kind, shape):
    """Two numbers: all 65,536 images are listed, and moments of the draws compared within 4 standard errors."""
    made, count = model(kind, shape, size=0.3, dtype=torch.float32), 2_000
    x = all_colours(2).reshape(-1, *shape).float()
    with torch.no_grad():
        log_p = made(torch.empty(len(x))).log_prob(x).to(REAL)
        torch.manual_seed(2)
        drawn = made(torch.empty(count)).rsample()
        log_p_drawn = made(torch.empty(count)).log_prob(drawn)
    p = log_p.exp()
    assert_close(p.sum(), torch.ones((), dtype=REAL), rtol=0, atol=1e-4)
    assert_close(drawn, levels(drawn) / 255, rtol=0, atol=1e-6)
    a, b = (t.flatten(1).unbind(1) for t in (x, drawn))
    statistics = [(a[0], b[0]), (a[1], b[1]), (a[0] * a[1], b[0] * b[1]), (a[0] ** 2, b[0] ** 2), (log_p, log_p_drawn)]
    for exact, sampled in statistics:
        gap = abs((p * exact).sum() - sampled.mean())
        assert gap <= 4 * sampled.std() / math.sqrt(count)


@both
def test_a_few_images_are_learned_by_the_pixels_around_each(kind):
    """Four images need log₂ 4 = 2 bits, 0.125 a pixel; what knows only the share of white pixels needs its entropy."""
    torch.manual_seed(0)
    images = 255 * (data.load("digits").train.images[:4, :, 2:6, 2:6] > 100).byte()  # black and white
    assert len(images.unique(dim=0)) == 4
    x = grey(images)
    made = {"pixelcnn": PixelCNN((1, 4, 4), 16, 2), "pixelrnn": PixelRNN((1, 4, 4), 16, 2)}[kind]
    adam = torch.optim.Adam(made.parameters(), lr=1e-2)
    pace = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, 200)
    for _ in range(200):
        adam.zero_grad()
        (-made(x).log_prob(x).mean()).backward()
        adam.step()
        pace.step()
    share = Bernoulli(x.mean())
    assert 0.125 <= metrics.exact_nll(made, images)["bits_per_dim"]["value"] < share.entropy() / math.log(2)


def test_uniform_levels_cost_eight_bits():
    made = model("pixelrnn", (3, 4, 4), size=0.0, dtype=torch.float32)
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8)
    values = metrics.exact_nll(made, images)
    assert values["bits_per_dim"]["value"] == pytest.approx(8) and values["bits_per_dim"]["n"] == 10
    assert values["nll"]["value"] == pytest.approx(48 * math.log(256))


@both
def test_a_record_holds_the_likelihood_itself(kind, no_classifier):
    made = Experiment.make("digits", kind, hidden=4, depth=1, updates=1, batch=8, pixelwise_samples=20)
    digits = data.load("digits")
    trainer = experiment.prepare(made, digits, torch.device("cpu"))
    trainer.fit()
    values = experiment.evaluate(made, trainer, digits)
    assert set(values) == {"nll", "bits_per_dim", "score"}
    assert values["nll"]["n"] == 300 and values["score"]["n"] == 20


@pytest.mark.parametrize(
    ("dataset", "method", "changes", "says"),
    [
        ("ring8", "pixelcnn", {}, "pixelcnn needs images, and ring8 holds points"),
        ("ring8", "pixelrnn", {}, "pixelrnn needs images, and ring8 holds points"),
        ("ring8", "vae", {"decoder": "pixelcnn"}, "a pixelcnn has no codes"),
        ("digits", "vae", {"decoder": "pixelcnn"}, "a pixelcnn has no codes"),
        ("digits", "gan", {"decoder": "pixelrnn"}, "a pixelrnn has no codes and no differentiable draws"),
        ("patches32", "pixelrnn", {"hidden": 2}, "of 3 channels needs hidden=3 or more"),
    ],
)
def test_what_a_pixel_model_cannot_do_is_said_in_one_sentence(dataset, method, changes, says):
    shape = {"ring8": (2,), "digits": (1, 8, 8), "patches32": (3, 32, 32)}[dataset]
    with pytest.raises(UserError, match=says):
        build_model(Experiment.make(dataset, method, **changes).nets, METHODS[method], shape, 0)
