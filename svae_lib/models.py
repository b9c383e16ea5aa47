r"""The nets of one run, from the names and sizes of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from svae_lib import beyond, flows, natural, nets
from svae_lib.augment import Augmented
from svae_lib.autoregressive import PixelCNN, PixelRNN
from svae_lib.draws import Method, Model
from svae_lib.errors import UserError
from svae_lib.levels import Axis, Cells, Grey

ENCODERS = ("gaussian", "planar", "iaf", "spline", "implicit")
PIXEL_BY_PIXEL = ("pixelcnn", "pixelrnn")
DECODERS = ("gaussian", "point", *PIXEL_BY_PIXEL)


@dataclass(frozen=True)
class Nets:
    r"""Sizes and switches of the nets; the defaults are the literal reading of A.1."""

    architecture: str = "a1"  # of images: a1, a2, a3 of the appendix, authors, or with `channels` dcgan and beyond
    channels: int = 64  # of the largest feature maps of dcgan and beyond; they double when the sides halve
    z_dim: int = 64
    hidden: int = 128  # width of every "MLP": unstated
    depth: int = 2  # hidden layers of the nets of points, and of the pixel models
    encoder: str = "gaussian"
    flow_length: int = 80  # layers of a flow encoder (A §5.2)
    decoder: str = "gaussian"  # "point" adds no noise. Of images a1 and dcgan say Bernoulli pixels; or a pixel model
    components: int = 1  # decoders that are mixed with learned weights (`nets.MixtureGenerator`)
    norm: str = "batch"
    dropout: float = 0.0  # in encoder and decoder; dcgan's decoder, the authors' nets and the PixelRNN have none
    critic_hidden: int = 128
    critic_norm: str = "batch"
    critic_dropout: float = 0.2  # "dropout", without a rate or a place (S §6); ALI has it in the critic
    critic_pool: str = "average"  # of a1, a2 and a3
    critic_outputs: int = 1  # more than one: features, for the methods that compare them
    instance_noise: float = 0.0
    spectral: bool = False  # spectral norm of every layer of the critics (Miyato et al. 2018)
    augment: bool = False  # critics see images through DiffAugment (`svae_lib.augment`)

    def __post_init__(self) -> None:
        for name, known in (
            ("architecture", FAMILIES),
            ("norm", nets.NORMS),
            ("critic_norm", nets.NORMS),
            ("critic_pool", nets.POOLS),
            ("encoder", ENCODERS),
            ("decoder", DECODERS),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")
        for name in ("dropout", "critic_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        sizes = ("channels", "z_dim", "hidden", "depth", "flow_length", "components", "critic_hidden", "critic_outputs")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.instance_noise < 0:
            raise UserError(f"instance_noise must not be negative, not {self.instance_noise}")

    @property
    def axis(self) -> Axis:
        r"""What grey levels are to these nets: probabilities, or intervals where x has a density."""
        return Cells if self.architecture in natural.ARCHITECTURES and self.decoder not in PIXEL_BY_PIXEL else Grey


def build_model(sizes: Nets, method: Method, shape: tuple[int, ...], seed: int) -> Model:
    r"""Freshly initialised nets for images (C, H, W) or points (d,), determined by the seed.

    Every critic has a buffer `multiplier`, zero, for a method whose critic is constrained (`Method.after_critic`).
    """
    if sizes.decoder in PIXEL_BY_PIXEL and (method.codes or method.critics):
        raise UserError(f"a {sizes.decoder} has no codes and no differentiable draws; use the method {sizes.decoder}")
    torch.manual_seed(seed)
    make = _image_nets if len(shape) == 3 else _point_nets
    make_encoder, make_decoder, make_critic = make(sizes, shape)
    encoder = make_encoder() if method.codes else None
    several = sizes.components > 1 or "components" in method.defaults
    decoder = nets.MixtureGenerator([make_decoder() for _ in range(sizes.components)]) if several else make_decoder()
    critics = [make_critic(kind) for kind in method.critics]
    for net in [*filter(None, (encoder, decoder)), *critics]:
        nets.init_dcgan(net) if sizes.architecture in ("dcgan", "authors") else nets.init_xavier(net)
    critics = [_constrained(critic, sizes) for critic in critics]
    return Model(encoder, decoder, critics, sizes.z_dim, sizes.axis)


def _constrained(critic: nn.Module, sizes: Nets) -> nn.Module:
    if sizes.spectral:
        for layer in critic.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                spectral_norm(layer)
    critic = Augmented(critic) if sizes.augment else critic
    critic.register_buffer("multiplier", torch.zeros(()))
    return critic


def _encoder(body: nn.Module, width: int, sizes: Nets) -> nn.Module:
    z_dim = sizes.z_dim
    if sizes.encoder == "implicit":
        return nets.ImplicitEncoder(body, width, z_dim)
    layers = {
        "gaussian": lambda: None,
        "planar": lambda: flows.PlanarLayers(z_dim, sizes.flow_length, width),
        "iaf": lambda: flows.InverseAutoregressiveLayers(z_dim, sizes.flow_length, width, width),
        "spline": lambda: flows.SplineLayers(z_dim, sizes.flow_length, width, width),
    }[sizes.encoder]()
    return flows.FlowEncoder(body, width, z_dim, layers)


class _Family(NamedTuple):
    """What an architecture says of images; `features` and `critic_features` come with their number."""

    features: Callable[[int, str, float], tuple[nn.Module, int]]  # hidden, norm, dropout
    decoder: Callable[[int], nn.Module]  # numbers in the code
    critic_features: Callable[[str, float], tuple[nn.Module, int]]  # norm, dropout
    encoder: Callable[[], nn.Module] | None = None  # if it is not made of `features`
    code_features: Callable[[], tuple[nn.Module, int]] | None = None  # if they are not an MLP
    joint: Callable[[str, int], nn.Module | None] = lambda kind, width: None  # of a critic, if it is not an MLP


def _a1(sizes: Nets, shape: tuple[int, int, int]) -> _Family:
    return _Family(
        lambda hidden, norm, dropout: (nets.a1_features(shape, hidden, norm, dropout), hidden),
        lambda z_dim: nets.A1Decoder(shape, z_dim, sizes.hidden, sizes.norm, sizes.dropout),
        lambda norm, dropout: nets.a1_critic_features(shape, norm, dropout, sizes.critic_pool),
    )


def _dcgan(sizes: Nets, shape: tuple[int, int, int]) -> _Family:
    def features(hidden: int, norm: str, dropout: float) -> tuple[nn.Module, int]:
        of_x, width = nets.dcgan_features(shape, sizes.channels, norm, dropout)
        return nn.Sequential(of_x, nn.Linear(width, hidden), nn.LeakyReLU(0.2)), hidden

    return _Family(
        features,
        lambda z_dim: nets.DCGANDecoder(shape, z_dim, sizes.channels, sizes.norm),
        lambda norm, dropout: nets.dcgan_features(shape, sizes.channels, norm, dropout),
        joint=lambda kind, width: nn.Linear(width, sizes.critic_outputs) if kind == "x" else None,  # as published
    )


def _appendix(sizes: Nets, shape: tuple[int, int, int]) -> _Family:
    plan, noise = natural.APPENDICES[sizes.architecture], sizes.decoder != "point"

    def features(hidden: int, norm: str, dropout: float) -> tuple[nn.Module, int]:
        of_x, width = natural.encoder_features(plan, shape, norm, dropout)
        if sizes.encoder == "gaussian":  # two heads on the features, as printed
            return of_x, width
        return nn.Sequential(of_x, *nets.mlp(width, hidden, 1, dropout=dropout)), hidden

    return _Family(
        features,
        lambda z_dim: natural.Decoder(plan, shape, z_dim, sizes.norm, sizes.dropout, noise),
        lambda norm, dropout: natural.critic_features(plan, shape, norm, dropout, sizes.critic_pool),
    )


def _authors(sizes: Nets, shape: tuple[int, int, int]) -> _Family:
    if sizes.encoder != "gaussian":
        raise UserError(f"the authors' nets have no {sizes.encoder} encoder; use another --setting")
    return _Family(
        lambda hidden, norm, dropout: natural.authors_critic_features(shape, norm, dropout),
        lambda z_dim: natural.AuthorsDecoder(shape, z_dim, sizes.norm),
        lambda norm, dropout: natural.authors_critic_features(shape, norm, dropout),
        lambda: natural.AuthorsEncoder(shape, sizes.z_dim, sizes.norm),
        lambda: natural.authors_code_features(sizes.z_dim),
        lambda kind, width: nn.Linear(width, sizes.critic_outputs),
    )


def _beyond(sizes: Nets, shape: tuple[int, int, int]) -> _Family:
    if sizes.encoder != "gaussian":
        raise UserError(f"the nets of architecture=beyond have no {sizes.encoder} encoder; use another --setting")
    channels, places = sizes.channels, beyond.SIDE**2

    def features(norm: str, dropout: float) -> tuple[nn.Module, int]:
        of_x, width = beyond.features(shape, channels, norm, dropout)
        return of_x, width * places

    def joint(kind: str, width: int) -> nn.Module:
        return beyond.joint(width // places, sizes.critic_norm, sizes.critic_dropout, sizes.critic_outputs)

    noise = sizes.decoder != "point"
    return _Family(
        lambda hidden, norm, dropout: features(norm, dropout),
        lambda z_dim: beyond.Decoder(shape, z_dim, channels, sizes.norm, sizes.dropout, noise),
        features,
        lambda: beyond.Encoder(shape, sizes.z_dim, channels, sizes.norm, sizes.dropout),
        lambda: (nn.Identity(), sizes.z_dim),
        joint,
    )


FAMILIES = {"a1": _a1, "dcgan": _dcgan, "a2": _appendix, "a3": _appendix, "authors": _authors, "beyond": _beyond}


def _image_nets(sizes: Nets, shape: tuple[int, ...]) -> tuple[Callable[..., nn.Module], ...]:
    family = FAMILIES[sizes.architecture](sizes, shape)

    def encoder() -> nn.Module:
        if family.encoder is not None:
            return family.encoder()
        return _encoder(*family.features(sizes.hidden, sizes.norm, sizes.dropout), sizes)

    def decoder() -> nn.Module:
        if sizes.decoder == "pixelcnn":
            return PixelCNN(shape, sizes.hidden, sizes.depth, sizes.dropout)
        if sizes.decoder == "pixelrnn":
            return PixelRNN(shape, sizes.hidden, sizes.depth)
        return family.decoder(sizes.z_dim)

    def critic(kind: str) -> nn.Module:
        hidden, norm, dropout = sizes.critic_hidden, sizes.critic_norm, sizes.critic_dropout
        if kind == "energy":
            own = FAMILIES[sizes.architecture](replace(sizes, norm=norm, dropout=dropout), shape)
            of_x, width = own.features(hidden, norm, dropout)
            return nn.Sequential(nets.Noise(sizes.instance_noise), nets.Energy(nn.Sequential(of_x, own.decoder(width))))
        parts, width = [], 0
        for letter in kind:
            if letter == "x":
                of_x, features = family.critic_features(norm, dropout)
                parts.append(nn.Sequential(nets.Noise(sizes.instance_noise), of_x))
            elif family.code_features is not None:
                of_z, features = family.code_features()
                parts.append(of_z)
            else:
                parts.append(nets.mlp(sizes.z_dim, features := hidden, 1, dropout=dropout))
            width += features
        joint = family.joint(kind, width)
        return nets.Critic(parts, joint or _scores(nets.mlp(width, hidden, 1, dropout=dropout), sizes))

    return encoder, decoder, critic


def _point_nets(sizes: Nets, shape: tuple[int, ...]) -> tuple[Callable[..., nn.Module], ...]:
    (dim,) = shape
    if sizes.augment or sizes.architecture != "a1":
        what = "augment" if sizes.augment else f"architecture={sizes.architecture}"
        raise UserError(f"{what} needs images, and these data are points")

    def body(inputs: int) -> nn.Module:
        return nets.mlp(inputs, sizes.hidden, sizes.depth, sizes.norm, sizes.dropout)

    def critic_body(inputs: int) -> nn.Module:
        return nets.mlp(inputs, sizes.critic_hidden, sizes.depth, sizes.critic_norm, sizes.critic_dropout)

    def encoder() -> nn.Module:
        return _encoder(body(dim), sizes.hidden, sizes)

    def decoder() -> nn.Module:
        head = nets.GaussianHead if sizes.decoder == "gaussian" else nets.PointHead
        return nn.Sequential(body(sizes.z_dim), head(sizes.hidden, dim))

    def critic(kind: str) -> nn.Module:
        if kind == "energy":
            autoencoder = nn.Sequential(critic_body(dim), nets.PointHead(sizes.critic_hidden, dim))
            return nn.Sequential(nets.Noise(sizes.instance_noise), nets.Energy(autoencoder))
        parts = {"x": nets.Noise(sizes.instance_noise), "z": nn.Identity()}
        inputs = sum({"x": dim, "z": sizes.z_dim}[letter] for letter in kind)
        return nets.Critic([parts[letter] for letter in kind], _scores(critic_body(inputs), sizes))

    return encoder, decoder, critic


def _scores(body: nn.Module, sizes: Nets) -> nn.Module:
    return nn.Sequential(body, nn.Linear(sizes.critic_hidden, sizes.critic_outputs))
