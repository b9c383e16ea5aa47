"""Metrics against closed forms, brute force and torch's own distributions."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn.functional import softplus
from torch.testing import assert_close

from svae_lib import metrics
from svae_lib.densities import BernoulliImage, DiagonalGaussian
from svae_lib.levels import grey


class BernoulliPixel(nn.Module):
    """p(x = 1 | z) = σ(a z + b) for one pixel and one code."""

    def forward(self, z):
        return BernoulliImage((2.0 * z - 0.5).view(-1, 1, 1, 1))


class Guess(nn.Module):
    """q(z|x) = N(0.3 (2x − 1), 1.1²): not the posterior."""

    def forward(self, x):
        mean = 0.3 * (2 * x.flatten(1) - 1)
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(1.1)))


def exact_log_p(x):
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    p_one = (density * (2.0 * z - 0.5).sigmoid()).sum() * (z[1] - z[0])
    return (p_one if x else 1 - p_one).log().item()


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_importance_weighted_bound_approaches_the_nll_from_above(x):
    torch.manual_seed(0)
    image = torch.full((400, 1, 1, 1), x)
    loose = metrics.importance_weighted_nll(Guess(), BernoulliPixel(), image, 1)
    tight = metrics.importance_weighted_nll(Guess(), BernoulliPixel(), image, 1000)
    truth = -exact_log_p(x)
    assert loose.mean() > truth + 0.01
    assert abs(tight.mean() - truth) < 4 * tight.std() / 20 + 1e-3


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_images_and_draws_are_batched_without_mixing_them(rows):
    images = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    torch.manual_seed(1)
    values = metrics.importance_weighted_nll(Guess(), BernoulliPixel(), images, 400, rows)
    exact = torch.tensor([-exact_log_p(x) for x in images.flatten().tolist()])
    assert_close(values, exact, rtol=0, atol=0.1)
    torch.manual_seed(1)
    assert_close(
        metrics.importance_weighted_nll(Guess(), BernoulliPixel(), images[:1], 64, 64), one_by_one(images[:1], 64)
    )


def one_by_one(image, samples):
    """The same bound of one image with all draws at once."""
    torch.manual_seed(1)
    q = Guess()(image.repeat(samples, 1, 1, 1))
    z, log_q = q.rsample_and_log_prob()
    log_w = BernoulliPixel()(z).log_prob(image.repeat(samples, 1, 1, 1)) - 0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
    return math.log(samples) - (log_w - log_q).logsumexp(0, keepdim=True)


def test_elbo_parts_are_the_terms_of_S1():
    torch.manual_seed(0)
    levels = torch.tensor([0, 40, 215, 255], dtype=torch.uint8)  # far from the middle, where codes matter most
    images = levels[torch.randint(4, (10_000, 1, 1, 1))]
    distortion, rate = metrics.elbo_parts(Guess(), BernoulliPixel(), images)
    x = (images / 255).flatten().double()
    mean = 0.3 * (2 * x - 1)
    assert_close(rate.double(), 0.5 * (mean.square() + 1.21 - 1 - math.log(1.21)), atol=1e-5, rtol=1e-5)  # float32

    z = torch.linspace(-12, 12, 251, dtype=torch.float64)[:, None]
    logit = 2.0 * z - 0.5
    log_p = x * logit - softplus(logit)
    expected = -(Normal(mean, 1.1).log_prob(z).exp() * log_p).sum(0) * (z[1] - z[0])

    def standard_errors(values):
        gap = values - expected
        return abs(gap.mean()) / (gap.std() / len(gap) ** 0.5)

    assert standard_errors(distortion) < 4
    from_prior = -BernoulliPixel()(torch.randn(10_000, 1)).log_prob(x.float().view(-1, 1, 1, 1))
    assert standard_errors(from_prior) > 4 < standard_errors(1.1 * distortion)


def test_the_bound_by_difference_is_the_nll_of_all_images():
    """Their ELBO is 0.2 nats above it. The gap is measured on the first tenth, where ones are as frequent as later."""
    torch.manual_seed(0)
    images = 255 * torch.randint(0, 2, (20_000, 1, 1, 1), dtype=torch.uint8)
    truth = torch.tensor([-exact_log_p(x) for x in (0, 1)])[images.flatten().long() // 255].mean().item()
    elbo = metrics.summary(sum(metrics.elbo_parts(Guess(), BernoulliPixel(), images)))

    def by_difference(elbo):
        torch.manual_seed(1)
        return metrics.importance_weighted_by_difference(Guess(), BernoulliPixel(), grey, images, elbo, 200, 2_000)

    found = by_difference(elbo)
    assert abs(found["value"] - truth) < 4 * found["se"] < 0.5 * (elbo["value"] - truth)
    assert (found["n"], found["k"]) == (2_000, 200)
    gap = by_difference({"value": 0.0, "se": 0.0})
    assert found["value"] == pytest.approx(elbo["value"] + gap["value"])
    assert found["se"] == pytest.approx(math.hypot(elbo["se"], gap["se"])) and 0 < gap["se"] < elbo["se"]


class Shift(nn.Module):
    def forward(self, x):
        return DiagonalGaussian(x.flatten(1), torch.zeros_like(x.flatten(1)))


class Plus(nn.Module):
    """A decoder whose mean misses every pixel by 0.1."""

    def forward(self, z):
        return BernoulliImage(torch.logit(z + 0.1).view(-1, 1, 2, 2))


def test_reconstruction_error_in_both_units():
    images = torch.randint(50, 200, (20, 1, 2, 2), dtype=torch.uint8)
    error = metrics.reconstruction_error(Shift(), Plus(), images)
    assert error["rmse_grey"]["value"] == pytest.approx(25.5, abs=0.01)
    assert error["l2"]["value"] == pytest.approx(0.1 * 2, abs=1e-4)  # √4 pixels


def score(p):
    """The score of a table of class probabilities, one row an image."""
    table = torch.tensor(p).log()
    lookup = iter(table.split(250))
    return metrics.classifier_score(lambda x: next(lookup), torch.zeros(len(p), 1, 1, 1, dtype=torch.uint8), 1)["value"]


def test_classifier_score_by_hand():
    assert score([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]) == pytest.approx(
        3 * math.exp(0.98 * math.log(0.98) + 0.02 * math.log(0.01)), rel=1e-6
    )
    assert score([[0.2, 0.8], [0.2, 0.8]]) == pytest.approx(1.0)  # one mode
    assert score([[0.5, 0.5], [0.5, 0.5]]) == pytest.approx(1.0)  # ambiguous


def test_stacked_digits_are_counted_by_their_triples():
    images = torch.zeros(20_000, 3, 8, 8, dtype=torch.uint8)
    triples = torch.randint(10, (20_000, 3), generator=torch.Generator().manual_seed(0))
    images[:, :, 0, 0] = 25 * triples.to(torch.uint8)  # a digit that a toy classifier can read

    def read(x):
        assert x.shape[1:] == (1, 8, 8)
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 25).round().long(), 10).float()

    found = metrics.stacked_coverage(read, images)
    assert found["modes"]["value"] == len({tuple(t) for t in triples.tolist()})
    collapsed = metrics.stacked_coverage(read, images[:1].expand(20_000, -1, -1, -1))
    assert collapsed["modes"]["value"] == 1 and collapsed["mode_kl"]["value"] == pytest.approx(math.log(1000))
    assert found["mode_kl"]["value"] == pytest.approx(999 / 40_000, rel=0.2)  # 999/2N to first order


def test_a_score_stays_finite_where_probabilities_underflow():
    x = torch.zeros(20, 1)
    log_p = torch.tensor([[0.0, -2_000.0, -2_000.0]]).repeat(20, 1).double()
    log_p[3, 1] = -744.0  # e^{-744} is the smallest double, and its share of a mean is zero
    assert metrics.classifier_score(lambda _: log_p[:20], x, splits=2)["value"] == pytest.approx(1.0)
    one_hot = torch.full((20, 2), -2_000.0).double()
    one_hot[:10, 0], one_hot[10:, 1] = 0.0, 0.0
    assert metrics.classifier_score(lambda _: one_hot, x, splits=1)["value"] == pytest.approx(2.0)
