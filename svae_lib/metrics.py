r"""What is reported: bounds on the NLL, reconstruction error, and the score of samples.

A metric is a dictionary {"value", "se", "n"}: the mean over n images and its standard error
(for the classifier score: mean and standard deviation over splits, as is customary).
Everything runs in eval mode, without gradients, in fp32, on the device of the images;
only the last averages are taken in float64, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svae_lib.densities import DiscretisedGaussian, Point, kl_to_prior, standard_normal_log_prob
from svae_lib.levels import Axis, Cells, Grey, binarise, grey
from svae_lib.mixtures import Mixture

Metric = dict[str, float]


BATCH = 250  # images at a time; a bound with thousands of codes an image takes parts of its own (`at_once`)


def summary(values: Tensor) -> Metric:
    r"""Mean, standard error (of a single one nan) and count of one number per image."""
    values = values.cpu().double()
    return {"value": values.mean().item(), "se": values.std().item() / math.sqrt(len(values)), "n": len(values)}


def batches(images: Tensor) -> Iterator[Tensor]:
    r"""uint8 images -> grey fp32 batches."""
    return map(grey, images.split(BATCH))


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
def elbo_parts(
    encoder: nn.Module, decoder: Callable[[Tensor], Any], images: Tensor, see: Callable[[Tensor], Tensor] = grey
) -> tuple[Tensor, Tensor]:
    r"""S1 per image, one draw of z each: (−log p_θ(x|z), KL(q_φ(z|x) ‖ p(z))) in nats, each (N,).

    The KL is in closed form for a Gaussian, else the estimate by the same draw. `see` makes x, input and target, of
    the levels: grey (A §5.1 on MNIST), or binary_draw for a fresh binarisation. uint8 (N, C, H, W) -> two (N,).
    """
    distortion, rate = [], []
    for levels in images.split(BATCH):
        x = see(levels)
        q = proposal(encoder(x))
        z, log_q = q.rsample_and_log_prob()
        distortion.append(-decoder(z).log_prob(x))
        rate.append(kl_to_prior(q, z, log_q))
    return torch.cat(distortion), torch.cat(rate)


def at_once(images: Tensor) -> int:
    r"""How many rows to pass through a net where they are many: 16 MB of pixels on CUDA, else a quarter of a MB.

    The feature maps of A.1 are up to 32 times as large. On a CPU they then stay in its cache: MNIST images are decoded
    1.4 times as fast in batches of 83 as in batches of 500.
    """
    budget = 2**24 if images.device.type == "cuda" else 2**18  # bytes
    return max(1, budget // (4 * images[0].numel()))


@torch.no_grad()
def importance_weighted_nll(
    encoder: nn.Module, decoder: Callable[[Tensor], Any], x: Tensor, samples: int, rows: int | None = None
) -> Tensor:
    r"""−log (1/K) Σ_k p_θ(x, z_k) / q_φ(z_k|x), z_k ~ q_φ(z|x): an upper bound on −log p_θ(x), tighter in K.

    x (N, C, H, W) float, K = `samples` -> (N,) nats. `rows` draws are decoded at once, of one image or of many.
    Source: Burda et al. 2016.
    """
    rows, bounds = at_once(x) if rows is None else rows, []
    for images in x.split(rows):
        draws = max(n for n in range(1, max(1, rows // len(images)) + 1) if samples % n == 0)
        repeated = images.repeat(draws, *[1] * (x.dim() - 1))
        q = proposal(encoder(repeated))
        log_weights = []
        for _ in range(samples // draws):
            z, log_q = q.rsample_and_log_prob()
            log_joint = decoder(z).log_prob(repeated) + standard_normal_log_prob(z)
            log_weights.append((log_joint - log_q).view(draws, len(images)))
        bounds.append(math.log(samples) - torch.cat(log_weights).logsumexp(0))
    return torch.cat(bounds)


def binary_draw(images: Tensor) -> Tensor:
    r"""A fresh binarisation of uint8 images."""
    return binarise(grey(images))


@torch.no_grad()
def importance_weighted_by_difference(
    encoder: nn.Module, decoder: Callable[[Tensor], Any], see: Callable[[Tensor], Tensor], images: Tensor,
    elbo: Metric, samples: int, subset: int,
) -> Metric:  # fmt: skip
    r"""The importance-weighted bound on all images, from their ELBO and the gap between the two on a few.

    The bound costs K decodings per image, so its *gap* to the ELBO is measured on the first `subset` images and
    subtracted from the ELBO of all of them: the gap varies far less from image to image than the NLL does. Its
    standard error adds both parts.
    """
    x = see(images[:subset])
    one_draw = torch.stack([importance_weighted_nll(encoder, decoder, x, 1) for _ in range(20)]).mean(0)
    gap = summary(one_draw - importance_weighted_nll(encoder, decoder, x, samples))
    se = math.hypot(elbo["se"], gap["se"])
    return {"value": elbo["value"] - gap["value"], "se": se, "n": len(x), "k": samples}


def dynamic_nll(encoder: nn.Module, decoder: nn.Module, images: Tensor, samples: int, subset: int) -> dict[str, Metric]:
    r"""The two bounds on dynamically binarised images: ELBO on all, importance-weighted on all by difference."""
    distortion, rate = elbo_parts(encoder, decoder, images, binary_draw)
    elbo = summary(distortion + rate)
    bound = importance_weighted_by_difference(encoder, decoder, binary_draw, images, elbo, samples, subset)
    return {"elbo_dynamic": elbo, "iw_dynamic": bound}


class OnLevels(NamedTuple):
    r"""p(x = i|z) of the 256 levels, from a Gaussian p_θ(x|z) on [0, 1); a level is given by its middle (A §5.1)."""

    density: DiscretisedGaussian

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Σ log p(i) in nats; `value` (B, ...) on the axis of `levels.Cells` -> (B,)."""
        return self.density.log_prob((256 * value).floor())


def discrete_nll(
    encoder: nn.Module, decoder: nn.Module, images: Tensor, samples: int, subset: int
) -> dict[str, Metric]:
    r"""Bits for each of the D numbers of an image: (KL − E_q Σ log p(i|z))/(D ln 2), as A §5.1 evaluates a Gaussian.

    `bits_closed`: the text's formula, in which the levels 0 and 255 have only their own cell; `bits_open`: they also
    have the tails beyond, so that the probabilities sum to one. `iw_bits_closed`, `iw_bits_open`: the
    importance-weighted bound of the same. `rate`: the KL, in nats an image. uint8 (N, C, H, W); the encoder sees the
    middle of each level's cell.
    """
    values, unit = {}, images[0].numel() * math.log(2)
    for edges in ("closed", "open"):

        def on_levels(z: Tensor, edges: str = edges) -> OnLevels:
            return OnLevels(DiscretisedGaussian.on_levels(decoder(z), edges == "open"))

        distortion, rate = elbo_parts(encoder, on_levels, images, Cells.see)
        elbo = summary(distortion + rate)
        bound = importance_weighted_by_difference(encoder, on_levels, Cells.see, images, elbo, samples, subset)
        values |= {f"bits_{edges}": _scaled(elbo, unit), f"iw_bits_{edges}": _scaled(bound, unit)}
    return values | {"rate": summary(rate)}


def _scaled(nats: Metric, unit: float) -> Metric:
    return nats | {"value": nats["value"] / unit, "se": nats["se"] / unit}


@torch.no_grad()
def reconstruct(encoder: nn.Module, decoder: nn.Module, images: Tensor, axis: Axis = Grey) -> Tensor:
    r"""x̂, the decoder mean at the encoder mean, of uint8 images; grey, of their shape."""
    codes = (proposal(encoder(axis.see(levels))).mean for levels in images.split(BATCH))
    return torch.cat([axis.back(decoder(z).mean) for z in codes])


def reconstruction_error(
    encoder: nn.Module, decoder: nn.Module, images: Tensor, axis: Axis = Grey
) -> dict[str, Metric]:
    r"""Error of x̂ (`reconstruct`), in both units that "RMSE" may have."""
    pairs = ((reconstruct(encoder, decoder, levels, axis), grey(levels)) for levels in images.split(BATCH))
    per_image = torch.cat([(x_hat - x).square().flatten(1).sum(1) for x_hat, x in pairs])
    return error_units(per_image, images[0].numel())


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
def sample_images(decoder: nn.Module, z_dim: int, count: int, device: torch.device, axis: Axis = Grey) -> Tensor:
    r"""`count` decoder means at z ~ N(0, I), rounded to uint8 as stored images are; (count, C, H, W)."""
    images = []
    for start in range(0, count, BATCH):
        mean = decoder(torch.randn(min(BATCH, count - start), z_dim, device=device)).mean
        images.append((axis.back(mean) * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


@torch.no_grad()
def classifier_score(log_probs: Callable[[Tensor], Tensor], images: Tensor, splits: int = 10) -> Metric:
    r"""exp E_x KL(p(y|x) ‖ p(y)), the inception score with p(y|x) from the given classifier.

    x runs over the model's samples (A §5.1 prints q(x); erratum 5). Mean and standard deviation over `splits` parts,
    equal if their number divides that of the images. `log_probs` maps grey (B, C, H, W) to (B, classes). Source:
    Salimans et al. 2016.
    """
    log_p = torch.cat([log_probs(x) for x in batches(images)]).cpu().double()
    scores = []
    for part in log_p.chunk(splits):  # in logarithms: the probabilities of an ideal classifier underflow
        ratio = part - (part.logsumexp(0) - math.log(len(part)))
        scores.append(torch.where(part.exp() == 0, 0.0, part.exp() * ratio).sum(1).mean().exp())
    scores = torch.stack(scores)
    return {"value": scores.mean().item(), "se": scores.std(correction=splits > 1).item(), "n": len(images)}


def _from_uniform(share: Tensor) -> float:
    """KL(share ‖ uniform) in nats."""
    return (math.log(len(share)) - torch.special.entr(share).sum()).item()


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
        "mode_kl": {"value": _from_uniform(share), **exact},
    }


@torch.no_grad()
def stacked_coverage(log_probs: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Metric]:
    r"""How many of the 1,000 modes of stacked digits are among uint8 images (N, 3, H, W).

    `log_probs` classifies one channel, grey (B, 1, H, W) -> (B, 10). modes: triples of digits that occur; mode_kl:
    KL(h ‖ uniform) in nats, h the fractions of the triples. Even perfect draws have mode_kl about 999/2N.
    Source: Srivastava et al. 2017 (VEEGAN).
    """
    digits = [torch.stack([log_probs(x[:, c : c + 1]).argmax(1) for c in range(3)], 1) for x in batches(images)]
    share = torch.bincount(torch.cat(digits).cpu() @ torch.tensor([100, 10, 1]), minlength=1000).double() / len(images)
    exact = {"se": 0.0, "n": len(images)}
    return {
        "modes": {"value": float((share > 0).sum()), **exact},
        "mode_kl": {"value": _from_uniform(share), **exact},
    }
