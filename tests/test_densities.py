r"""Densities are densities: against torch.distributions, against integrals, gradients everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from torch.testing import assert_close

from svae_lib.densities import BernoulliImage, DiagonalGaussian, standard_normal_log_prob

SHAPES = [(3, 1), (2, 5), (2, 1, 4, 4)]
LINE = torch.linspace(-45, 45, 30_001, dtype=torch.float64)[:, None]  # one number per "sample"; 9 of the widest σ
STEP = float(LINE[1, 0] - LINE[0, 0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0) -> DiagonalGaussian:
    return DiagonalGaussian(normal(*shape, seed=seed), 0.5 * normal(*shape, seed=seed + 1))


def reference(g: DiagonalGaussian) -> Independent:
    return Independent(Normal(g.mean, (0.5 * g.log_var).exp()), g.mean.dim() - 1)


def integral(values: Tensor) -> Tensor:
    return values.sum() * STEP  # trapezoid rule: the integrands vanish at both ends


one_dimensional = given(
    mean=st.floats(-3, 3), log_var=st.floats(-3, 3), other_mean=st.floats(-3, 3), other_log_var=st.floats(-3, 3)
)


def on_line(mean: float, log_var: float) -> DiagonalGaussian:
    return DiagonalGaussian(torch.full_like(LINE, mean), torch.full_like(LINE, log_var))


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_agrees_with_torch_distributions(shape: tuple[int, ...]) -> None:
    a, b, v = gaussian(*shape), gaussian(*shape, seed=2), normal(*shape, seed=4)
    assert_close(a.log_prob(v), reference(a).log_prob(v))
    assert_close(a.kl(b), kl_divergence(reference(a), reference(b)))
    assert a.log_prob(v).shape == a.kl(b).shape == shape[:1]
    wrong = [
        -a.log_prob(v),
        DiagonalGaussian(a.mean, 2 * a.log_var).log_prob(v),  # σ taken for σ²
        a.log_prob(v) + 0.5 * math.log(2 * math.pi) * v[0].numel(),  # constant left out
    ]
    assert all((values - reference(a).log_prob(v)).abs().min() > 1e-3 for values in wrong), "it would be noticed"


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_kl_to_standard_is_kl_to_the_prior(shape: tuple[int, ...]) -> None:
    a, v = gaussian(*shape), normal(*shape, seed=4)
    prior = DiagonalGaussian(torch.zeros(shape).double(), torch.zeros(shape).double())
    assert_close(a.kl_to_standard(), a.kl(prior))
    assert_close(standard_normal_log_prob(v), prior.log_prob(v))
    assert_close(a.kl(a), torch.zeros(shape[0]).double())


@settings(derandomize=True, deadline=None, max_examples=25)
@one_dimensional
def test_gaussian_integrals(mean: float, log_var: float, other_mean: float, other_log_var: float) -> None:
    a, b = on_line(mean, log_var), on_line(other_mean, other_log_var)
    log_a, log_b = a.log_prob(LINE), b.log_prob(LINE)
    one = torch.ones((), dtype=torch.float64)
    assert_close(integral(log_a.exp()), one, rtol=1e-9, atol=0)
    assert_close(integral(log_a.exp() * (log_a - log_b)), a.kl(b)[0], rtol=1e-9, atol=1e-9)


def test_gaussian_draws_have_the_stated_mean_and_variance() -> None:
    g, n = gaussian(1, 3), 200_000
    noise = normal(n, 3, seed=7)
    draws = g.rsample(noise)
    variance = g.log_var.exp()
    assert ((draws.mean(0) - g.mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((draws.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / n)).all()
    assert_close(g.rsample(torch.zeros_like(g.mean)), g.mean)


def test_gradients_reach_every_parameter() -> None:
    g, other, v = gaussian(2, 3), gaussian(2, 3, seed=2), normal(2, 3, seed=4)
    parameters = tuple(t.requires_grad_() for t in (*g, *other))

    def everything(*t: Tensor) -> tuple[Tensor, ...]:
        a, b = DiagonalGaussian(*t[:2]), DiagonalGaussian(*t[2:])
        return a.log_prob(v), a.rsample(v), a.kl(b), a.kl_to_standard()

    assert torch.autograd.gradcheck(everything, parameters)
    logits = normal(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: BernoulliImage(t).log_prob(v.sigmoid()), (logits,))


@pytest.mark.parametrize("shape", SHAPES)
def test_bernoulli_agrees_with_torch_distributions(shape: tuple[int, ...]) -> None:
    image, v = BernoulliImage(normal(*shape)), (normal(*shape, seed=1) > 0).double()
    assert_close(image.log_prob(v), Independent(Bernoulli(logits=image.logits), len(shape) - 1).log_prob(v))
    assert_close(image.mean, image.rsample())


def test_bernoulli_sums_to_one_and_survives_extreme_logits() -> None:
    pixels = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)  # all 16 images
    image = BernoulliImage(normal(4).expand_as(pixels))
    assert_close(image.log_prob(pixels).exp().sum(), torch.ones((), dtype=torch.float64))
    certain = BernoulliImage(torch.tensor([[200.0, -200.0]]))
    assert certain.log_prob(torch.tensor([[1.0, 0.0]])) == 0
    assert certain.log_prob(torch.tensor([[0.0, 1.0]])) == -400


def test_grey_target_is_the_mean_over_binarisations() -> None:
    grey = normal(1, 4, seed=3).sigmoid()
    pixels = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    weight = (pixels * grey + (1 - pixels) * (1 - grey)).prod(1)  # probability of each binary image
    image = BernoulliImage(normal(1, 4))
    binary = BernoulliImage(image.logits.expand_as(pixels)).log_prob(pixels)
    assert_close(image.log_prob(grey)[0], (weight * binary).sum())
