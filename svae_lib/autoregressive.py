r"""Images as sequences of pixels: p(x) = Π p(pixel | the pixels above it and to its left), exactly and without codes.

A pixel model takes the place of a decoder and ignores z: `model(z)` is one density for all z, with which log p(x) is
the marginal likelihood itself, not a bound. Grey levels 0..255 stand for x = level / 255 in [0, 1]; the
probabilities of the 256 levels sum to one. Models differ in how they look at earlier pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, elu, log_softmax, logsigmoid, pad

from svae_lib.errors import UserError

LEVELS = 256
LOG_SCALE_LIMIT = 7.0  # of [−1, 1]: at −7 one cell holds all the mass (Salimans et al. 2017), at 7 the open ends do


def levels(x: Tensor) -> Tensor:
    r"""Grey in [0, 1] -> integer levels 0..255."""
    return (x * (LEVELS - 1)).round().long()


# What is said about one pixel ------------------------------------------------------------------------


class Softmax(NamedTuple):
    r"""256 free probabilities for each channel; logits (B, C, 256, H, W). Source: van den Oord et al. 2016."""

    logits: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        r"""log p of each pixel in nats, summed over its channels; (B, C, H, W) -> (B, H, W)."""
        return log_softmax(self.logits, 2).gather(2, levels(x)[:, :, None]).squeeze(2).sum(1)

    def sample(self) -> Tensor:
        r"""Levels / 255, (B, C, H, W)."""
        probabilities = self.logits.movedim(2, -1).softmax(-1)
        drawn = probabilities.flatten(0, -2).multinomial(1).reshape(probabilities.shape[:-1])
        return drawn.to(self.logits.dtype) / (LEVELS - 1)


class LogisticMixture(NamedTuple):
    r"""K discretised logistics, with colours coupled linearly inside each component. Source: Salimans et al. 2017.

    On the axis [−1, 1] a level's cell is 2/255 wide; the cells of 0 and 255 are open. Component k gives channel c
    the centre μ_kc + Σ_{b<c} a_kcb x_b, x_b being the earlier channels: the masses of the 256^C colours sum to one.
    logits (B, K, H, W), centre and log_scale (B, K, C, H, W), coupling (B, K, C, C, H, W), of which b < c is used.
    """

    logits: Tensor
    centre: Tensor
    log_scale: Tensor
    coupling: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        r"""log p of each pixel's colour in nats; (B, C, H, W) -> (B, H, W).

        With a < b the ends of a cell in scales, log[σ(b) − σ(a)] = log σ(b) + log σ(−a) + log(1 − e^{a−b}): no
        term cancels another, so nothing is clamped, however far the cell is from the centre.
        """
        x = (2 * x - 1)[:, None]
        channels = range(x.shape[2])
        centre = torch.stack([self.moved_centre(x, c) for c in channels], 2)
        rate = (-self.log_scale).exp()
        half = 1 / (LEVELS - 1)
        below, above = (x - half - centre) * rate, (x + half - centre) * rate
        first, last = x < half - 1, x > 1 - half
        mass = torch.where(last, 0, logsigmoid(above)) + torch.where(first, 0, logsigmoid(-below))
        mass = mass + torch.where(first | last, 0, torch.log(-torch.expm1(-2 * half * rate)))
        return (log_softmax(self.logits, 1) + mass.sum(2)).logsumexp(1)

    def moved_centre(self, x: Tensor, channel: int) -> Tensor:
        r"""μ_c + Σ_{b<c} a_cb x_b; x (B, 1, C, H, W) in [−1, 1] -> (B, K, H, W)."""
        earlier = self.coupling[:, :, channel, :channel] * x[:, :, :channel]
        return self.centre[:, :, channel] + earlier.sum(2)

    def sample(self) -> Tensor:
        r"""Levels / 255, (B, C, H, W): a component per pixel, then its channels one after another."""
        k = self.logits.movedim(1, -1).softmax(-1)
        k = k.flatten(0, -2).multinomial(1).reshape(k.shape[:-1])[:, None]
        x = torch.zeros_like(self.centre[:, :1])
        for c in range(x.shape[2]):
            centre, log_scale = (t.gather(1, k)[:, 0] for t in (self.moved_centre(x, c), self.log_scale[:, :, c]))
            noise = torch.rand_like(centre).logit()  # of a standard logistic
            grey = ((centre + log_scale.exp() * noise + 1) / 2).clamp(0, 1)
            x[:, 0, c] = 2 * levels(grey).to(x.dtype) / (LEVELS - 1) - 1  # the next sees the level
        return (x[:, 0] + 1) / 2


# The density of a whole image ------------------------------------------------------------------------


class PixelDensity(NamedTuple):
    r"""p(x) of a pixel model, for `count` images."""

    model: PixelModel
    count: int

    def log_prob(self, value: Tensor) -> Tensor:
        r"""log p(x) = Σ log p(pixel | earlier pixels) in nats; levels / 255 (B, C, H, W) -> (B,)."""
        return self.model.pixels(value).log_prob(value).flatten(1).sum(1)

    @torch.no_grad()
    def rsample(self, noise: Tensor | None = None) -> Tensor:
        r"""Images (count, C, H, W), pixel by pixel in H · W · `passes` passes; no gradient leads back from them."""
        channels, height, width = self.model.shape
        x = next(self.model.parameters()).new_zeros(self.count, channels, height, width)
        for row in range(height):
            for column in range(width):
                for channel in range(self.model.passes):
                    pixels = self.model.pixels(x[:, :, : row + 1])  # rows below have no say
                    here = type(pixels)(*(t[..., row : row + 1, column : column + 1] for t in pixels))
                    x[:, channel:, row, column] = here.sample()[:, channel:, 0, 0]
        return x

    @property
    def mean(self) -> Tensor:
        r"""A draw: an average of images is not an image, and a draw here is as free of pixel noise as the data."""
        return self.rsample()


class PixelModel(nn.Module):
    r"""A net that says p(pixel | earlier pixels) for all pixels at once. z (B, ...) -> PixelDensity.

    A pixel's channels are said in `passes` passes: one if the distribution itself couples them, else one for each.
    """

    def __init__(self, shape: tuple[int, int, int], passes: int) -> None:
        super().__init__()
        self.shape, self.passes = shape, passes

    def forward(self, z: Tensor) -> PixelDensity:
        return PixelDensity(self, len(z))

    def pixels(self, x: Tensor) -> Softmax | LogisticMixture:
        r"""The distribution of each pixel given those before it; x (B, C, h, W), h ≤ H rows from the top."""
        raise NotImplementedError


# PixelCNN++ ------------------------------------------------------------------------------------------


class Shifted(nn.Conv2d):
    r"""A convolution that sees no row below and, with `right`, no column to the right of its place."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], right: bool) -> None:
        super().__init__(inputs, outputs, size)
        rows, columns = size[0] - 1, size[1] - 1
        self.sides = (columns, 0, rows, 0) if right else (columns // 2, columns // 2, rows, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.sides))


def lower(x: Tensor) -> Tensor:
    r"""Every row moved one down: the place of a pixel now sees only rows above it."""
    return pad(x, (0, 0, 1, 0))[:, :, :-1]


def later(x: Tensor) -> Tensor:
    r"""Every column moved one to the right: the place of a pixel now sees only columns before it."""
    return pad(x, (1, 0))[..., :-1]


def both_signs(x: Tensor) -> Tensor:
    r"""elu of x and of −x; (B, n, H, W) -> (B, 2n, H, W)."""
    return elu(torch.cat([x, -x], 1))


class Gated(nn.Module):
    r"""x + a σ(b), (a, b) made from x by two shifted convolutions, and from `other` in between."""

    def __init__(self, width: int, size: tuple[int, int], right: bool, dropout: float) -> None:
        super().__init__()
        self.one = Shifted(2 * width, width, size, right)
        self.other = nn.Conv2d(2 * width, width, 1) if right else None
        self.two = Shifted(2 * width, 2 * width, size, right)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        inner = self.one(both_signs(x))
        if other is not None:
            inner = inner + self.other(both_signs(other))
        a, b = self.two(self.dropout(both_signs(inner))).chunk(2, 1)
        return x + a * b.sigmoid()


class PixelCNN(PixelModel):
    r"""PixelCNN++: a stream of the rows above, one of the pixels to the left fed by it, and a logistic mixture.

    `depth` gated blocks of `hidden` channels in each stream, all at full resolution: the published net also works at
    a half and a quarter of it, which only images larger than 32 × 32 would need. Xavier weights, no weight norm.
    Source: Salimans et al. 2017.
    """

    def __init__(
        self, shape: tuple[int, int, int], hidden: int, depth: int, dropout: float = 0.0, components: int = 10
    ) -> None:
        super().__init__(shape, passes=1)
        channels, self.components = shape[0], components
        self.above = Shifted(channels + 1, hidden, (2, 3), right=False)
        self.above_here = Shifted(channels + 1, hidden, (1, 3), right=False)
        self.left = Shifted(channels + 1, hidden, (2, 1), right=True)
        self.down = nn.ModuleList(Gated(hidden, (2, 3), False, dropout) for _ in range(depth))
        self.right = nn.ModuleList(Gated(hidden, (2, 2), True, dropout) for _ in range(depth))
        self.out = nn.Conv2d(hidden, components * (1 + 2 * channels + channels**2), 1)

    def pixels(self, x: Tensor) -> LogisticMixture:
        seen = pad(2 * x - 1, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones tells the image from its border
        rows = lower(self.above(seen))
        pixels = lower(self.above_here(seen)) + later(self.left(seen))
        for down, right in zip(self.down, self.right, strict=True):
            rows = down(rows)
            pixels = right(pixels, rows)
        channels = x.shape[1]
        made = self.out(elu(pixels)).to(self.out.weight.dtype).unflatten(1, (self.components, -1))
        logits, centre, log_scale, coupling = made.split([1, channels, channels, channels**2], 2)
        coupling = coupling.tanh().unflatten(2, (channels, channels))
        return LogisticMixture(logits.squeeze(2), centre, log_scale.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT), coupling)


# PixelRNN --------------------------------------------------------------------------------------------


class Masked(nn.Conv2d):
    r"""A convolution that sees earlier pixels, and of its own pixel the channels in the groups before its own.

    `of_input`, `of_output` are the group (colour) of each channel. With `own` it sees its own group too: all
    convolutions but the first, whose input is the image itself.
    """

    def __init__(self, of_input: Tensor, of_output: Tensor, size: int, own: bool) -> None:
        super().__init__(len(of_input), len(of_output), size, padding=size // 2)
        before = torch.arange(size**2).reshape(size, size) < size**2 // 2
        mask = before.expand(len(of_output), len(of_input), size, size).clone()
        mask[:, :, size // 2, size // 2] = of_input <= of_output[:, None] if own else of_input < of_output[:, None]
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def skew(x: Tensor) -> Tensor:
    r"""Row r moved r to the right, so that a column holds a diagonal; (B, n, H, W) -> (B, n, H, W + H − 1)."""
    *batch, height, width = x.shape
    return pad(x, (0, height)).flatten(-2)[..., :-height].reshape(*batch, height, width + height - 1)


def unskew(x: Tensor) -> Tensor:
    r"""The image behind `skew`; (B, n, H, W + H − 1) -> (B, n, H, W)."""
    *batch, height, columns = x.shape
    return pad(x.flatten(-2), (0, height)).reshape(*batch, height, columns + 1)[..., : columns + 1 - height]


class DiagonalLSTM(nn.Module):
    r"""An LSTM that runs over diagonals: the state of a pixel follows those of its left and upper neighbours."""

    def __init__(self, groups: Tensor) -> None:
        super().__init__()
        self.of_input = Masked(groups, groups.repeat(4), 1, own=True)
        self.of_state = nn.Conv2d(len(groups), 4 * len(groups), (2, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs = skew(self.of_input(x)).to(self.of_state.weight.dtype)  # fp32 under autocast too
        h = c = x.new_zeros(*x.shape[:3], 1, dtype=inputs.dtype)
        states = []
        for diagonal in inputs.split(1, -1):
            gates = diagonal + self.of_state(pad(h, (0, 0, 1, 0)))
            forget, keep, out, new = gates.chunk(4, 1)
            c = forget.sigmoid() * c + keep.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
            states.append(h)
        return unskew(torch.cat(states, -1))


class PixelRNN(PixelModel):
    r"""PixelRNN with `depth` residual layers of diagonal bidirectional LSTMs of `hidden` features, and a softmax.

    Diagonal, not row by row: only so does each pixel depend on *all* earlier ones (a Row LSTM sees the triangle above
    it), and it is the variant with the better published likelihoods. Source: van den Oord et al. 2016.
    """

    def __init__(self, shape: tuple[int, int, int], hidden: int, depth: int) -> None:
        channels = shape[0]
        if hidden < channels:
            raise UserError(f"a PixelRNN of {channels} channels needs hidden={channels} or more, not {hidden}")
        super().__init__(shape, passes=channels)
        colours, groups = torch.arange(channels), torch.arange(hidden) * channels // hidden
        self.image = Masked(colours, groups, 7, own=False)
        self.to_right = nn.ModuleList(DiagonalLSTM(groups) for _ in range(depth))
        self.to_left = nn.ModuleList(DiagonalLSTM(groups) for _ in range(depth))
        self.joined = nn.ModuleList(Masked(groups, groups, 1, own=True) for _ in range(depth))
        last = Masked(groups, colours.repeat_interleave(LEVELS), 1, own=True)
        self.out = nn.Sequential(nn.ReLU(), Masked(groups, groups, 1, own=True), nn.ReLU(), last)

    def pixels(self, x: Tensor) -> Softmax:
        features = self.image(pad(2 * x - 1, (0, 1)))  # a place behind the last pixel of a row, where it is seen
        for to_right, to_left, joined in zip(self.to_right, self.to_left, self.joined, strict=True):
            from_right = to_left(features.flip(-1)).flip(-1)
            features = features + joined(to_right(features) + lower(from_right))  # on its own row it would see ahead
        logits = self.out(features[..., :-1]).to(self.image.weight.dtype)
        return Softmax(logits.unflatten(1, (self.shape[0], LEVELS)))
