"""Bounds against closed forms, brute force and explicit reconstruction; wrong variants are refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from svae_lib import bounds, cli, data, levels, records
from svae_lib.bounds import CELL, Basis
from svae_lib.densities import BernoulliImage, DiagonalGaussian, DiscretisedGaussian
from svae_lib.errors import UserError
from svae_lib.exact import World
from svae_lib.metrics import reconstruction_error

HAS = {"cifar10": (data.root() / "cifar-10-batches-py").is_dir(), "mnist": (data.root() / "MNIST" / "raw").is_dir()}


@pytest.fixture(scope="module")
def images():
    """Correlated uint8 images (400, 3, 2, 4)."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    x = 128 + 9 * torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mix
    return x.round().clamp(0, 255).to(torch.uint8).view(400, 3, 2, 4)


@pytest.fixture(scope="module")
def basis(images):
    return Basis.fit(images[:300])


def test_the_basis_diagonalises_the_covariance(images, basis):
    x = images[:300].flatten(1).double()
    assert_close(basis.mean, x.mean(0), rtol=1e-12, atol=0)
    assert_close((basis.axes * basis.variances) @ basis.axes.T, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)
    assert_close(basis.axes.T @ basis.axes, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (basis.variances.diff() <= 0).all()


@pytest.mark.parametrize("k", [0, 1, 7, 24])
def test_the_tail_of_the_energies_is_the_reconstruction_error(images, basis, k):
    errors = (images[300:].double() - basis.reconstruct(images[300:], k)).flatten(1)
    tail = basis.energies(images[300:])[:, k:].sum(1)
    assert_close(tail, errors.square().sum(1), rtol=1e-9, atol=1e-6)
    other = torch.linalg.qr(torch.randn(24, k, dtype=torch.float64)).Q
    centred = images[:300].flatten(1).double() - basis.mean
    best, worse = basis.variances[k:].sum(), (centred - centred @ other @ other.T).square().sum(1).mean()
    assert best <= worse * (1 + 1e-12) and (k in (0, 24) or best < 0.999 * worse)  # Eckart and Young


def test_both_units_are_those_of_the_metrics(images):
    torch.manual_seed(0)
    constant = BernoulliImage(torch.zeros(1, 24))

    class Same(torch.nn.Module):
        def forward(self, _):
            return constant

    found = reconstruction_error(Same(), Same(), images.view(400, 24))
    squares = (images.double() / 255 - 0.5).square().flatten(1).sum(1)
    assert_close(found["rmse_grey"]["value"], 255 * (squares.mean() / 24).sqrt().item(), rtol=1e-6, atol=0)
    assert_close(found["l2"]["value"], squares.sqrt().mean().item(), rtol=1e-6, atol=0)


def test_gaussian_bits_on_the_images_of_the_fit_are_its_entropy(images, basis):
    covariance = torch.cov(images[:300].flatten(1).double().T, correction=0)
    dequantised = covariance + CELL * torch.eye(24, dtype=torch.float64)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * dequantised) / 24 / math.log(2)
    found = bounds.gaussian_bits(basis.variances, basis.energies(images[:300])).mean()
    assert_close(found, entropy, rtol=1e-10, atol=0)
    assert_close(bounds.gaussian_bits(basis.variances, basis.variances), entropy, rtol=1e-10, atol=0)
    without_noise = 0.5 * torch.logdet(2 * math.pi * math.e * covariance) / 24 / math.log(2)
    for wrong in (entropy * math.log(2), entropy * 24, without_noise):  # nats; per image; levels taken for densities
        assert abs(found - wrong) > 1e-4


def test_gaussian_bits_average_the_noise_exactly():
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(0, 40, (50, 1, 1, 2), dtype=torch.uint8, generator=generator)
    basis = Basis.fit(pairs)
    covariance = (basis.axes * (basis.variances + CELL)) @ basis.axes.T
    density = MultivariateNormal(basis.mean + 0.5, covariance)  # of x + u on [0, 256)
    nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(12) + 0.5  # exact to the third degree
    noise = torch.cartesian_prod(nodes, nodes)
    mean = -density.log_prob(pairs.flatten(1).double()[:, None] + noise).mean(1) / 2 / math.log(2)
    assert_close(bounds.gaussian_bits(basis.variances, basis.energies(pairs)), mean, rtol=1e-10, atol=0)
    fine = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    cells = density.log_prob(pairs.flatten(1).double()[:, None] + torch.cartesian_prod(fine, fine)).exp().mean(1)
    discretised = -cells.log2() / 2
    assert (discretised < mean).all() and (mean - discretised).max() < 0.1  # Theis et al. 2016


def test_gaussian_bits_do_not_see_an_orthogonal_change_of_the_pixels(images):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    changed = (255 - images.flatten(1)[:, order]).view(images.shape)  # pixels shuffled, levels mirrored
    bits = [bounds.gaussian_bits((b := Basis.fit(x[:300])).variances, b.energies(x[300:])) for x in (images, changed)]
    assert_close(*bits, rtol=1e-9, atol=0)
    stretched = torch.cat([images[:, :1] // 2, images[:, 1:]], 1)  # a change of scale is seen
    b = Basis.fit(stretched[:300])
    assert (bounds.gaussian_bits(b.variances, b.energies(stretched[300:])) - bits[0]).abs().min() > 0.1


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ppca_is_the_best_linear_vae(k):
    """At the fitted spectrum L_x (S1) is the log-likelihood, and its gradient vanishes in every parameter."""
    eigen = torch.linspace(12, 1, 9, dtype=torch.float64).square()
    axes = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(k), dtype=torch.float64)).Q
    fitted = bounds.ppca(eigen, k)
    noise, scale = fitted[-1], (fitted[:k] - fitted[-1]).sqrt()
    W = axes[:, :k] * scale
    zero = torch.zeros(k, dtype=torch.float64)
    log_noise = noise.log().requires_grad_()
    leaves = {"W": W, "b": torch.ones(9, dtype=torch.float64), "c": zero, "V": W.T / fitted[:k, None]}
    leaves |= {"t": (noise / fitted[:k]).log()}
    leaves["c"] = -leaves["V"].sum(1)
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    world = World(m=torch.ones(9, dtype=torch.float64), S=(axes * eigen) @ axes.T, s=log_noise.expand(9), **leaves)
    covariance = (axes * fitted) @ axes.T
    log_likelihood = -0.5 * torch.logdet(2 * math.pi * covariance) - 0.5 * 9  # E_q log N(x; m, covariance)
    assert_close(world.L_x(), log_likelihood, rtol=1e-10, atol=0)
    for slope in torch.autograd.grad(world.L_x(), [*leaves.values(), log_noise]):
        assert slope.abs().max() < 1e-9
    for change in (-0.1, 0.1):  # another noise is worse, whatever the encoder
        other = replace(world, s=world.s + change)
        assert -kl_divergence(other.q_x, other.p_x) < -kl_divergence(world.q_x, world.p_x) - 1e-4


def test_ppca_keeps_the_trace_and_ends_in_the_full_gaussian(basis):
    for k in (1, 5, 23):
        spectrum = bounds.ppca(basis.variances, k)
        assert_close(spectrum.sum(), basis.variances.sum(), rtol=1e-12, atol=0)
        assert_close(spectrum[:k], basis.variances[:k])
    assert_close(bounds.ppca(basis.variances, 23), basis.variances)


def test_one_step_errors_are_those_of_linear_regression(images, basis):
    found = basis.one_step_errors(images[300:])
    order = [c * 8 + pixel for pixel in range(8) for c in range(3)]
    x = images.flatten(1).double()[:, order]
    fit, test = x[:300] - x[:300].mean(0), x[300:] - x[:300].mean(0)
    for i in (0, 1, 12, 23):
        gram = fit[:, :i].T @ fit[:, :i] / 300 + CELL * torch.eye(i, dtype=torch.float64)
        weights = torch.linalg.solve(gram, fit[:, :i].T @ fit[:, i] / 300)
        assert_close(found[:, i], test[:, i] - test[:, :i] @ weights, rtol=1e-8, atol=1e-8)


def test_discretised_gaussian_is_a_distribution_only_with_open_edges():
    levels = torch.arange(256).view(-1, 1)
    for mean, sigma in ((3.2, 20.0), (128.0, 0.3), (400.0, 50.0)):
        about = [torch.full((256, 1), value, dtype=torch.float64) for value in (mean, 2 * math.log(sigma))]
        total = {edges: DiscretisedGaussian(*about, edges).log_prob(levels).exp().sum() for edges in (False, True)}
        inside = log_ndtr([(256 - mean) / sigma, -mean / sigma])
        assert_close(total[True].item(), 1.0, rtol=1e-12, atol=0)
        assert_close(total[False].item(), float(np.exp(inside[0]) - np.exp(inside[1])), rtol=1e-10, atol=0)


def test_discretised_gaussian_is_accurate_in_both_tails():
    sigma = torch.ones(1, 1, dtype=torch.float64)
    for away in (0, 7, 30, 200):
        right = DiscretisedGaussian(20 * sigma, 0 * sigma).log_prob(torch.tensor([[20 + away]]))
        left = DiscretisedGaussian(20 * sigma + 2 * away, 0 * sigma).log_prob(torch.tensor([[19 + away]]))
        low, high = log_ndtr([-away - 1.0, -away])
        assert_close(right, left, rtol=1e-13, atol=0)
        assert_close(right.item(), high + math.log1p(-math.exp(low - high)), rtol=1e-12, atol=0)
    wide = DiscretisedGaussian(20 * sigma, 2 * math.log(1e5) * sigma).log_prob(torch.tensor([[20]]))
    assert_close(wide.item(), -math.log(1e5 * math.sqrt(2 * math.pi)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("level", [0, 17, 255])
@pytest.mark.parametrize("edges", [False, True])
def test_discretised_gaussian_has_finite_gradients(level, edges):
    mean, log_var = (torch.full((1, 1), v, dtype=torch.float64, requires_grad=True) for v in (90.0, -1.0))
    value = DiscretisedGaussian(mean, log_var, edges).log_prob(torch.tensor([[level]]))
    assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(value, [mean, log_var]))


def test_decoder_bits():
    assert_close(bounds.decoder_sigma(3.09), 2.0603, rtol=1e-4, atol=0)
    assert_close(bounds.decoder_sigma(3.09, residual=0.0), 3.3969, rtol=1e-4, atol=0)
    for rate, residual in ((0.0, 1.0), (0.4, 0.7)):
        assert_close(bounds.decoder_bits(bounds.decoder_sigma(3.09, rate, residual), residual), 3.09 - rate)
    generator = torch.Generator().manual_seed(0)
    log_var, r = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)
    nll = -DiagonalGaussian(torch.zeros_like(r), log_var).log_prob(r).mean() / 6 / math.log(2)
    sigma, residual = (0.5 * log_var.mean()).exp(), (r.square() * (-log_var).exp()).mean()
    assert_close(bounds.decoder_bits(sigma, residual), nll)
    assert abs(bounds.decoder_bits((0.5 * log_var).exp().mean(), residual) - nll) > 0.1  # arithmetic mean: refused


def test_no_cell_holds_more_than_the_densitys_peak_times_its_width():
    mean = torch.linspace(0, 256, 400, dtype=torch.float64).repeat(5, 1)
    sigma = torch.tensor([0.1, 0.7, 2.06, 8.0, 90.0], dtype=torch.float64)[:, None].expand(5, 400)
    levels = torch.full((5, 400), 128)
    cost = -DiscretisedGaussian(mean.reshape(-1, 1), 2 * sigma.log().reshape(-1, 1)).log_prob(levels.view(-1, 1))
    assert (cost / math.log(2) >= bounds.decoder_bits(sigma, residual=0.0).flatten() - 1e-12).all()


@pytest.mark.parametrize("sigma", [1.0, 2.06, 15.0])
def test_a_calibrated_decoder_costs_the_same_on_levels(sigma):
    """Levels that follow the discretised Gaussian itself lie σ² + 1/12 about their mean: that σ gives their entropy."""
    levels = torch.arange(256).view(-1, 1)
    mean, log_var = (torch.full((256, 1), v, dtype=torch.float64) for v in (128.3, 2 * math.log(sigma)))
    log_p = DiscretisedGaussian(mean, log_var).log_prob(levels)
    entropy = -(log_p.exp() * log_p).sum().item() / math.log(2)
    variance = (log_p.exp() * (levels + 0.5 - 128.3).flatten().square()).sum().item()
    assert_close(variance, sigma**2 + CELL, rtol=1e-6, atol=0)
    assert abs(entropy - bounds.decoder_bits(math.sqrt(variance))) < 1e-4


def test_block_bits_of_constant_scale_and_of_quadrants():
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (7, 3, 8, 8), generator=generator).double() * 2 - 1
    scale = torch.tensor([[1.0, 3.0], [9.0, 27.0]], dtype=torch.float64).repeat_interleave(4, 0).repeat_interleave(4, 1)
    errors = signs * scale
    expected = bounds.decoder_bits((torch.tensor([1.0, 9.0, 81.0, 729.0], dtype=torch.float64) + CELL).sqrt()).mean()
    for block in (4, 2, 1):
        assert_close(bounds.block_bits(errors, block), expected.expand(7))
    whole = bounds.decoder_bits(math.sqrt((1 + 9 + 81 + 729) / 4 + CELL))
    assert_close(bounds.block_bits(errors, 8), torch.full((7,), whole, dtype=torch.float64))
    mixed = errors[:, :, torch.randperm(8, generator=generator)]  # rows out of place: the blocks are no longer uniform
    assert (bounds.block_bits(mixed, 4) > expected + 0.1).all()
    noise = torch.randn(50, 3, 8, 8, generator=generator, dtype=torch.float64)
    by_block = [bounds.block_bits(noise, block).mean() for block in (8, 4, 2, 1)]
    assert by_block == sorted(by_block, reverse=True)  # Jensen: a finer oracle never costs more


def test_water_filling_of_white_data_is_the_closed_form():
    white = torch.full((10,), 25.0, dtype=torch.float64)
    for distortion in (25.0, 4.0, 0.01):
        rate, found = bounds.rate_distortion(white, distortion)
        assert_close(rate.item(), 0.5 * math.log2(25 / distortion))
        assert_close(found.item(), distortion)
    rate, found = bounds.rate_distortion(white, 1e3)  # nothing is sent
    assert rate == 0 and found == 25


def test_water_filling_is_the_cheapest_way_to_share_the_error(basis):
    v = basis.variances
    rate, distortion = bounds.rate_distortion(v, 60.0)
    assert 0 < (v < 60).sum() < 24
    share = torch.minimum(v, torch.tensor(60.0, dtype=v.dtype))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):  # other shares with the same sum
        moved = (share * (1 + 0.2 * torch.randn(24, generator=generator, dtype=v.dtype))).clamp(min=1e-3)
        moved = torch.minimum(moved * share.sum() / moved.sum(), v)
        if moved.sum() < share.sum():
            moved = moved + (v - moved) * (share.sum() - moved.sum()) / (v - moved).sum()
        assert_close(moved.mean(), distortion)
        assert 0.5 * (v / moved).log2().mean() >= rate - 1e-12
    level = torch.tensor(60.0, dtype=v.dtype, requires_grad=True)
    slopes = [torch.autograd.grad(value, level)[0] for value in bounds.rate_distortion(v, level)]
    assert_close(slopes[0] / slopes[1], torch.tensor(-1 / (2 * 60 * math.log(2)), dtype=v.dtype))  # dR/dD


def test_water_level_inverts_water_filling(basis):
    for level in (1e-3, 1.0, 60.0, 500.0, float(basis.variances[0]) * 0.99):
        distortion = bounds.rate_distortion(basis.variances, level)[1].item()
        assert_close(bounds.water_level(basis.variances, distortion), level, rtol=1e-9, atol=0)
    rates, distortions = bounds.rate_distortion(basis.variances, torch.tensor([1.0, 60.0]))
    assert rates.shape == distortions.shape == (2,) and rates[0] > rates[1]


def test_the_curve_is_what_linear_vaes_pay(basis):
    """Encoder with gain 1 − θ/v per axis: its error is θ, its KL to N(0, v) the rate, for data of any shape."""
    v, level = basis.variances, 60.0
    kept = v > level
    gain, spread = 1 - level / v[kept], level * (1 - level / v[kept])  # code u = gain·c + √spread ε, x̂ = u
    second_moment = gain.square() * v[kept] + spread  # E u² = v − θ, whatever the law of c
    kl = 0.5 * (second_moment / (v[kept] - level) - 1 + (v[kept] - level).log() - spread.log())
    error = (1 - gain).square() * v[kept] + spread
    rate, distortion = bounds.rate_distortion(v, level)
    assert_close(kl.sum() / 24 / math.log(2), rate)
    assert_close((error.sum() + v[~kept].sum()) / 24, distortion)


def test_entropy_floor_is_the_least_bernoulli_nll():
    images = torch.randint(0, 256, (20, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = levels.grey(images).double()
    at = lambda pi: -BernoulliImage(pi.logit()).log_prob(x)  # noqa: E731
    floor = bounds.entropy_floor(images)
    assert_close(floor, at(x.clamp(1e-12, 1 - 1e-12)), rtol=1e-9, atol=1e-9)
    assert (at((0.95 * x + 0.02).clamp(0.001, 0.999)) > floor).all()
    assert bounds.entropy_floor(torch.tensor([[0, 255]], dtype=torch.uint8)).item() == 0


@pytest.fixture(scope="module")
def digits():
    return bounds.compute(data.load("digits"))


def test_a_record_follows_from_its_spectra(digits):
    check(digits, pixels=64)
    assert abs(digits["metrics"]["floor_grey"]["value"] - 13.54) < 0.01
    assert json.loads(json.dumps(digits)) == digits
    again = bounds.compute(data.load("digits"))
    assert again["metrics"] == digits["metrics"] and again["spectra"] == digits["spectra"]


def check(record, pixels):
    metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
    v, e = (torch.tensor(record["spectra"][name], dtype=torch.float64) for name in ("variances", "energies"))
    assert len(v) == len(e) == pixels
    assert_close(bounds.gaussian_bits(v, e).item(), metrics["bits_gaussian"], rtol=1e-6, atol=0)
    assert_close(math.sqrt(e.mean()), metrics["rmse_mean"], rtol=1e-6, atol=0)
    for k in (k for k in bounds.COMPONENTS if k < pixels):
        assert_close(bounds.gaussian_bits(bounds.ppca(v, k), e).item(), metrics[f"bits_ppca{k}"], rtol=1e-6, atol=0)
        assert_close(math.sqrt(e[k:].sum() / pixels), metrics[f"rmse_pca{k}"], rtol=1e-6, atol=0)
        assert metrics[f"l2_pca{k}"] <= metrics[f"rmse_pca{k}"] * math.sqrt(pixels) / 255  # Jensen


def test_the_command_writes_a_record_that_can_be_read(tmp_path, capsys):
    assert cli.main(["bounds", "digits", "--results", str(tmp_path)]) == 0
    record = records.read_bounds("digits", tmp_path)
    assert {"commit", "torch", "date"} <= set(record["environment"])
    assert "bits_gaussian" in capsys.readouterr().out
    with pytest.raises(UserError, match="no bounds of 'mnist'.*run `svae bounds mnist`"):
        records.read_bounds("mnist", tmp_path)
    (tmp_path / "bounds-digits.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        records.read_bounds("digits", tmp_path)


@pytest.mark.parametrize("name, pixels", [("cifar10", 3072), ("mnist", 784)])
def test_the_kept_records_follow_from_their_spectra(name, pixels):
    check(records.read_bounds(name), pixels)


@pytest.mark.parametrize("name", HAS)
def test_the_kept_records_are_those_of_the_data(name):
    """What needs no eigenvectors: both traces, and the first variance by power iteration."""
    if not HAS[name]:
        pytest.skip(f"{name} is not in SVAE_DATA or the user's cache")
    record, dataset = records.read_bounds(name), data.load(name)
    v, e = (torch.tensor(record["spectra"][name], dtype=torch.float64) for name in ("variances", "energies"))
    fitted = torch.cat([dataset.train.images, dataset.validation.images]).flatten(1)
    mean = fitted.sum(0).double() / len(fitted)
    some, axis = fitted[:2_000].double() - mean, torch.ones(len(v), dtype=torch.float64)
    for _ in range(10):  # towards the first axis of a few images
        axis = some.T @ (some @ axis)
        axis /= axis.norm()
    trace = first = 0.0
    for rows in (rows.double() - mean for rows in fitted.split(2_000)):
        trace, first = trace + rows.square().sum() / len(fitted), first + (rows @ axis).square().sum() / len(fitted)
    assert_close(v.sum(), trace, rtol=1e-8, atol=0)
    assert 0.97 * v[0] < first <= v[0] * (1 + 1e-8)  # no other axis has more
    test = dataset.test.images.flatten(1).double() - mean
    assert_close(e.sum(), test.square().sum(1).mean(), rtol=1e-8, atol=0)
    assert_close(record["metrics"]["rmse_mean"]["value"], test.square().mean().sqrt().item(), rtol=1e-9, atol=0)
    if name == "mnist":
        floor = bounds.entropy_floor(dataset.test.images).mean().item()
        assert_close(record["metrics"]["floor_grey"]["value"], floor, rtol=1e-9, atol=0)
