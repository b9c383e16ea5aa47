"""The nets of a run: sizes, every encoder, decoder and critic, refusals; one seed, one set of weights."""

import pytest
import torch
from torch import nn

from svae_lib.densities import BernoulliImage, DiagonalGaussian, Point
from svae_lib.draws import Method
from svae_lib.errors import UserError
from svae_lib.flows import FlowDensity
from svae_lib.models import DECODERS, ENCODERS, PIXEL_BY_PIXEL, Nets, build_model
from svae_lib.nets import LOG_VAR_LIMIT, NORMS, GaussianHead, Noise

IMAGE, POINT = (1, 8, 8), (2,)
SMALL = dict(z_dim=3, hidden=16, critic_hidden=16, flow_length=2)
shapes = pytest.mark.parametrize("shape", [IMAGE, POINT], ids=["image", "point"])


def method(*critics, codes=True):
    return Method("toy", "", "–", "–", player=None, critics=critics, codes=codes)


def build(shape, *critics, seed=0, **changes):
    return build_model(Nets(**SMALL | changes), method(*critics), shape, seed)


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"norm": "layer"}, "norm must be one of batch, group, none, not 'layer'"),
        ({"critic_norm": "x"}, "critic_norm must be one of batch, group, none"),
        ({"critic_pool": "max"}, "critic_pool must be one of average, none"),
        ({"encoder": "flow"}, "encoder must be one of gaussian, planar, iaf, spline"),
        ({"decoder": "bernoulli"}, "decoder must be one of gaussian, point"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"critic_dropout": -0.1}, "critic_dropout must be at least 0 and below 1"),
        *(({name: 0}, f"{name} must be positive, not 0") for name in (
            "z_dim", "hidden", "depth", "flow_length", "critic_hidden", "critic_outputs"
        )),
    ],
)  # fmt: skip
def test_refusals(change, says):
    with pytest.raises(UserError) as caught:
        Nets(**change)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@shapes
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_is_a_density_of_codes_or_says_that_it_is_none(shape, encoder):
    model = build(shape, encoder=encoder)
    q = model.encoder(torch.rand(5, *shape))
    if encoder == "implicit":
        assert isinstance(q, Point) and q.rsample().shape == q.moments.mean.shape == (5, 3)
        return
    assert isinstance(q, DiagonalGaussian if encoder == "gaussian" else FlowDensity)
    z, log_q = q.rsample_and_log_prob()
    assert z.shape == (5, 3) and log_q.shape == (5,) and q.log_prob(z).isfinite().all()
    assert model.z_dim == 3


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name not in PIXEL_BY_PIXEL])
def test_decoders_have_the_shape_of_the_data(decoder):
    model = build(POINT, decoder=decoder)
    p = model.decoder(torch.randn(5, 3))
    assert isinstance(p, DiagonalGaussian if decoder == "gaussian" else Point) and p.rsample().shape == (5, 2)
    p = build(IMAGE).decoder(torch.randn(5, 3))
    assert isinstance(p, BernoulliImage) and p.mean.shape == (5, *IMAGE)


def test_a_point_has_no_density():
    with pytest.raises(UserError, match="this needs a density"):
        build(POINT, decoder="point").decoder(torch.randn(5, 3)).log_prob(torch.zeros(5, 2))


@shapes
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("kind", ["xz", "x", "xx", "energy"])
def test_every_kind_of_critic_scores_its_arguments(shape, kind, outputs):
    model = build(shape, kind, critic_outputs=outputs, critic_dropout=0.0)
    (critic,) = model.critics
    letters = {"energy": "x"}.get(kind, kind)
    pair = [torch.rand(5, *(shape if letter == "x" else (3,))).requires_grad_() for letter in letters]
    scores = critic.eval()(*pair)
    assert scores.shape == ((5,) if outputs == 1 or kind == "energy" else (5, outputs))
    assert scores.dtype == torch.float32
    slopes = torch.autograd.grad(scores.sum(), pair)
    assert all(slope.flatten(1).norm(dim=1).min() > 0 for slope in slopes), "it sees every argument"
    if kind == "energy":
        assert (scores > 0).all()
    elif kind == "xx":
        assert not torch.allclose(scores, critic(*pair[::-1])), "the two places are not exchangeable"


@shapes
def test_the_critic_of_energies_is_made_as_critics_are(shape):
    model = build(shape, "energy", norm="batch", critic_norm="none", critic_dropout=0.0, instance_noise=0.5)
    (critic,) = model.critics
    assert not [m for m in critic.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    x = torch.rand(5, *shape)
    assert not torch.equal(critic.eval()(x), critic(x))  # the noise is drawn anew


@pytest.mark.parametrize("channels", [4, 20, 64])
def test_group_norm_takes_any_number_of_channels(channels):
    assert NORMS["group"](channels)(torch.rand(2, channels, 3, 3)).shape == (2, channels, 3, 3)


@shapes
def test_two_critics_share_nothing(shape):
    first, second = build(shape, "xz", "xz").critics
    assert count(first) == count(second)
    weights = [dict(net.named_parameters()) for net in (first, second)]
    assert all(weights[0][k].data_ptr() != weights[1][k].data_ptr() for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@shapes
def test_without_codes_there_is_no_encoder(shape):
    model = build_model(Nets(**SMALL), method("x", codes=False), shape, 0)
    assert model.encoder is None and set(model.players) == {"decoder"}


def test_sizes_of_points_by_hand():
    model = build(POINT, "xz", depth=2, norm="none", critic_norm="none")
    body = (2 * 16 + 16) + (16 * 16 + 16)
    assert count(model.encoder) == body + 16 * 6 + 6  # mean and log-variance of 3 codes
    assert count(model.decoder) == (3 * 16 + 16) + (16 * 16 + 16) + 16 * 4 + 4
    assert count(model.critics[0]) == (5 * 16 + 16) + (16 * 16 + 16) + 16 + 1


@shapes
def test_weights_are_xavier_and_biases_zero(shape):
    model = build(shape, "xz", norm="none", critic_norm="none")
    for net in (*model.players.values(), *model.critics):
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                bound = (6 / sum(layer.weight.shape)) ** 0.5
                assert layer.weight.abs().max() <= bound and layer.bias.abs().max() == 0
                if layer.weight.numel() > 500:
                    assert layer.weight.abs().max() > 0.95 * bound


@shapes
def test_same_seed_same_weights_other_seed_others(shape):
    def weights(seed):
        torch.rand(seed + 1)  # whatever was drawn before does not matter
        model = build(shape, "xz", seed=seed)
        return torch.cat([p.detach().flatten() for net in (model.players, *model.critics) for p in net.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@shapes
def test_instance_noise_is_added_in_evaluation_too(shape):
    arguments = torch.rand(5, *shape), torch.randn(5, 3)
    noisy, still = (build(shape, "xz", instance_noise=std).critics[0].eval() for std in (0.5, 0.0))
    assert not torch.equal(noisy(*arguments), noisy(*arguments))
    assert torch.equal(still(*arguments), still(*arguments))


def test_instance_noise_has_the_stated_size():
    x = torch.full((20_000,), 3.0)
    torch.manual_seed(0)
    noise = Noise(0.5).eval()(x) - x
    assert abs(noise.mean()) < 4 * 0.5 / len(x) ** 0.5
    assert abs(noise.std() - 0.5) < 4 * 0.5 / (2 * len(x)) ** 0.5


def test_variances_stay_finite_in_single_precision():
    head = GaussianHead(1, 2)
    nn.init.constant_(head.linear.bias, 500.0)
    nn.init.constant_(head.linear.weight, -1000.0)
    mean, log_var = head(torch.tensor([[0.0], [1.0]]))
    assert mean[:, 0].tolist() == [500, -500] and log_var[:, 0].tolist() == [LOG_VAR_LIMIT, -LOG_VAR_LIMIT]
    assert log_var.exp().isfinite().all() and (-log_var).exp().isfinite().all()


def test_images_of_odd_sides_are_refused():
    with pytest.raises(UserError, match="divisible by 4, not 9×8"):
        build((1, 9, 8))
