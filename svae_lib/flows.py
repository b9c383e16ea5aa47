r"""Normalizing flows: densities made by bending a Gaussian, for q_φ(z|x) on MNIST (papers A §5, S A.1).

If y = T(z) with z drawn from a base density and T invertible, then

    log q(y) = log base(z) − log|det ∂T/∂z|,   z = T⁻¹(y).

A map T has two methods: `forward(z)` returns T(z), `inverse(y)` returns T⁻¹(y), both with log|det ∂T/∂z| at that z.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import zuko
from torch import Tensor, nn

from svae_lib.densities import DiagonalGaussian
from svae_lib.errors import UserError
from svae_lib.nets import GaussianHead

NEWTON_LIMIT = 100  # steps; the hardest equations in tests/test_flows.py need fewer than 40


class FlowDensity(NamedTuple):
    r"""The density of T(z), z ~ base: what a flow encoder returns, to be used like `DiagonalGaussian`."""

    base: DiagonalGaussian
    map: Planar | Zuko

    @property
    def mean(self) -> Tensor:
        r"""T(base mean), where reconstructions start from; the expectation itself has no closed form."""
        return self.map.forward(self.base.mean)[0]

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        r"""A draw, differentiable in all parameters; `noise` gives the ε of the base."""
        return self.rsample_and_log_prob(noise)[0]

    def rsample_and_log_prob(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""A draw and its own log-density. No inverse is needed, for z is known; -> (B, d), (B,)."""
        z = self.base.rsample(noise)
        y, log_det = self.map.forward(z)
        return y, self.base.log_prob(z) - log_det

    def log_prob(self, value: Tensor) -> Tensor:
        r"""The log-density at *any* point, which S29 and A11 need: through the inverse; (B, d) -> (B,)."""
        dim = self.base.mean.shape[-1]
        if value.shape[-1] != dim:
            raise UserError(f"this density is over {dim} numbers, but the value has {value.shape[-1]}")
        z, log_det = self.map.inverse(value)
        return self.base.log_prob(z) - log_det


def dot(a: Tensor, b: Tensor) -> Tensor:
    r"""aᵀb over the last axis; unlike torch's own products it keeps fp32 under autocast."""
    return (a * b).sum(-1)


def slope(tanh_a: Tensor, s: Tensor) -> Tensor:
    r"""d/da [a + (s − 1) tanh a], as a sum of non-negative terms: nothing cancels, and it is never zero."""
    square = tanh_a.square()
    return square + s * (1 - square)


def newton(c: Tensor, s: Tensor) -> tuple[Tensor, int]:
    r"""Solve a + (s − 1) tanh a = c for a, elementwise, s > 0; also returns the number of steps.

    The left side is odd and increasing, so take c ≥ 0. For a ≥ 0 it is concave if s > 1 and convex if s < 1.
    c/s and c − (s − 1) are both lower bounds of the root if s > 1, upper bounds if s < 1; from there Newton's method
    moves monotonically to the root. A step the other way can only be rounding: the root is found. No tolerance.
    """
    sign, c = c.sign(), c.abs()
    rises = s > 1
    a = torch.where(rises, torch.maximum(c / s, c - (s - 1)), torch.minimum(c / s, c - (s - 1)))
    steps, before = 0, torch.full_like(a, math.nan)
    while steps < NEWTON_LIMIT and not torch.equal(a, before):
        t = a.tanh()
        step = (c - a - (s - 1) * t) / slope(t, s)
        a, before = a + torch.where(rises, step.clamp_min(0), step.clamp_max(0)), a
        steps += 1
    return sign * a, steps


class _Root(torch.autograd.Function):
    r"""`newton` with the derivatives of the implicit function theorem, da = (dc − tanh a · ds) / slope."""

    @staticmethod
    def forward(ctx, c: Tensor, s: Tensor) -> Tensor:
        a, _ = newton(c, s)
        ctx.save_for_backward(a, s)
        return a

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, s = ctx.saved_tensors
        t = a.tanh()
        grad = grad / slope(t, s)
        return grad, -grad * t


class Planar(NamedTuple):
    r"""L layers z ↦ z + û tanh(wᵀz + b) (Rezende and Mohamed 2015); cheap forwards, costly backwards.

    w and u (L, d), b (L,) if all samples share them; (B, L, d) and (B, L) if each sample has its own.
    """

    w: Tensor
    u: Tensor
    b: Tensor

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        r"""(w, û, b, s) of each layer: û is u, moved along w where wᵀu < 0 so that s = 1 + wᵀû = e^{wᵀu} > 0.

        Rezende and Mohamed take s = log(1 + e^{wᵀu}) everywhere; both reach every layer that can be undone.
        """
        along = dot(self.w, self.u)
        moved = nn.functional.elu(along)
        s = (1 + moved).clamp_min(torch.finfo(along.dtype).eps)
        shift = (moved - along) / dot(self.w, self.w).clamp_min(torch.finfo(along.dtype).tiny)
        u_hat = self.u + shift[..., None] * self.w
        return list(zip(self.w.unbind(-2), u_hat.unbind(-2), self.b.unbind(-1), s.unbind(-1), strict=True))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""T(z) and its log|det| = Σ log(1 + wᵀû tanh′(wᵀz + b))."""
        slopes = []
        for w, u, b, s in self.layers():
            t = (dot(z, w) + b).tanh()
            z = z + u * t[..., None]
            slopes.append(slope(t, s))
        return z, torch.stack(slopes).log().sum(0)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""T⁻¹(y) and the log|det| there, last layer first.

        With a = wᵀz + b a layer says wᵀy + b = a + (s − 1) tanh a: one equation in one unknown, `newton`.
        """
        slopes = []
        for w, u, b, s in reversed(self.layers()):
            c = dot(y, w) + b
            t = _Root.apply(c, s.expand_as(c)).tanh()
            y = y - u * t[..., None]
            slopes.append(slope(t, s))
        return y, torch.stack(slopes).log().sum(0)


class Zuko(NamedTuple):
    r"""A transform of zuko from the base to the values; its two directions may differ in cost."""

    transform: torch.distributions.Transform

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(z)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform.inv.call_and_ladj(y)
        return z, -log_det


class PlanarLayers(nn.Module):
    r"""features (B, width) ↦ `Planar` of `length` layers over `dim` numbers, by a linear layer that starts as its bias.

    With width = 0 all samples share the parameters.
    """

    def __init__(self, dim: int, length: int, width: int = 0) -> None:
        super().__init__()
        if dim < 1 or length < 1 or width < 0:
            raise UserError(f"no planar flow has {length} layers over {dim} numbers, made from {width} features")
        self.sizes, self.length = [dim, dim, 1], length  # of w, u, b
        start = nn.Parameter(0.3 * torch.randn(length * sum(self.sizes)))
        if width:
            self.linear = nn.utils.skip_init(nn.Linear, width, len(start))
            nn.init.zeros_(self.linear.weight)
            self.linear.bias = start
        else:
            self.shared = start

    def forward(self, features: Tensor | None = None) -> Planar:
        made = self.linear(features).to(self.linear.bias.dtype) if hasattr(self, "linear") else self.shared
        w, u, b = made.unflatten(-1, (self.length, -1)).split(self.sizes, -1)
        return Planar(w, u, b.squeeze(-1))


class SplineLayers(nn.Module):
    r"""features (B, width) ↦ `Zuko`: `length` spline coupling layers inside [−5, 5], cheap both ways.

    Source: Durkan et al. 2019.
    """

    def __init__(self, dim: int, length: int, width: int, hidden: int) -> None:
        super().__init__()
        if dim < 1 or length < 1:
            raise UserError(f"no spline flow has {length} layers over {dim} numbers")
        self.flow = zuko.flows.NSF(dim, width, transforms=length, passes=2, hidden_features=[hidden, hidden])

    def forward(self, features: Tensor) -> Zuko:
        return Zuko(self.flow.transform(features).inv)


class InverseAutoregressiveLayers(nn.Module):
    r"""features (B, width) ↦ `Zuko`: `length` affine autoregressive layers (Kingma et al. 2016).

    Drawing takes one pass through each layer, the density at another's point as many passes as there are numbers.
    """

    def __init__(self, dim: int, length: int, width: int, hidden: int) -> None:
        super().__init__()
        if dim < 1 or length < 1:
            raise UserError(f"no inverse autoregressive flow has {length} layers over {dim} numbers")
        self.flow = zuko.flows.MAF(dim, width, transforms=length, hidden_features=[hidden])

    def forward(self, features: Tensor) -> Zuko:
        return Zuko(self.flow.transform(features))


class FlowEncoder(nn.Module):
    r"""u ↦ density over `dim` numbers: a body, u ↦ features (B, width), a Gaussian head, and layers that bend it."""

    def __init__(self, body: nn.Module, width: int, dim: int, layers: nn.Module | None) -> None:
        super().__init__()
        self.body, self.head, self.layers = body, GaussianHead(width, dim), layers

    def forward(self, u: Tensor) -> DiagonalGaussian | FlowDensity:
        features = self.body(u)
        base = self.head(features)
        return base if self.layers is None else FlowDensity(base, self.layers(features))
