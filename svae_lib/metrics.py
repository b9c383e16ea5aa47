r"""What is reported: bounds on the NLL, reconstruction error, and the score of samples.

A metric is a dictionary {"value", "se", "n"}: the mean over n images and its standard error
(for the classifier score: mean and standard deviation over splits, as is customary).
Everything runs in eval mode, without gradients, in fp32, on the device of the images;
only the last averages are taken in float64, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svae_lib.data import binarise, grey
from svae_lib.densities import Point, kl_to_prior, standard_normal_log_prob
from svae_lib.mixtures import Mixture

Metric = dict[str, float]


def summary(values: Tensor) -> Metric:
    r"""Mean, standard error and count of one number per image."""
    values = values.cpu().double()
    return {"value": values.mean().item(), "se": values.std().item() / math.sqrt(len(values)), "n": len(values)}


def batches(images: Tensor, size: int = 250) -> Iterator[Tensor]:
    r"""uint8 images -> grey fp32 batches."""
    return map(grey, images.split(size))


def proposal(q: Any) -> Any:
    r"""The density that bounds are made with: the encoder's own, or the Gaussian of its moments if it has none.

    Any density over the codes gives a bound, and this one lies where the implicit encoder's draws do.
    """
    return q.moments if isinstance(q, Point) and q.moments is not None else q


@torch.no_grad()
def exact_nll(model: nn.Module, images: Tensor) -> dict[str, Metric]:
    r"""−log p(x) of the 256 grey levels by a density of x itself: in nats an image, and in bits a number.

    uint8 (N, C, H, W); `model` as in `svae_lib.autoregressive`.
    """
    nll = torch.cat([-model(x).log_prob(x) for x in batches(images)])
    return {"nll": summary(nll), "bits_per_dim": summary(nll / (images[0].numel() * math.log(2)))}


@torch.no_grad()
def elbo_parts(encoder: nn.Module, decoder: nn.Module, images: Tensor, dynamic: bool) -> tuple[Tensor, Tensor]:
    r"""S1 per image, one draw of z each: (−log p_θ(x|z), KL(q_φ(z|x) ‖ p(z))) in nats, each (N,).

    The KL is in closed form for a Gaussian, else the estimate by the same draw.

    dynamic=False: x is the grey image, as input and as target (A §5.1). dynamic=True: x is a fresh
    binarisation of it, as input and as target. uint8 (N, C, H, W) -> two (N,).
    """
    distortion, rate = [], []
    for x in batches(images):
        x = binarise(x) if dynamic else x
        q = proposal(encoder(x))
        z, log_q = q.rsample_and_log_prob()
        distortion.append(-decoder(z).log_prob(x))
        rate.append(kl_to_prior(q, z, log_q))
    return torch.cat(distortion), torch.cat(rate)


@torch.no_grad()
def importance_weighted_nll(
    encoder: nn.Module, decoder: nn.Module, x: Tensor, samples: int, chunk: int = 500
) -> Tensor:
    r"""−log (1/K) Σ_k p_θ(x, z_k) / q_φ(z_k|x), z_k ~ q_φ(z|x): an upper bound on −log p_θ(x), tighter in K.

    x (N, C, H, W) float, K = `samples` -> (N,) nats. Source: Burda et al. 2016.
    """
    bounds = []
    for image in x.split(1):
        q = proposal(encoder(image))
        log_weights = []
        for size in [chunk] * (samples // chunk) + [samples % chunk] * (samples % chunk > 0):
            z, log_q = q.rsample_and_log_prob(torch.randn(size, q.mean.shape[1], device=x.device))
            log_joint = decoder(z).log_prob(image.expand(size, *image.shape[1:])) + standard_normal_log_prob(z)
            log_weights.append(log_joint - log_q)
        bounds.append(math.log(samples) - torch.cat(log_weights).logsumexp(0))
    return torch.stack(bounds)


@torch.no_grad()
def dynamic_nll(
    encoder: nn.Module, decoder: nn.Module, images: Tensor, samples: int, subset: int
) -> dict[str, Metric]:
    r"""The two bounds on dynamically binarised images: ELBO on all, importance-weighted on all by difference.

    The importance-weighted bound costs K decodings per image, so its *gap* to the ELBO is measured on the
    first `subset` images and subtracted from the ELBO of all of them: the gap varies far less from image
    to image than the NLL does. Its standard error adds both parts.
    """
    distortion, rate = elbo_parts(encoder, decoder, images, dynamic=True)
    elbo = summary(distortion + rate)
    x = binarise(grey(images[:subset]))
    one_draw = torch.stack([importance_weighted_nll(encoder, decoder, x, 1, 1) for _ in range(20)]).mean(0)
    gap = summary(one_draw - importance_weighted_nll(encoder, decoder, x, samples))
    bound = {"value": elbo["value"] - gap["value"], "se": math.hypot(elbo["se"], gap["se"]), "n": subset, "k": samples}
    return {"elbo_dynamic": elbo, "iw_dynamic": bound}


@torch.no_grad()
def reconstruction_error(encoder: nn.Module, decoder: nn.Module, images: Tensor) -> dict[str, Metric]:
    r"""Error of x̂, the decoder mean at the encoder mean, in both units that "RMSE" may have."""
    square = []
    for x in batches(images):
        square.append((decoder(proposal(encoder(x)).mean).mean - x).square().flatten(1))
    return error_units(torch.cat([s.sum(1) for s in square]), square[0].shape[1])


def error_units(per_image: Tensor, pixels: int) -> dict[str, Metric]:
    r"""‖x̂ − x‖² per image (N,), pixels in [0, 1], in both units that "RMSE" may have.

    rmse_grey: √ mean over images and pixels of (x̂ − x)², in grey levels 0..255;
    l2: the mean over images of ‖x̂ − x‖₂ with pixels in [0, 1].
    """
    mse = summary(per_image / pixels)
    rmse = 255 * math.sqrt(mse["value"])
    return {
        "rmse_grey": {"value": rmse, "se": rmse * mse["se"] / (2 * mse["value"]), "n": mse["n"]},
        "l2": summary(per_image.sqrt()),
    }


@torch.no_grad()
def sample_images(decoder: nn.Module, z_dim: int, count: int, device: torch.device) -> Tensor:
    r"""`count` decoder means at z ~ N(0, I), rounded to uint8 as stored images are; (count, C, H, W)."""
    images = []
    for size in [250] * (count // 250) + [count % 250] * (count % 250 > 0):
        mean = decoder(torch.randn(size, z_dim, device=device)).mean
        images.append((mean * 255).round().to(torch.uint8))
    return torch.cat(images)


@torch.no_grad()
def classifier_score(log_probs: Callable[[Tensor], Tensor], images: Tensor, splits: int = 10) -> Metric:
    r"""exp E_x KL(p(y|x) ‖ p(y)), the inception score with p(y|x) from the given classifier.

    x runs over the model's samples (A §5.1 prints q(x); erratum 5). Mean and standard deviation over
    `splits` equal parts. `log_probs` maps grey (B, C, H, W) to (B, classes). Source: Salimans et al. 2016.
    """
    log_p = torch.cat([log_probs(x) for x in batches(images)]).cpu().double()
    scores = []
    for part in log_p.chunk(splits):  # in logarithms: the probabilities of an ideal classifier underflow
        ratio = part - (part.logsumexp(0) - math.log(len(part)))
        scores.append(torch.where(part.exp() > 0, part.exp() * ratio, 0.0).sum(1).mean().exp())
    scores = torch.stack(scores)
    return {"value": scores.mean().item(), "se": scores.std(correction=splits > 1).item(), "n": len(images)}


def coverage(mixture: Mixture, x: Tensor) -> dict[str, Metric]:
    r"""What draws x (B, d) say about the modes.

    high_quality: the fraction within 3σ of a centre, 1 − e^{−9/2} = 0.989 for the target's own draws;
    modes: the number of centres with at least one such draw;
    mode_kl: KL(h ‖ uniform) in nats, h the fractions of *all* draws nearest to each centre ("reverse KL", PacGAN).
    Sources: Srivastava et al. 2017 (VEEGAN), Lin et al. 2018 (PacGAN).
    """
    distance, nearest = torch.cdist(x, mixture.centres).min(1)
    good = distance <= 3 * mixture.std
    count = len(mixture.centres)
    share = torch.bincount(nearest, minlength=count).double() / len(x)
    exact = {"se": 0.0, "n": len(x)}
    return {
        "modes": {"value": float(len(nearest[good].unique())), **exact},
        "high_quality": summary(good),
        "mode_kl": {"value": (math.log(count) - torch.special.entr(share).sum()).item(), **exact},
    }


@torch.no_grad()
def stacked_coverage(log_probs: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Metric]:
    r"""How many of the 1,000 modes of stacked digits are among uint8 images (N, 3, H, W).

    `log_probs` classifies one channel, grey (B, 1, H, W) -> (B, 10). modes: triples of digits that occur; mode_kl:
    KL(h ‖ uniform) in nats, h the fractions of the triples. Even perfect draws have mode_kl about 999/2N.
    Source: Srivastava et al. 2017 (VEEGAN).
    """
    digits = [torch.stack([log_probs(x[:, c : c + 1]).argmax(1) for c in range(3)], 1).cpu() for x in batches(images)]
    share = torch.bincount(torch.cat(digits) @ torch.tensor([100, 10, 1]), minlength=1000).double() / len(images)
    exact = {"se": 0.0, "n": len(images)}
    return {
        "modes": {"value": float((share > 0).sum()), **exact},
        "mode_kl": {"value": (math.log(1000) - torch.special.entr(share).sum()).item(), **exact},
    }
