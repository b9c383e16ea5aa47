r"""The methods with an encoder, one entry a row of the papers' tables; those without are in `svae_lib.gans`.

A method is a critic objective and a player objective over the same draws (`svae_lib.draws.Method`).
"""

from __future__ import annotations

from torch import Tensor

from svae_lib import gans, objectives
from svae_lib.densities import DiagonalGaussian, standard_normal_log_prob
from svae_lib.draws import Draws, Method, lrt
from svae_lib.errors import UserError

# Variational ---------------------------------------------------------------------------------------


def vae(d: Draws) -> Tensor:
    r"""S1; the KL to the prior in closed form where the encoder is Gaussian."""
    return objectives.elbo(d.log_p_x_given_z, d.kl_to_prior)


def log_likelihood(d: Draws) -> Tensor:
    r"""E_q(x) log p_θ(x), for decoders that are a density of x whatever z is (`svae_lib.autoregressive`)."""
    return d.model.decoder(d.z_p).log_prob(d.x).mean()


# Variational, the KL by a critic: adversarial variational Bayes (Mescheder et al. 2017) -----------------
# Its critic is T = −f: T* = log q_φ(z|x) − log r(z|x) is high on encoder pairs. The logistic loss that it
# maximises, E_qφ log σ(T) + E_r log(1 − σ(T)), is S10 with f = −T.


def avb_critic(d: Draws) -> Tensor:
    r"""S10 for pairs (x, z̃) and (x, z) with z ~ p(z), the same x: f* = log p(z) − log q_φ(z|x)."""
    return objectives.critic_lrt(d.score(d.x, d.z_q), d.score(d.x, d.z_p))


def avb(d: Draws) -> Tensor:
    r"""S1 with f in the place of log p(z) − log q_φ(z|x); the encoder needs no density."""
    return objectives.elbo(d.log_p_x_given_z, -d.score(d.x, d.z_q))


def moments(d: Draws) -> DiagonalGaussian:
    r"""r(z|x), the Gaussian with the mean and variances of q_φ(z|x). Raises UserError where they are not known."""
    q = d.q_z_given_x
    r = q if isinstance(q, DiagonalGaussian) else getattr(q, "moments", None)
    if r is None:
        raise UserError("adaptive contrast needs the mean and variance of the encoder; set encoder=implicit")
    return r


def avb_ac_critic(d: Draws) -> Tensor:
    r"""S10 between ζ = (z̃ − E z̃)/√Var z̃ and noise, given x: f* = log r(z|x) − log q_φ(z|x), zero if q_φ is Gaussian."""
    return objectives.critic_lrt(d.score(d.x, moments(d).standardise(d.z_q)), d.score(d.x, d.z_p))


def avb_ac(d: Draws) -> Tensor:
    r"""S1 with log p(z) − log q_φ(z|x) = log p(z) − log r(z|x) + f(x, ζ): what is known is not left to the critic."""
    r = moments(d)
    kl = r.log_prob(d.z_q) - standard_normal_log_prob(d.z_q) - d.score(d.x, r.standardise(d.z_q))
    return objectives.elbo(d.log_p_x_given_z, kl)


# Symmetric -----------------------------------------------------------------------------------------


def svae(d: Draws) -> Tensor:
    r"""S14: both players meet only in the critic."""
    return objectives.symmetric(d.f_q, d.f_p)


def svae_r(d: Draws) -> Tensor:
    r"""S29: S14 plus λ times both reconstructions, as printed (draws attached)."""
    return objectives.symmetric_with_reconstruction(d.f_q, d.f_p, d.log_p_x_given_z, d.log_q_z_given_x, d.weight)


def wake_sleep(d: Draws) -> Tensor:
    r"""The halves that S14 misses: the decoder learns from encoder pairs, the encoder from decoder pairs."""
    return objectives.wake_sleep(d.log_p_x_given_z_detached, d.log_q_z_given_x_detached)


def svae_exact(d: Draws) -> Tensor:
    r"""The exact gradient of −KL_s: S29 with λ = 1 and the draws detached in both reconstructions."""
    return svae(d) + wake_sleep(d)


def svae_elbo(d: Draws) -> Tensor:
    r"""The exact gradient of −KL_s with its L_x half in closed form (S1): the critic is left with L_z (S13)."""
    return vae(d) + objectives.l_z(d.f_p, d.log_q_z_given_x_detached)


# Adversarial symmetric: two critics ------------------------------------------------------------------


def f_1_critic(d: Draws) -> Tensor:
    r"""A5: f_1 tells encoder pairs from decoder pairs with the codes of others in the batch, draws of p_θ(x) p(z)."""
    return objectives.critic_lrt(f_q=d.score(d.x_p, d.of_others(d.z_p)), f_p=d.score(d.x, d.z_q))


def f_2_critic(d: Draws, critic: int = 0) -> Tensor:
    r"""A6: f_2 tells decoder pairs from encoder pairs with the codes of others, draws of q(x) q_φ(z)."""
    shuffled = d.score(d.x, d.of_others(d.z_q), critic=critic)
    return objectives.critic_lrt(f_q=shuffled, f_p=d.score(d.x_p, d.z_p, critic=critic))


def as_vae_critics(d: Draws) -> Tensor:
    r"""A5 and A6."""
    return f_1_critic(d) + f_2_critic(d, critic=1)


def as_vae_r(d: Draws) -> Tensor:
    r"""A10, first half: E_qφ[log p_θ(x|z) − f_1(x, z)]."""
    return (d.log_p_x_given_z - d.score(d.x, d.z_q)).mean()


def as_vae_g(d: Draws) -> Tensor:
    r"""A10, second half: E_pθ[log q_φ(z|x) − f_2(x, z)]."""
    return (d.log_q_z_given_x - d.score(d.x_p, d.z_p)).mean()


def as_vae(d: Draws) -> Tensor:
    r"""A10, A11: both halves."""
    return objectives.adversarial_symmetric(
        d.log_p_x_given_z, d.score(d.x, d.z_q), d.log_q_z_given_x, d.score(d.x_p, d.z_p, critic=1)
    )


# Adversarially learned inference -----------------------------------------------------------------------


def ali(d: Draws) -> Tensor:
    r"""S19: the labels exchanged, as ALI is trained."""
    return objectives.non_saturating(d.f_q, d.f_p)


def ali_saturating(d: Draws) -> Tensor:
    r"""S18: the players descend what the critic climbs."""
    return objectives.saturating(d.f_q, d.f_p)


def alice(d: Draws) -> Tensor:
    r"""S19 minus λ E‖x − x̂‖², x → z̃ → x̂: explicit cycle consistency. Source: Li et al. 2017."""
    return ali(d) - d.weight * (d.x - d.x_q).square().flatten(1).sum(1).mean()


def alice_l1(d: Draws) -> Tensor:
    r"""S19 minus λ E‖x − x̂‖₁. Source: Li et al. 2017."""
    return ali(d) - d.weight * (d.x - d.x_q).abs().flatten(1).sum(1).mean()


def alice_a_critics(d: Draws) -> Tensor:
    r"""S10, and a second critic that tells pairs (x, x) from pairs (x, x̂)."""
    return lrt(d) + objectives.critic_lrt(d.score(d.x, d.x, critic=1), d.score(d.x, d.x_q, critic=1))


def alice_a(d: Draws) -> Tensor:
    r"""S19 plus λ E log σ(−f_2(x, x̂)): learned cycle consistency. Source: Li et al. 2017."""
    cycle = objectives.non_saturating(d.score(d.x, d.x, critic=1), d.score(d.x, d.x_q, critic=1))
    return ali(d) + d.weight * cycle


ROWS = (
    Method("vae", "variational autoencoder: maximise the evidence lower bound", "–", "S1", vae, critic=None),
    Method("nf-vae", "VAE with 80 planar layers", "–", "S1", vae, critic=None, defaults={"encoder": "planar"}),
    Method(
        "iaf-vae", "VAE with 8 inverse autoregressive layers", "–", "S1", vae, critic=None,
        defaults={"encoder": "iaf", "flow_length": 8},
    ),
    Method(
        "avb", "adversarial variational Bayes: the encoder has no density", "S10", "S1", avb, avb_critic,
        defaults={"encoder": "implicit", "beta1": 0.5},
    ),
    Method(
        "avb-ac", "the same with adaptive contrast", "S10", "S1", avb_ac, avb_ac_critic,
        defaults={"encoder": "implicit", "beta1": 0.5},
    ),
    Method(
        "pixelcnn", "PixelCNN++: maximise log p itself", "–", "likelihood", log_likelihood, critic=None, codes=False,
        data=("images",), defaults={"decoder": "pixelcnn", "hidden": 64, "depth": 5, "lr": 1e-3},
    ),
    Method(
        "pixelrnn", "the same with LSTMs over diagonals", "–", "likelihood", log_likelihood, critic=None, codes=False,
        data=("images",), defaults={"decoder": "pixelrnn", "hidden": 32, "depth": 7, "lr": 1e-3},
    ),
    Method("svae", "symmetric VAE: raise the critic on encoder pairs, lower it on decoder pairs", "S10", "S14", svae),
    Method("svae-r", "symmetric VAE with λ times the reconstruction of x and of z", "S10", "S29", svae_r),
    Method("wake-sleep", "decoder and encoder each fit the pairs of the other", "–", "halves", wake_sleep, critic=None),
    Method("svae-exact", "exact gradient of −KL_s: S14 plus its two missing halves", "S10", "S14 + halves", svae_exact),
    Method("svae-elbo", "the same gradient, L_x in closed form, a critic for L_z", "S10", "S1 + S13", svae_elbo),
    Method("as-vae", "adversarial symmetric VAE: two critics", "A5, A6", "A10", as_vae, as_vae_critics, ("xz", "xz")),
    Method("as-vae-r", "its first half: reconstruct", "A5", "A10, half", as_vae_r, f_1_critic),
    Method("as-vae-g", "its second half: generate", "A6", "A10, half", as_vae_g, f_2_critic),
    Method("ali", "adversarially learned inference, labels exchanged", "S10", "S19", ali),
    Method("ali-saturating", "adversarially learned inference as a zero-sum game", "S10", "S18", ali_saturating),
    Method("alice", "ALI with an L2 cycle", "S10", "S19 + cycle", alice, defaults={"weight": 1.0}),
    Method("alice-l1", "ALI with an L1 cycle", "S10", "S19 + cycle", alice_l1, defaults={"weight": 1.0}),
    Method(
        "alice-a", "ALI with a learned cycle", "S10", "S19 + cycle", alice_a, alice_a_critics, ("xz", "xx"),
        defaults={"weight": 1.0},
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in (*ROWS, *gans.ROWS)}


def register(method: Method) -> None:
    r"""Add a method to the registry under its name."""
    METHODS[method.name] = method
