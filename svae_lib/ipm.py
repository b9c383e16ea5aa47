r"""Integral probability metrics: S25 with one class of critics F after another.

S25 in the book's signs: the critic f, high on decoder draws, maximises E_pθ f − E_q f over F
(`svae_lib.objectives.ipm`), and the decoder lowers the same number (`symmetric`). The paper prints the
critic −f. A class is enforced by what the critic may be (`clip_weights`), by a penalty that is
subtracted from the objective (`gradient_penalty`), or by taking the maximum in closed form.

Batches: f_q, f_p (B,) are scores, phi_q, phi_p (B, m) features and x_q, x_p (B, ...) draws; data or encoder
pairs come first. Tables: log-masses on points x (K,), as in `svae_lib.grid`. Functions of batches return what the
critic **maximises**, or that maximum, and `gradient_penalty` what is taken from it; a `..._critic` is the maximiser on
a table. The name: Müller 1997.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor], Tensor]

# Lipschitz functions: Wasserstein ------------------------------------------------------------------


def wasserstein(x_q: Tensor, x_p: Tensor) -> Tensor:
    r"""S25 with F = {f : |f(x) − f(y)| ≤ |x − y|}, the distance W₁ of two samples of numbers; (B,), (B,) -> scalar.

    Exact: the r-th smallest of one goes to the r-th smallest of the other. In units of x. Source: Vallender 1974.
    """
    return (x_q.sort().values - x_p.sort().values).abs().mean()


def lipschitz_critic(x: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""S25 with F = {f : |f(x) − f(y)| ≤ |x − y|}: the maximiser on a table, zero at the first point; (K,) -> (K,).

    f climbs where data have the larger distribution function and falls where the model has it. x must increase;
    the points need not be equally spaced.
    """
    ahead = (log_q.exp() - log_p.exp()).cumsum(-1)[:-1]
    return torch.cat([x.new_zeros(1), (ahead.sign() * x.diff()).cumsum(-1)])


@torch.no_grad()
def clip_weights(critic: nn.Module, bound: float) -> None:
    r"""S25 with F = {networks with all parameters in [−c, c]}: WGAN, call after each step; changes the critic.

    Such networks are K-Lipschitz for a K that depends on c and on the architecture. Source: Arjovsky et al. 2017.
    """
    for parameter in critic.parameters():
        parameter.clamp_(-bound, bound)


def gradient_penalty(
    critic: Callable[..., Tensor], q: Sequence[Tensor], p: Sequence[Tensor], mix: Tensor, one_sided: bool = False
) -> Tensor:
    r"""S25 with F = {f : ‖∇f‖ ≈ 1 between data and model}: WGAN-GP subtracts λ E(‖∇f(û)‖ − 1)², λ = 10.

    q and p hold the critic's arguments, (x,) or (x, z), each (B, ...); û = mix p + (1 − mix) q with
    mix (B,) uniform on [0, 1]; the norm is over all arguments together. Source: Gulrajani et al. 2017.
    `one_sided` leaves slopes below one alone, F = {f : ‖∇f‖ ≤ 1 between data and model}; the penalised
    objective is then concave in f and has no second maximum. Source: Petzka et al. 2018.
    """
    between = []
    for a, b in zip(q, p, strict=True):
        share = mix.reshape(-1, *[1] * (a.dim() - 1))
        between.append((share * b + (1 - share) * a).detach().requires_grad_())
    slopes = torch.autograd.grad(critic(*between).sum(), between, create_graph=True)
    norm = torch.cat([s.flatten(1) for s in slopes], 1).norm(dim=1)
    excess = norm - 1
    return (excess.relu() if one_sided else excess).square().mean()


# The unit ball of a kernel's space: maximum mean discrepancy -----------------------------------------


def distances(a: Tensor, b: Tensor) -> Tensor:
    r"""‖a − b‖ of all pairs; (A, ...), (B, ...) -> (A, B). Not by a matrix product, which rounds small ones to zero."""
    return torch.cdist(a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def gaussian_kernel(a: Tensor, b: Tensor, width: float = 1.0) -> Tensor:
    r"""k(a, b) = exp(−‖a − b‖²/2w²); (A, ...), (B, ...) -> (A, B)."""
    return (-0.5 * (distances(a, b) / width).square()).exp()


def gaussian_mixture_kernel(a: Tensor, b: Tensor, widths: Sequence[float] = (1, 2, 4, 8, 16)) -> Tensor:
    r"""k(a, b) = Σ_w [exp(−‖a − b‖²/2w²) − 1], so that some width fits; (A, ...), (B, ...) -> (A, B).

    MMD² does not feel the −1, which saves its digits where all features are close. Source, of the widths too:
    Li et al. 2017 (MMD GAN).
    """
    square = distances(a, b).square()
    return sum(torch.expm1(-0.5 * square / width**2) for width in widths)


def energy_kernel(a: Tensor, b: Tensor) -> Tensor:
    r"""k(a, b) = −‖a − b‖, with which MMD² is the energy distance; (A, ...), (B, ...) -> (A, B).

    Positive definite only against weights that sum to zero, which is all that S25 needs. Source: Székely & Rizzo 2013.
    """
    return -distances(a, b)


def mmd2(x_q: Tensor, x_p: Tensor, kernel: Kernel = gaussian_kernel) -> Tensor:
    r"""S25 with F = {f : ‖f‖_k ≤ 1}: the square of the maximum, MMD², estimated without bias; may be negative.

    E k(q, q′) + E k(p, p′) − 2 E k(q, p) over pairs of different draws. Source: Gretton et al. 2012.
    """

    def among(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return among(x_q) + among(x_p) - 2 * kernel(x_q, x_p).mean()


def kernel_critic(gram: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""S25 with F = {f : ‖f‖_k ≤ 1}: the maximiser on a table, f(x) = [E_p k(x, ·) − E_q k(x, ·)] / MMD.

    gram (K, K) is the kernel between the table's points; (K,) -> (K,). Not defined for q = p.
    Source: Gretton et al. 2012.
    """
    gap = log_p.exp() - log_q.exp()
    return gram @ gap / (gap @ gram @ gap).sqrt()


# Balls of square-integrable functions: Fisher, and the symmetric KL ----------------------------------


def fisher(f_q: Tensor, f_p: Tensor) -> Tensor:
    r"""S25 with F = {f : ½ E_q f² + ½ E_p f² ≤ 1}: E_p f − E_q f after scaling f onto the boundary of F.

    No network exceeds √∫(p − q)²/½(p + q) ≤ 2, the value of f ∝ (p − q)/(p + q). Source: Mroueh & Sercu 2017.
    """
    return (f_p.mean() - f_q.mean()) / (0.5 * (f_q.square().mean() + f_p.square().mean())).sqrt()


def fisher_lagrangian(f_q: Tensor, f_p: Tensor, multiplier: Tensor | float, rho: float) -> Tensor:
    r"""S25 with the same F, kept by λ(1 − Ω) − ½ρ(Ω − 1)² where Ω = ½ E_q f² + ½ E_p f²: Fisher GAN as it is trained.

    The critic maximises it, then λ takes a step: λ ← λ + ρ(Ω − 1). Source: Mroueh & Sercu 2017.
    """
    room = 1 - 0.5 * (f_q.square().mean() + f_p.square().mean())
    return f_p.mean() - f_q.mean() + multiplier * room - 0.5 * rho * room.square()


def ball_critic(weight: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""S25 with F = {f : Σ w f² ≤ 1}: the maximiser on a table, f ∝ (p − q)/w, of value √Σ(p − q)²/w; (K,) -> (K,).

    w = ½(p + q) gives the Fisher critic, w = `logarithmic_mean` the log-ratio and the value √KL_s.
    Not defined for q = p.
    """
    gap = log_p.exp() - log_q.exp()
    f = gap / weight.clamp(min=torch.finfo(weight.dtype).tiny)  # zero where q, p and w are too small for a float
    return f / (gap @ f).sqrt()


def logarithmic_mean(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""(p − q)/(log p − log q), which lies between the geometric and the arithmetic mean; p where p = q."""
    ratio = (log_p - log_q).abs()
    apart = ratio > 1e-8
    safe = torch.where(apart, ratio, 1.0)
    return torch.maximum(log_q, log_p).exp() * torch.where(apart, -torch.expm1(-safe) / safe, 1.0)


# Features: McGan -----------------------------------------------------------------------------------


def mean_matching(phi_q: Tensor, phi_p: Tensor, order: float = 2) -> Tensor:
    r"""S25 with F = {v·Φ(x) : ‖v‖ ≤ 1}: the maximum is ‖E_p Φ − E_q Φ‖ in the dual norm, whose order is given.

    `order` 2 belongs to the Euclidean norm of v, 1 to max |v_i| and inf to Σ|v_i|. The network Φ has to be bounded,
    for instance by `clip_weights`. Source: Mroueh, Sercu & Goel 2017.
    """
    return torch.linalg.vector_norm(phi_p.mean(0) - phi_q.mean(0), order)


def covariance_matching(phi_q: Tensor, phi_p: Tensor, rank: int | None = None) -> Tensor:
    r"""S25 with F = {Φ(x)ᵀU Vᵀ Φ(x) : UᵀU = VᵀV = I, k columns}: the k largest singular values of the gap, added.

    The gap is E_p ΦΦᵀ − E_q ΦΦᵀ, not centred; all columns give its nuclear norm. Source: Mroueh, Sercu & Goel 2017.
    """

    def square(phi: Tensor) -> Tensor:  # not a matrix product, which autocast would round
        return (phi[:, :, None] * phi[:, None]).mean(0)

    gap = square(phi_p) - square(phi_q)
    return torch.linalg.svdvals(gap)[:rank].sum()


# Bounded functions: energy-based GAN -----------------------------------------------------------------


def energy_margin(f_q: Tensor, f_p: Tensor, margin: float) -> Tensor:
    r"""S25 with F = {f : 0 ≤ f ≤ m}: the energy-based GAN, −E_q f − E_p max(0, m − f) for energies f ≥ 0.

    Maximal, −m(1 − TV), at f = m where p > q and 0 elsewhere; there E_p f − E_q f = m TV. Source: Zhao et al. 2017.
    """
    return -f_q.mean() - (margin - f_p).relu().mean()
