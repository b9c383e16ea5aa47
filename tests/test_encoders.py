"""Encoders of every kind under every objective: densities at another's point, or one sentence that there is none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from svae_lib import data, experiment, metrics
from svae_lib.densities import DiagonalGaussian, Point
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS
from svae_lib.models import Nets, build_model
from svae_lib.nets import ImplicitEncoder
from svae_lib.train import Trainer, Training

CPU = torch.device("cpu")
FLOWS = ("planar", "iaf", "spline")
NEED_Q = ("svae-r", "wake-sleep", "svae-exact", "svae-elbo", "as-vae", "as-vae-g")  # at another's point
NEED_LOG_Q = (*NEED_Q, "vae")
NEED_NONE = ("svae", "ali", "alice", "as-vae-r", "avb")


def trainer(ring, method, **changes):
    sizes = {"hidden": 16, "critic_hidden": 16, "depth": 2, "flow_length": 3, "batch": 8, "updates": 1}
    return experiment.prepare(Experiment.make("ring8", method, **sizes | changes), ring, CPU)


@pytest.mark.parametrize("encoder", FLOWS)
def test_the_density_at_anothers_point_is_that_of_a_numeric_jacobian(encoder):
    sizes = Nets(z_dim=3, hidden=16, depth=2, norm="none", encoder=encoder, flow_length=3)
    model = build_model(sizes, METHODS["vae"], (2,), 0)
    net = model.encoder.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        q, step = net(torch.randn(5, 2, dtype=torch.float64)), 1e-6
        y = torch.randn(5, 3, dtype=torch.float64)  # drawn by nobody
        z, _ = q.map.inverse(y)
        assert_close(q.map.forward(z)[0], y, rtol=0, atol=1e-8)
        columns = [q.map.forward(z + step * e)[0] - q.map.forward(z - step * e)[0] for e in torch.eye(3).double()]
        jacobian = torch.stack(columns, -1) / (2 * step)
        expected = q.base.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    assert_close(q.log_prob(y), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(q.base.log_prob(z), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("encoder", FLOWS)
@pytest.mark.parametrize("method", NEED_LOG_Q)
def test_flow_encoders_serve_every_objective(ring, method, encoder):
    t = trainer(ring, method, encoder=encoder)
    t.fit()
    gradients = [p.grad for p in t.model.encoder.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0 and math.isfinite(t.history[-1]["objective"])


@pytest.mark.parametrize("method", NEED_LOG_Q)
def test_an_implicit_encoder_is_refused_where_its_density_is_needed(ring, method):
    with pytest.raises(UserError, match="this needs a density where the net only draws"):
        trainer(ring, method, encoder="implicit").fit()


@pytest.mark.parametrize("method", NEED_NONE)
def test_an_implicit_encoder_serves_the_others(ring, method):
    t = trainer(ring, method, encoder="implicit")
    t.fit()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in t.model.encoder.parameters())
    assert "kl" not in t.history[-1]


@pytest.mark.parametrize("method", ["vae", "svae-r", "as-vae-r", "avb", "nf-vae"])
def test_a_point_decoder_is_refused_where_its_density_is_needed(ring, method):
    with pytest.raises(UserError, match="this needs a density where the net only draws"):
        trainer(ring, method, decoder="point").fit()


def test_adaptive_contrast_needs_moments(ring):
    with pytest.raises(UserError, match="adaptive contrast needs the mean and variance of the encoder"):
        trainer(ring, "avb-ac", encoder="planar").fit()
    for encoder in ("implicit", "gaussian"):
        trainer(ring, "avb-ac", encoder=encoder).fit()


def test_the_moments_of_an_implicit_encoder_are_those_of_its_draws():
    torch.manual_seed(0)
    encoder, count = ImplicitEncoder(nn.Linear(4, 16), 16, 2, others=50_000), 20_000
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
        q = encoder(torch.randn(1, 4).expand(count, 4))
    drawn, moments = q.rsample(), q.moments
    error = moments.log_var[0].exp() * (1 / count + 1 / encoder.others)
    assert ((drawn.mean(0) - moments.mean[0]).abs() <= 4 * error.sqrt()).all()
    kurtosis = ((drawn - drawn.mean(0)) / drawn.std(0)).pow(4).mean(0)
    error = ((kurtosis - 1) * (1 / count + 1 / encoder.others)).sqrt()
    assert ((drawn.var(0) / moments.log_var[0].exp() - 1).abs() <= 4 * error).all()
    assert (drawn.var(0) > 0.1).all() and (kurtosis - 3).abs().max() > 0.1, "it is not a Gaussian in disguise"


def test_a_bound_without_a_density_is_made_with_the_moments():
    r"""x = z + noise, z ~ N(0, 1): log p(x) is known, and any reference r gives a bound that tightens to it."""
    x = torch.randn(6, 1)
    r = DiagonalGaussian(0.4 * x, torch.full_like(x, -0.3))  # not the posterior, N(x/2, 1/2)

    def encoder(u):
        return Point(torch.full_like(u, math.nan), DiagonalGaussian(0.4 * u, torch.full_like(u, -0.3)))

    def decoder(z):
        return DiagonalGaussian(z, torch.zeros_like(z))

    exact = -DiagonalGaussian(torch.zeros_like(x), torch.full_like(x, math.log(2))).log_prob(x)
    torch.manual_seed(0)
    distortion, rate = metrics.elbo_parts(encoder, decoder, x.expand(6, 1))
    assert_close(rate, r.kl_to_standard())
    assert_close(metrics.importance_weighted_nll(encoder, decoder, x, 20_000), exact, rtol=0, atol=0.03)
    assert distortion.isfinite().all()


class Plus(nn.Module):
    """x = z + ε: of draws from it, N(0, 2), the posterior is N(x/2, 1/2)."""

    def forward(self, z):
        return DiagonalGaussian(z, torch.zeros_like(z))


@pytest.mark.parametrize("method", ["avb", "avb-ac"])
def test_avb_learns_a_known_posterior(method):
    r"""Mean and variance to 0.2, from draws alone; before training the error is several times that."""
    x = 2**0.5 * torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    split = data.Split(x, torch.zeros(512))
    row, exact = METHODS[method], DiagonalGaussian(x / 2, torch.full_like(x, math.log(0.5)))
    sizes = Nets(z_dim=1, hidden=16, critic_hidden=16, norm="none", critic_norm="none", critic_dropout=0.0)
    model = build_model(replace(sizes, encoder="implicit"), row, (1,), 0)
    model.decoder = Plus()
    training = Training(updates=300, batch=128, lr=1e-3, critic_lr=1e-2, beta1=0.5, log_every=300)
    t = Trainer(model, row, training, split, split, 0)

    def errors():
        with torch.no_grad():
            r = model.encoder(x).moments
        return (r.mean - exact.mean).square().mean().sqrt(), (r.log_var.exp() - 0.5).abs().mean()

    assert max(errors()) > 0.4
    t.fit()
    assert max(errors()) < 0.2
