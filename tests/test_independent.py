r"""Our functions against other people's implementations, on the same tensors, to a relative 1e-5.

pyro has the planar flow, torchmetrics the inception score, zuko the coupling and autoregressive flows, scikit-learn
mixtures of Gaussians, pythae the losses of VAE, IWAE and WAE. What is not installed is skipped.
pythae is not among the requirements: it brings `dataclasses` 0.6, a copy of a module that Python has had since 3.7,
and image readers that nothing here needs. `pip install --no-deps pythae` and `pip install imageio pydantic` suffice.
Each comparison is repeated with a deliberately wrong variant, which must not agree.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.nn.functional import softplus

import svae_lib._torchvision  # noqa: F401  (before whatever imports torchvision)
from svae_lib import ipm, metrics, objectives
from svae_lib.densities import BernoulliImage, DiagonalGaussian
from svae_lib.flows import FlowDensity, InverseAutoregressiveLayers, Planar, SplineLayers
from svae_lib.mixtures import MIXTURES, Mixture

RTOL = 1e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs() / (1 + theirs.abs())).max().item()


def agree(ours: Tensor, theirs: Tensor, *wrong: Tensor) -> None:
    r"""Ours is theirs, and `agree` would have seen each of the wrong ones."""
    assert difference(ours, theirs) <= RTOL
    for variant in wrong:
        assert difference(variant, theirs) > 100 * RTOL


# pythae: VAE, IWAE, WAE -----------------------------------------------------------------------------


class Coder(nn.Module):
    r"""One linear encoder and one Bernoulli decoder of 3 × 3 images."""

    def __init__(self, z_dim: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.pixels = nn.Linear(9, 2 * z_dim), nn.Linear(z_dim, 9)

    def encoder(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.heads(x.flatten(1)).chunk(2, 1))

    def decoder(self, z: Tensor) -> BernoulliImage:
        return BernoulliImage(self.pixels(z).view(-1, 1, 3, 3))


@pytest.fixture
def coder() -> Coder:
    return Coder()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def in_pythae(kind: str, coder: Coder, **settings):
    r"""A model of pythae that has our networks."""
    models = pytest.importorskip("pythae.models", reason="pythae is not a requirement: see the top of this file")
    output = pytest.importorskip("pythae.models.base.base_utils").ModelOutput
    parts = pytest.importorskip("pythae.models.nn")

    class Encoder(parts.BaseEncoder):
        def forward(self, x):
            q = coder.encoder(x)
            return output(embedding=q.mean, log_covariance=q.log_var)

    class Decoder(parts.BaseDecoder):
        def forward(self, z):
            return output(reconstruction=coder.decoder(z).mean)

    config = getattr(models, f"{kind}Config" if kind != "WAE_MMD" else "WAE_MMD_Config")
    config = config(input_dim=(1, 3, 3), latent_dim=2, **settings)
    return getattr(models, kind)(config, Encoder(), Decoder())


def gradients(value: Tensor, coder: Coder) -> Tensor:
    grads = torch.autograd.grad(value, list(coder.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def test_S1_elbo_and_its_gradient_are_those_of_pythae(coder, images):
    theirs = in_pythae("VAE", coder, reconstruction_loss="bce")
    torch.manual_seed(2)
    loss = theirs({"data": images}).loss
    torch.manual_seed(2)
    q = coder.encoder(images)
    log_p = coder.decoder(q.rsample()).log_prob(images)
    ours = -objectives.elbo(log_p, q.kl_to_standard())
    agree(ours, loss, -objectives.elbo(log_p, -q.kl_to_standard()))
    agree(gradients(ours, coder), gradients(loss, coder))


def test_importance_weighted_bound_and_its_gradient_are_those_of_pythae(coder, images):
    nll = in_pythae("VAE", coder, reconstruction_loss="bce").get_nll
    torch.manual_seed(3)
    with torch.no_grad():
        theirs = -torch.tensor([nll(image[None], 40, 40) for image in images])
    torch.manual_seed(3)
    bounds = [metrics.importance_weighted_nll(coder.encoder, coder.decoder, image[None], 40) for image in images]
    ours = torch.cat(bounds)
    agree(ours.double(), theirs, ours.double() + math.log(40))
    iwae = in_pythae("IWAE", coder, reconstruction_loss="bce", number_samples=7)
    bound = metrics.importance_weighted_nll.__wrapped__  # with gradients
    for image in images.split(1):
        torch.manual_seed(4)
        loss = iwae({"data": image}).loss
        torch.manual_seed(4)
        ours = bound(coder.encoder, coder.decoder, image, 7).mean()
        torch.manual_seed(4)
        fewer = bound(coder.encoder, coder.decoder, image, 6).mean()
        agree(gradients(ours, coder), gradients(loss, coder), gradients(fewer, coder))


def test_mmd_is_that_of_pythae(coder, images):
    theirs = in_pythae("WAE_MMD", coder, kernel_choice="rbf", kernel_bandwidth=0.8)
    x_q, x_p = normal(50, 2, seed=5), 0.3 + 1.5 * normal(50, 2, seed=6)
    theirs = theirs.loss_function(images, images, x_q, x_p)[2]

    def kernel(a, b):
        return ipm.gaussian_kernel(a, b, width=0.8 * math.sqrt(2))  # theirs scales with √dim

    biased = kernel(x_q, x_q).mean() + kernel(x_p, x_p).mean() - 2 * kernel(x_q, x_p).mean()
    agree(ipm.mmd2(x_q, x_p, kernel), theirs, biased, ipm.mmd2(x_q, x_p))


# pyro: planar flows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_planar_layer_is_that_of_pyro(seed):
    r"""Pyro moves u along w until wᵀû = log(1 + e^{wᵀu}) − 1, we until wᵀû = e^{wᵀu} − 1 where that is negative.

    Both reach the same layers, so the same layer is written in both ways before it is compared.
    """
    transforms = pytest.importorskip("pyro.distributions.transforms")
    w, u, b = normal(3, seed=seed), normal(3, seed=seed + 10), normal(1, seed=seed + 20)
    z = normal(40, 3, seed=seed + 30)
    theirs = transforms.Planar(3)
    for parameter, value in ((theirs.w, w), (theirs.u, u), (theirs.bias, b)):
        parameter.data.copy_(value)
    y = theirs(z)
    slope = softplus(w @ u)  # 1 + wᵀû
    wanted = slope - 1 if slope >= 1 else slope.log()
    ours = Planar(w[None], (u + (wanted - w @ u) * w / (w @ w))[None], b)
    image, log_det = ours.forward(z)
    agree(image, y, Planar(w[None], u[None], b).forward(z)[0])
    agree(log_det, theirs.log_abs_det_jacobian(z, y), -log_det)
    back, again = ours.inverse(y.detach())  # pyro's has no inverse but the remembered draw
    agree(back, z)
    agree(again, log_det)


def test_planar_flow_of_many_layers_is_a_chain_of_pyros():
    transforms = pytest.importorskip("pyro.distributions.transforms")
    torch.manual_seed(0)
    chain = [transforms.Planar(4) for _ in range(6)]
    for layer in chain:  # wᵀu = 1: pyro's û has wᵀû = log(1 + e) − 1 > 0, which ours takes as it is
        layer.u.data.add_((1 - layer.w @ layer.u) * layer.w / (layer.w @ layer.w))
    base = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
    theirs = TransformedDistribution(base, chain)
    y = theirs.sample((20,))
    u = torch.stack([layer.u_hat(layer.u, layer.w) for layer in chain])
    ours = Planar(torch.stack([layer.w for layer in chain]), u, torch.stack([layer.bias[0] for layer in chain]))
    standard = DiagonalGaussian(torch.zeros(20, 4), torch.zeros(20, 4))
    agree(FlowDensity(standard, ours).log_prob(y), theirs.log_prob(y), standard.log_prob(y))


# zuko: coupling and autoregressive flows ------------------------------------------------------------


def test_spline_density_is_zukos_own_flow():
    torch.manual_seed(0)
    layers, features, y = SplineLayers(3, 4, 2, hidden=16), normal(30, 2), normal(30, 3, seed=1)
    standard = DiagonalGaussian(torch.zeros(30, 3), torch.zeros(30, 3))
    ours = FlowDensity(standard, layers(features)).log_prob(y)
    agree(ours, layers.flow(features).log_prob(y), standard.log_prob(y))


def test_inverse_autoregressive_density_is_zukos_flow_turned_round():
    torch.manual_seed(0)
    layers, features, y = InverseAutoregressiveLayers(3, 4, 2, hidden=16), normal(30, 2), normal(30, 3, seed=1)
    mean, log_var = normal(30, 3, seed=2), 0.3 * normal(30, 3, seed=3)
    base = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    turned = zuko.distributions.NormalizingFlow(layers.flow.transform(features).inv, base)
    ours = FlowDensity(DiagonalGaussian(mean, log_var), layers(features))
    straight = zuko.distributions.NormalizingFlow(layers.flow.transform(features), base)
    agree(ours.log_prob(y), turned.log_prob(y), straight.log_prob(y))
    z = ours.base.rsample(normal(30, 3, seed=4))
    log_det = torch.stack(
        [
            jacobian(lambda row, given=given: layers(given[None]).forward(row[None])[0][0], one).det().abs().log()
            for given, one in zip(features, z.detach(), strict=True)
        ]
    )
    agree(ours.map.forward(z)[1], log_det, torch.zeros(30))


# torchmetrics: inception score -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Metric .InceptionScore. will save")
@pytest.mark.parametrize("splits", [2, 10])
def test_classifier_score_is_torchmetrics_inception_score(splits):
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 2 * normal(503, 10)
    theirs = inception.InceptionScore(feature=nn.Identity(), splits=splits)
    theirs.update(logits)
    torch.manual_seed(7)
    value, spread = theirs.compute()
    torch.manual_seed(7)
    shuffled = logits[torch.randperm(len(logits))]
    ours = metrics.classifier_score(lambda x: x.log_softmax(1), shuffled, splits)
    more = metrics.classifier_score(lambda x: x.log_softmax(1), shuffled, 5 * splits)
    agree(ours["value"], value.double(), more["value"])
    agree(ours["se"], spread.double(), ours["se"] / math.sqrt(splits))


# scikit-learn: mixtures of Gaussians --------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_is_that_of_scikit_learn(name):
    from sklearn.mixture import GaussianMixture

    ours = MIXTURES[name]
    ours = Mixture(ours.centres.double(), ours.std)
    count = len(ours.centres)
    theirs = GaussianMixture(count, covariance_type="spherical")
    theirs.weights_, theirs.means_ = np.full(count, 1 / count), ours.centres.numpy()
    theirs.covariances_ = np.full(count, ours.std**2)
    theirs.precisions_cholesky_ = np.full(count, 1 / ours.std)
    x = ours.centres.repeat(9, 1) + 0.7 * normal(9 * count, 2, seed=8).double()
    wider = Mixture(ours.centres, 1.1 * ours.std)
    agree(ours.log_prob(x), torch.from_numpy(theirs.score_samples(x.numpy())), wider.log_prob(x))
    posterior = torch.from_numpy(theirs.predict_proba(x.numpy()))
    agree(ours.log_posterior(x).exp(), posterior, wider.log_posterior(x).exp().flip(1))
