r"""Flows are densities: they integrate to one, their log|det| is autograd's, they can be undone at any length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.testing import assert_close

from svae_lib.densities import DiagonalGaussian
from svae_lib.errors import UserError
from svae_lib.flows import (
    NEWTON_LIMIT,
    FlowDensity,
    FlowEncoder,
    InverseAutoregressiveLayers,
    Planar,
    PlanarLayers,
    SplineLayers,
    _Root,
    dot,
    newton,
    slope,
)

WIDTH = 3  # features of the conditional flows
REAL = torch.float64


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(REAL)
    yield
    torch.set_default_dtype(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=REAL)


def layers(kind: str, dim: int, length: int, seed: int = 0, size: float = 1.0) -> nn.Module:
    r"""Layers with parameters of the given size, so that they bend; amortised ones depend on their features."""
    torch.manual_seed(seed)
    if kind == "spline":
        return SplineLayers(dim, length, WIDTH, hidden=8)
    if kind == "iaf":
        return InverseAutoregressiveLayers(dim, length, WIDTH, hidden=8)
    made = PlanarLayers(dim, length, WIDTH if kind == "amortised" else 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    return made


def density(kind: str, batch: int, dim: int, length: int, seed: int = 0, size: float = 1.0) -> FlowDensity:
    base = DiagonalGaussian(0.5 * normal(batch, dim, seed=seed + 1), 0.3 * normal(batch, dim, seed=seed + 2))
    return FlowDensity(base, layers(kind, dim, length, seed, size)(normal(batch, WIDTH, seed=seed + 3)))


KINDS = ("shared", "amortised", "spline", "iaf")
everywhere = pytest.mark.parametrize(("kind", "dim", "length"), [(k, d, n) for k in KINDS for d, n in [(1, 2), (4, 3)]])


def autograd_log_det(d: FlowDensity, z: Tensor) -> Tensor:
    r"""log|det| of the map at each sample, from its full Jacobian; one map per sample."""
    full = torch.autograd.functional.jacobian(lambda t: d.map.forward(t)[0], z)
    return torch.stack([full[i, :, i].slogdet().logabsdet for i in range(len(z))])


@everywhere
@pytest.mark.parametrize("seed", range(3))
def test_log_det_is_that_of_autograd(kind: str, dim: int, length: int, seed: int) -> None:
    d, z = density(kind, 5, dim, length, seed), normal(5, dim, seed=9)
    y, log_det = d.map.forward(z)
    expected = autograd_log_det(d, z)
    assert_close(log_det, expected, rtol=0, atol=1e-10)
    assert_close(d.map.inverse(y)[1], expected, rtol=0, atol=1e-8)
    assert not torch.allclose(-log_det, expected, rtol=0, atol=1e-3)  # the wrong sign would be seen


@everywhere
def test_a_draw_knows_its_density_and_the_inverse_agrees(kind: str, dim: int, length: int) -> None:
    d, noise = density(kind, 7, dim, length), normal(7, dim, seed=9)
    y, own = d.rsample_and_log_prob(noise)
    assert y.shape == (7, dim) and own.shape == (7,)
    assert torch.equal(y, d.rsample(noise))
    assert_close(d.log_prob(y), own, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_densities_integrate_to_one_and_wrong_ones_do_not(kind: str, seed: int) -> None:
    ticks = torch.linspace(-9, 9, 201)
    grid, area = torch.cartesian_prod(ticks, ticks), (ticks[1] - ticks[0]) ** 2
    d = density(kind, 1, 2, 4, seed, size=0.2)  # one density, broadcast over the grid
    with torch.no_grad():
        z, log_det = d.map.inverse(grid)
        base, log_q = d.base.log_prob(z), d.log_prob(grid)
    tolerance = 5e-3 if kind in ("spline", "iaf") else 1e-5  # of the trapezoid rule; ReLUs and splines have kinks
    assert abs(log_q.exp().sum() * area - 1) < tolerance
    for wrong in (base, base + log_det):  # dropped, and with the wrong sign
        assert abs(wrong.exp().sum() * area - 1) > 10 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh())
    encoder, u = FlowEncoder(body, WIDTH, 3, layers(kind, 3, 2)), normal(6, 2)
    value = normal(6, 3, seed=1)
    for loss in (
        lambda d: d.log_prob(value).sum(),
        lambda d: d.rsample_and_log_prob(value)[1].sum(),
        lambda d: d.rsample(value).square().sum(),
    ):
        encoder.zero_grad()
        loss(encoder(u)).backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["shared", "amortised"])
def test_the_gradient_of_the_inverse_is_the_implicit_one(kind: str) -> None:
    shape = (3, 2, 2) if kind == "amortised" else (2, 2)
    w, u, b, y = normal(*shape), normal(*shape, seed=1), normal(*shape[:-1], seed=2), normal(3, 2, seed=3)
    inputs = [t.requires_grad_() for t in (w, u, b, y)]

    def inverse(w: Tensor, u: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return Planar(w, u, b).inverse(y)

    assert gradcheck(inverse, inputs)
    assert gradgradcheck(inverse, inputs)  # penalties on gradients may pass through, too


def test_a_wrong_implicit_gradient_would_be_seen() -> None:
    class Wrong(_Root):
        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, s = ctx.saved_tensors
            return grad / slope(a.tanh(), s), grad * a.tanh() / slope(a.tanh(), s)  # sign of ds

    c, s = normal(5).requires_grad_(), normal(5, seed=1).exp().requires_grad_()
    assert gradcheck(_Root.apply, (c, s))
    assert not gradcheck(Wrong.apply, (c, s), raise_exception=False)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(log_s=st.floats(-36, 14), log_c=st.floats(-46, 14), positive=st.booleans())
def test_newton_solves_every_layer(log_s: float, log_c: float, positive: bool) -> None:
    r"""From s = machine epsilon, where the layer all but folds, to 10⁶; the residual is round-off."""
    s, c = torch.tensor([math.exp(log_s)]), torch.tensor([math.exp(log_c) * (1 if positive else -1)])
    a, steps = newton(c, s)
    largest = c.abs() + a.abs() + (s - 1).abs() * a.tanh().abs()
    assert ((a + (s - 1) * a.tanh() - c).abs() <= 4e-16 * largest).all()
    assert steps < 40 < NEWTON_LIMIT


def test_newton_in_a_batch_in_single_precision_and_at_zero() -> None:
    s, c = (8 * normal(10_000)).exp().clamp(2e-7, 1e4).float(), (3 * normal(10_000, seed=1)).float()
    a, steps = newton(c, s)
    assert a.dtype == torch.float32 and steps < 40
    largest = c.abs() + a.abs() + (s - 1).abs() * a.tanh().abs()
    assert ((a + (s - 1) * a.tanh() - c).abs() <= 4e-7 * largest).all()
    assert torch.equal(newton(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]))[0], torch.zeros(3))
    assert torch.equal(newton(c.double(), torch.ones(10_000))[0], c.double())


LENGTHS = {"shared": (1, 8, 80), "amortised": (1, 8, 80), "spline": (1, 8), "iaf": (1, 8)}  # 80 affine layers explode


@pytest.mark.parametrize(("kind", "length"), [(kind, length) for kind in KINDS for length in LENGTHS[kind]])
def test_round_trips(kind: str, length: int) -> None:
    torch.manual_seed(0)
    width = {"shared": 0, "amortised": WIDTH}
    flow = PlanarLayers(5, length, width[kind]) if kind in width else layers(kind, 5, length)
    z = normal(200, 5)
    with torch.no_grad():
        there = flow(normal(200, WIDTH, seed=1))
        y, log_det = there.forward(z)
        back, log_det_back = there.inverse(y)
    assert (back - z).abs().max() < 1e-10
    assert (log_det_back - log_det).abs().max() < 1e-10


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 30.0])
def test_every_layer_is_increasing_along_w(size: float) -> None:
    for seed in range(20):
        flow = Planar(size * normal(6, 4, seed=seed), normal(6, 4, seed=seed + 50), normal(6, seed=seed + 90))
        for w, u_hat, _, s in flow.layers():
            assert s > 0 and u_hat.isfinite().all()
            assert_close(dot(w, u_hat), s - 1, rtol=1e-9, atol=1e-9)
            assert u_hat.norm() < 1e3 / min(size, 1)
    raw = dot(normal(20, 6, 4), normal(20, 6, 4, seed=1))
    assert raw.min() < -1  # without the constraint some layers would fold


def test_u_zero_and_w_zero_are_the_identity_up_to_a_shift() -> None:
    z = normal(5, 3)
    y, log_det = Planar(normal(2, 3), torch.zeros(2, 3), normal(2)).forward(z)
    assert_close(y, z, rtol=0, atol=1e-14)
    assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-14)
    u, b = normal(1, 3), normal(1, seed=1)
    y, log_det = Planar(torch.zeros(1, 3), u, b).forward(z)
    assert_close(y, z + u * b.tanh()[:, None], rtol=0, atol=1e-12)
    assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-14)


def test_one_layer_in_one_dimension_against_torch_distributions() -> None:
    r"""A second way to the same density: torch's own change of variables, with the scalar map spelt out."""
    w, u, b = torch.tensor([[1.3]]), torch.tensor([[-0.4]]), torch.tensor([0.2])

    class Map(torch.distributions.Transform):
        bijective, domain, codomain = True, *[torch.distributions.constraints.real] * 2

        def _inverse(self, y: Tensor) -> Tensor:
            low, high = y - 50, y + 50
            for _ in range(200):  # bisection
                middle = (low + high) / 2
                below = self._call(middle) < y
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            return (low + high) / 2

        def _call(self, z: Tensor) -> Tensor:
            return z + u_hat * (w[0, 0] * z + b[0]).tanh()

        def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self._call(z).sum(), z)[0].log()

    flow = Planar(w, u, b)
    u_hat = flow.layers()[0][1][0]
    y = torch.linspace(-4, 4, 9)[:, None]
    mine = FlowDensity(DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1)), flow).log_prob(y)
    theirs = TransformedDistribution(Independent(Normal(torch.zeros(1), torch.ones(1)), 1), Map())
    assert_close(mine, theirs.log_prob(y), rtol=0, atol=1e-12)


def test_an_amortised_flow_starts_as_the_shared_one_and_then_differs() -> None:
    torch.manual_seed(0)
    shared, features, z = PlanarLayers(2, 3), normal(4, WIDTH), normal(4, 2)
    torch.manual_seed(0)
    amortised = PlanarLayers(2, 3, WIDTH)
    assert_close(amortised(features).forward(z)[0], shared().forward(z)[0], rtol=1e-12, atol=0)
    amortised.linear.weight.data.normal_()
    one, other = (amortised(f).forward(z)[0] for f in (features, features.flip(0)))
    assert not torch.allclose(one, other)


def test_a_flow_encoder_takes_the_place_of_a_gaussian_one_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    for kind in KINDS:
        encoder = FlowEncoder(nn.Linear(10, WIDTH), WIDTH, 2, layers(kind, 2, 3))
        d = encoder(torch.randn(5, 10))
        y = d.rsample()
        assert y.shape == (5, 2) and d.log_prob(y).shape == (5,) and y.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            d = encoder(torch.randn(5, 10))
            y, own = d.rsample_and_log_prob()
        assert y.dtype == own.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PlanarLayers(2, 0), "no planar flow has 0 layers over 2 numbers"),
        (lambda: PlanarLayers(0, 3), "no planar flow has 3 layers over 0 numbers"),
        (lambda: PlanarLayers(2, 3, -1), "made from -1 features"),
        (lambda: SplineLayers(2, 0, WIDTH, 8), "no spline flow has 0 layers"),
        (lambda: InverseAutoregressiveLayers(2, 0, WIDTH, 8), "no inverse autoregressive flow has 0 layers"),
        (lambda: density("shared", 4, 2, 3).log_prob(normal(4, 3)), "over 2 numbers, but the value has 3"),
    ],
)
def test_mistakes_are_named(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
