r"""E_pθ(x,z) log q_φ(z|x), a term of S29 and A11, with a flow encoder: its density at codes that it did not draw."""

from __future__ import annotations

import pytest
import torch
from proof import refuses, same
from torch import Tensor

from svae_lib.exact import World
from svae_lib.flows import FlowDensity, Planar

LINE = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
STEP = LINE[1, 0] - LINE[0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_S29_A11_a_planar_flow_answers_at_decoder_pairs_through_its_inverse(seed: int) -> None:
    r"""Two integrals of p_θ(z|x) log q_φ(z|x): over z with the inverse, and over the base's ε, forwards only."""
    w = World.random(2, 1, seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = (3, 1), (3, 1), (3,)
    flow = Planar(*(0.6 * torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes))
    for parameter in flow:
        parameter.requires_grad_()
    x = w.m[None]  # one datum
    posterior, encoder = w.p_z_given_x.at(x[0]), w.encoder()(x)
    q = FlowDensity(encoder, flow)

    def integral(values: Tensor) -> Tensor:
        return values.sum() * STEP

    backwards = integral(posterior.log_prob(LINE).exp() * q.log_prob(LINE))
    z, log_det = flow.forward(LINE)  # z = T(e), dz = |det| de
    p = (posterior.log_prob(z) + log_det).exp()
    log_base = encoder.log_prob(LINE)
    forwards = integral(p * (log_base - log_det))
    own = integral(log_base.exp() * (log_base - log_det))  # E_qφ log q_φ, which needs no inverse
    same(backwards, forwards)
    refuses(backwards, own, integral(p * log_base), integral(p * (log_base + log_det)))

    slopes = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, flow, retain_graph=True)])
        for v in (backwards, forwards, own)
    ]
    same(slopes[0], slopes[1])  # the implicit function theorem against plain autograd
    refuses(slopes[0], slopes[2], -slopes[1])
