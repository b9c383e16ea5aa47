"""Natural images: nets of the appendix, dequantised training, the likelihood of levels, and every method on them."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

from svae_lib import data, experiment, levels, metrics, natural
from svae_lib.data import Dataset, Split
from svae_lib.densities import DiagonalGaussian, Point
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.levels import Cells, Grey
from svae_lib.methods import METHODS
from svae_lib.models import Nets, build_model
from svae_lib.settings import SETTINGS

CPU = torch.device("cpu")
LEVELS = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


def built(dataset, method, shape, **changes):
    nets = Experiment.make(dataset, method, **changes).nets
    return build_model(nets, METHODS[method], shape, 0)


# Nets --------------------------------------------------------------------------------------------------


def test_a2_has_the_sizes_that_plausible_fill_ins_give():
    """0.36, 0.35 and 0.08 million parameters."""
    m = built("cifar10", "svae-r", (3, 32, 32))
    assert [round(millions(net), 2) for net in (m.encoder, m.decoder, m.critics[0])] == [0.36, 0.35, 0.08]
    assert m.z_dim == 100 and m.axis is Cells


def test_a3_is_the_same_pattern_with_a_stage_more():
    m = built("imagenet64", "svae", (3, 64, 64))
    x = torch.rand(2, 3, 64, 64)
    z = m.encoder(x).mean
    assert z.shape == (2, 2048) and m.decoder(z).mean.shape == x.shape and m.critics[0](x, z).shape == (2,)
    printed = [layer.out_channels for layer in m.encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert printed == [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    up = [layer.out_channels for layer in m.decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert up == [256] * 3 + [128] * 3 + [64] * 3 + [32] + [64] * 6


@pytest.mark.parametrize("dataset, architecture", [("mnist", "a1"), ("cifar10", "a2"), ("tiny_imagenet", "a3")])
def test_the_data_set_chooses_the_nets(dataset, architecture):
    assert Experiment.make(dataset, "svae-r", "paper").nets.architecture == architecture
    assert Experiment.make(dataset, "dcgan", "paper").nets.architecture == "dcgan"


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(UserError, match="sides divisible by 8, not 28×28"):
        build_model(Nets(architecture="a2"), METHODS["vae"], (1, 28, 28), 0)


def test_the_variance_of_the_decoder_is_bounded_below_and_never_loses_its_gradient():
    decoder = natural.Decoder(natural.APPENDICES["a2"], (3, 8, 8), 4)
    last = decoder.log_var[-1]
    nn.init.constant_(last.bias, -30.0)
    log_var = decoder(torch.zeros(1, 4)).log_var
    log_var.sum().backward()
    assert log_var.min() >= natural.LOG_VAR_FLOOR and last.bias.grad.abs().min() > 0


def test_without_noise_the_decoder_is_a_point():
    p = built("cifar10", "gan", (3, 32, 32)).decoder(torch.zeros(2, 100))
    assert isinstance(p, Point) and 0 < p.mean.min() and p.mean.max() < 1


# The authors' program --------------------------------------------------------------------------------------


def test_uniform_codes_are_normal_codes_seen_otherwise():
    p = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    z = torch.special.ndtri(p)  # what N(0, 1) looks like
    u = natural.uniform(z)
    assert_close(u, 2 * p - 1, rtol=0, atol=1e-12)
    assert_close(natural.normal(u), z, rtol=0, atol=1e-9)
    assert_close(natural.normal(natural.uniform(z.float())), z.float(), rtol=0, atol=5e-3)
    assert natural.normal(torch.tensor([-1.0, 1.0])).isfinite().all()


def silent(_, x):
    return torch.cat([x, torch.zeros_like(x[:, :1] if x.dim() == 4 else x)], 1)


def test_the_authors_objective_is_raw_scores_and_mean_absolute_differences(monkeypatch):
    """S29 in the setting authors: E f(x, z̃) − E f(x̃, z) − mean|x − x̂| − mean|u − û|, pixels in [−1, 1]."""
    made = Experiment.make("patches32", "svae-r", setting="authors", batch=4)
    t = experiment.prepare(made, data.load("patches32"), CPU)
    d = t.draw(t.data)
    with monkeypatch.context() as patch:  # without the noise, which is drawn afresh for every term
        patch.setattr(natural.AppendNoise, "forward", silent)
        value = METHODS["svae-r"].player(d)
        f_q, f_p = t.critics[0](d.x, d.z_q), t.critics[0](d.x_p, d.z_p)
        x_hat = d.p_x_given_z_q.mean
        cycle_x = (2 * x_hat - 2 * d.x).abs().mean()
        cycle_z = (natural.uniform(d.z_p) - natural.uniform(t.model.encoder(d.x_p).mean)).abs().mean()
    assert value.item() == pytest.approx((f_q.mean() - f_p.mean() - cycle_x - cycle_z).item(), rel=1e-5)
    assert made.training.weight == 1.0 and made.training.beta1 == 0.5
    assert not torch.equal(t.model.encoder(d.x).mean, t.model.encoder(d.x).mean), "the encoder draws"
    sizes = [layer.out_channels for layer in t.critics[0].modules() if isinstance(layer, nn.Conv2d)]
    assert sizes == [64, 128, 256, 512]


# Beyond ------------------------------------------------------------------------------------------------------


def test_beyond_is_of_limited_size_and_its_code_is_local():
    """A number of the code at one place moves the image around that place, and hardly at the opposite corner."""
    m = built("cifar10", "svae-r", (3, 32, 32), setting="beyond")
    assert sum(map(millions, (m.encoder, m.decoder, *m.critics))) < 12
    small = Nets(architecture="beyond", z_dim=64, channels=8, norm="none")
    decoder = build_model(small, METHODS["vae"], (3, 64, 64), 0).decoder
    z = torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        before = decoder(z.flatten(1)).mean
        z[..., 0, 0] = 1.0
        moved = (decoder(z.flatten(1)).mean - before).abs().amax(1)[0]
    assert moved[-8:, -8:].max() < 0.01 * moved[:8, :8].max()
    with pytest.raises(UserError, match="z_dim must be a multiple of 64"):
        build_model(Nets(architecture="beyond", z_dim=100), METHODS["vae"], (3, 32, 32), 0)
    with pytest.raises(UserError, match="side 8, 16, 32 or 64, not 28×28"):
        build_model(Nets(architecture="beyond"), METHODS["vae"], (1, 28, 28), 0)


# Levels and numbers --------------------------------------------------------------------------------------


def test_a_dequantised_level_stays_in_its_interval():
    torch.manual_seed(0)
    draws = torch.stack([Cells.draw(LEVELS) for _ in range(200)])
    assert torch.equal((256 * draws).floor(), LEVELS.expand_as(draws).float()) and draws.max() < 1
    assert draws.std(0).mean() * 256 == pytest.approx(12**-0.5, rel=0.02)


def test_numbers_go_back_to_the_grey_that_they_came_from():
    assert_close(Cells.back(Cells.see(LEVELS)), levels.grey(LEVELS))
    assert Grey.see is Grey.draw is levels.grey and torch.equal(Grey.back(LEVELS), LEVELS)


class Fixed(nn.Module):
    """A density that forgets what it is given: N(mean, std²) over (B, ...)."""

    def __init__(self, mean, std, *shape):
        super().__init__()
        self.mean, self.std, self.shape = mean, std, shape

    def forward(self, u):
        mean = torch.full((len(u), *self.shape), self.mean)
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(self.std)))


@pytest.mark.parametrize("mean, std", [(0.5, 0.2), (0.1, 0.15), (1.0, 0.4)])
def test_bits_are_those_of_a_sum_over_all_levels(mean, std):
    """One number an image, a decoder that ignores z, and the prior as encoder: both bounds are −log₂ p(i)."""
    found = metrics.discrete_nll(Fixed(0.0, 1.0, 2), Fixed(mean, std, 1, 1, 1), LEVELS, samples=3, subset=4)
    normal, edges = Normal(torch.tensor(mean).double(), std), torch.arange(257).double() / 256
    mass = {"closed": normal.cdf(edges).diff()}
    edges[0], edges[-1] = -math.inf, math.inf
    mass["open"] = normal.cdf(edges).diff()
    assert mass["open"].sum().item() == pytest.approx(1.0) and mass["closed"].sum() < 0.99
    for kind, p in mass.items():
        for key in (f"bits_{kind}", f"iw_bits_{kind}"):
            assert found[key]["value"] == pytest.approx(-p.log2().mean().item(), rel=1e-5)
    assert found["rate"]["value"] == 0.0


def test_the_bound_of_a_bad_encoder_pays_its_rate():
    good = metrics.discrete_nll(Fixed(0.0, 1.0, 2), Fixed(0.5, 0.1, 3, 1, 1), LEVELS.expand(-1, 3, 1, 1), 2, 2)
    bad = metrics.discrete_nll(Fixed(1.0, 1.0, 2), Fixed(0.5, 0.1, 3, 1, 1), LEVELS.expand(-1, 3, 1, 1), 2, 2)
    rate = 2 * 0.5  # nats, of two codes at mean one
    assert bad["bits_open"]["value"] - good["bits_open"]["value"] == pytest.approx(rate / (3 * math.log(2)), rel=1e-4)


class Copy(nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return Point(x + self.shift)


def test_samples_and_reconstructions_are_in_levels():
    images = LEVELS.view(1, 1, 16, 16).expand(2, -1, -1, -1)
    error = metrics.reconstruction_error(Copy(), Copy(10 / 256), images, Cells)
    assert error["rmse_grey"]["value"] == pytest.approx(10, rel=1e-4)
    assert error["l2"]["value"] == pytest.approx(10 / 255 * 16, rel=1e-4)

    class Ramp(nn.Module):
        def forward(self, z):
            return Point(torch.tensor([-0.5, 0.5 / 256, 100.9 / 256, 255.5 / 256, 1.5]).expand(len(z), 1, 1, 5))

    assert metrics.sample_images(Ramp(), 2, 1, CPU, Cells).flatten().tolist() == [0, 0, 100, 255, 255]


# Methods -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corners():
    """Corners of 16 × 16 pixels of patches32, which make its nets cheap."""
    full = data.load("patches32")
    splits = (full.train, full.validation, full.test)
    small = (Split(s.images[:16, :, :16, :16].contiguous(), s.labels[:16]) for s in splits)
    return Dataset("patches32", *small)


SMALL = {"batch": 4, "hidden": 8, "depth": 1, "flow_length": 2, "channels": 8, "updates": 1, "log_every": 1}
SMALL |= {"critic_steps": 1}


NO_FLOW = ("nf-vae", "iaf-vae", "avb", "avb-ac")
REFUSED = {"beyond": NO_FLOW, "authors": ("vae", "svae-elbo", *NO_FLOW)}  # the authors' nets have no density
TRAINED = {
    "stabilised": list(METHODS),
    "literal": ["svae", "as-vae", "alice-a", "gan", "wgan-gp", "mmd-gan", "eb-gan"],  # each kind of critics once
    "beyond": ["vae", "svae", "as-vae", "alice-a", "gan", "mmd-gan", "eb-gan"],
    "authors": ["svae", "svae-r", "ali", "as-vae", "gan", "eb-gan"],  # large nets
}
CASES = [(setting, name) for setting, names in TRAINED.items() for name in (*names, *REFUSED.get(setting, ()))]


@pytest.mark.parametrize("setting, method", CASES)
def test_every_method_trains_on_natural_images(corners, method, setting):
    if method in REFUSED.get(setting, ()):
        with pytest.raises(UserError, match="needs a density|the.* nets.* have no") as caught:
            experiment.prepare(Experiment.make("patches32", method, setting=setting, **SMALL), corners, CPU).fit()
        assert "\n" not in str(caught.value)
        return
    trainer = experiment.prepare(Experiment.make("patches32", method, setting=setting, **SMALL), corners, CPU)
    trainer.fit()
    model, row = trainer.model, METHODS[method]
    assert trainer.history[-1]["update"] == 1
    assert len(model.critics) == len(row.critics) and (model.encoder is not None) == row.codes
    x = trainer.draw(corners.train).x
    assert ((255 * x).frac().abs().max() < 1e-3) == (model.axis is Grey)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="natural images on a graphics card need a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", list(SETTINGS["natural"]))
def test_natural_images_on_a_graphics_card(corners, setting, precision):
    """Whole updates are captured as a graph, and what is measured there is what the CPU measures."""
    device = experiment.choose_device("cuda")
    made = Experiment.make("patches32", "svae-r", setting=setting, **SMALL | {"updates": 8, "precision": precision})
    trainer = experiment.prepare(made, corners, device)
    trainer.fit()
    assert trainer.engine == "graph" and trainer.done == 8
    if setting == "authors":
        return
    found = []
    for where in (device, CPU):
        players = trainer.evaluated_players().to(where)
        density = players["decoder"](torch.zeros(16, made.nets.z_dim, device=where))
        model = metrics.OnLevels(metrics.DiscretisedGaussian.on_levels(density, open_edges=True))
        found.append(model.log_prob(Cells.see(corners.test.images.to(where))).cpu())
    assert_close(*found, rtol=1e-3, atol=1.0)
