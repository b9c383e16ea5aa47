r"""Which numbers are possible: references and bounds that follow from the data alone, without a network.

Everything is exact linear algebra in float64 on images in grey levels 0..255. Two spectra carry most of it:
`variances`, the variance of the training images along each of their principal axes, and `energies`, the square
of a test image along the same axes (or the mean of these squares over all test images). "Bits" are bits per
dimension, one dimension being one colour channel of one pixel.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svae_lib.data import Dataset
from svae_lib.levels import grey
from svae_lib.metrics import Metric, error_units, summary

CELL = 1 / 12  # variance of the uniform noise that spreads a grey level over its interval of length one
COMPONENTS = (64, 100, 256, 512, 1024)  # 100 is the code of A.2
BLOCKS = (8, 4, 2)


@dataclass(frozen=True)
class Basis:
    r"""Mean and principal axes of images. mean (D,), variances (D,) falling, axes (D, D) in columns."""

    mean: Tensor
    variances: Tensor
    axes: Tensor

    @staticmethod
    def fit(*parts: Tensor) -> Basis:
        r"""The eigenvectors of the covariance of uint8 images, all parts (N, C, H, W) together; no approximation."""
        size, count = parts[0][0].numel(), sum(map(len, parts))
        total = torch.zeros(size, dtype=torch.float64)
        second = torch.zeros(size, size, dtype=torch.float64)
        for rows in (rows for part in parts for rows in part.split(2_000)):
            x = rows.flatten(1).double()
            total += x.sum(0)
            second += x.T @ x  # whole numbers below 2^53: the sum is exact
        mean = total / count
        variances, axes = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        return Basis(mean, variances.flip(0).clamp(min=0), axes.flip(1))

    def energies(self, images: Tensor) -> Tensor:
        r"""Squares of the coefficients of each image along each axis; uint8 (N, C, H, W) -> (N, D)."""
        return torch.cat([((x.double() - self.mean) @ self.axes).square() for x in images.flatten(1).split(2_000)])

    def reconstruct(self, images: Tensor, components: int) -> Tensor:
        r"""x̂ = x̄ + U_k U_kᵀ (x − x̄), the best linear code of k numbers; uint8 -> float64 of the same shape."""
        kept = self.axes[:, :components]
        return (self.mean + (images.flatten(1).double() - self.mean) @ kept @ kept.T).view(images.shape)

    def one_step_errors(self, images: Tensor) -> Tensor:
        r"""Errors of the best linear prediction of each number from all before it; uint8 (N, C, H, W) -> (N, D).

        Rows of pixels from the top, colours within a pixel. With Σ + I/12 = L Lᵀ the standardised errors are
        L⁻¹(x − x̄) and their standard deviations the diagonal of L: the chain rule of a Gaussian.
        """
        order = torch.arange(len(self.mean)).view(len(images[0]), -1).T.flatten()  # colours last
        axes = self.axes[order]
        root = torch.linalg.cholesky((axes * (self.variances + CELL)) @ axes.T)
        centred = (images.flatten(1).double() - self.mean)[:, order]
        return torch.linalg.solve_triangular(root, centred.T, upper=False).T * root.diagonal()


def gaussian_bits(variances: Tensor, energies: Tensor) -> Tensor:
    r"""Bits per dimension that N(x̄, Σ + I/12) needs for x + η, averaged exactly over the noise η ~ U[0, 1)^D.

    1/(D ln 2) Σ_j ½ [log 2π(v_j + 1/12) + (c_j² + 1/12)/(v_j + 1/12)]; variances v (D,), energies c² (..., D) -> (...).
    Not below what the same density needs for the levels themselves (Theis et al. 2016).
    """
    v = variances + CELL
    return 0.5 * ((2 * math.pi * v).log() + (energies + CELL) / v).mean(-1) / math.log(2)


def ppca(variances: Tensor, components: int) -> Tensor:
    r"""Spectrum of maximum-likelihood probabilistic PCA: the tail is replaced by its mean; (D,) -> (D,).

    p(x) = ∫ N(x; W z + x̄, σ² I) N(z; 0, I) dz with z of `components` numbers: no VAE with a linear decoder and one
    standard deviation fits the training images better (Tipping and Bishop 1999).
    """
    tail = variances[components:]
    return torch.cat([variances[:components], tail.mean().expand_as(tail)])


def decoder_bits(sigma: float | Tensor, residual: float = 1.0) -> float | Tensor:
    r"""log₂ σ + ½ log₂ 2π + r/(2 ln 2): bits per dimension of a factorised Gaussian decoder, the code not counted.

    σ: geometric mean, over dimensions and images, of its standard deviations in grey levels. r = `residual`: mean of
    (x − μ)²/σ²; one where the overall scale of σ is at its optimum, and never negative.
    """
    log_sigma = sigma.log2() if isinstance(sigma, Tensor) else math.log2(sigma)
    return log_sigma + 0.5 * math.log2(2 * math.pi) + residual / (2 * math.log(2))


def decoder_sigma(bits: float, rate: float = 0.0, residual: float = 1.0) -> float:
    r"""The σ of `decoder_bits` that `bits` per dimension in all, `rate` of them for the code, leave; grey levels."""
    return 2 ** (bits - rate - decoder_bits(1.0, residual))


def block_bits(errors: Tensor, block: int) -> Tensor:
    r"""Bits of a Gaussian decoder that is told, at no cost, the error's mean square in each block × block square.

    Errors (N, C, H, W) in grey levels -> (N,). A decoder has to find its σ from the code: this one knows it.
    """
    n, c, h, w = errors.shape
    mean_square = errors.square().view(n, c, h // block, block, w // block, block).mean((1, 3, 5))
    return decoder_bits((mean_square + CELL).sqrt()).mean((1, 2))


def rate_distortion(variances: Tensor, level: float | Tensor) -> tuple[Tensor, Tensor]:
    r"""Reverse water-filling: (rate in bits per dimension, mean square error in levels²) at a water level ϑ.

    R = 1/D Σ_j max(0, ½ log₂ v_j/ϑ), Δ = 1/D Σ_j min(ϑ, v_j): axes with a variance below ϑ are not sent.
    variances (D,), level (...) -> two of (...). The rate–distortion function of the Gaussian (Cover and Thomas 2006).
    """
    level = torch.as_tensor(level, dtype=variances.dtype).unsqueeze(-1)
    rate = 0.5 * (variances / level).clamp(min=1).log2()
    return rate.mean(-1), torch.minimum(variances, level).mean(-1)


def water_level(variances: Tensor, mean_square: float) -> float:
    r"""The level ϑ at which `rate_distortion` has this mean square error, 0 < mean_square < mean variance."""
    rising = variances.flip(0)
    above = torch.arange(len(rising), 0, -1, dtype=rising.dtype)  # axes not below each candidate level
    below = rising.cumsum(0) - rising
    wanted = mean_square * len(rising)
    first = int(torch.searchsorted(below + above * rising, wanted))
    return ((wanted - below[first]) / above[first]).item()


def entropy_floor(images: Tensor) -> Tensor:
    r"""Σ_j H(x_j) in nats, grey levels read as probabilities: no Bernoulli NLL of the image is below; (N, ...) -> (N,).

    The least value of −Σ [x log π + (1 − x) log(1 − π)], reached at π = x (A §5.1).
    """
    x = grey(images).double()
    return (torch.special.entr(x) + torch.special.entr(1 - x)).flatten(1).sum(1)


def compute(dataset: Dataset) -> dict[str, Any]:
    r"""Everything above for one dataset, as a record: fitted on train and validation, measured on test.

    Nothing is chosen on held-out images, so all training images serve for the fit.
    """
    start = time.perf_counter()
    fitted = (dataset.train.images, dataset.validation.images)
    images, pixels = dataset.test.images, dataset.test.images[0].numel()
    basis = Basis.fit(*fitted)
    energies = basis.energies(images)

    def both_units(squares: Tensor, suffix: str) -> dict[str, Metric]:
        units = error_units(squares.sum(1) / 255**2, pixels)
        return {f"rmse_{suffix}": units["rmse_grey"], f"l2_{suffix}": units["l2"]}

    values = {"bits_gaussian": summary(gaussian_bits(basis.variances, energies))}
    values |= both_units(basis.one_step_errors(images).square(), "one_step") | both_units(energies, "mean")
    for k in (k for k in COMPONENTS if k < pixels):
        values |= {f"bits_ppca{k}": summary(gaussian_bits(ppca(basis.variances, k), energies))}
        values |= both_units(energies[:, k:], f"pca{k}")
        errors = images.double() - basis.reconstruct(images, k)
        for block in (b for b in BLOCKS if not images.shape[2] % b):
            values[f"bits_pca{k}_block{block}"] = summary(block_bits(errors, block))
    if images.shape[1] == 1:
        values["floor_grey"] = summary(entropy_floor(images))
    spectra = {"variances": basis.variances, "energies": energies.mean(0)}
    return {
        "name": f"bounds-{dataset.name}",
        "images": {"fit": sum(map(len, fitted)), "test": len(images)},
        "metrics": values,
        "spectra": {name: [float(f"{v:.9g}") for v in spectrum.tolist()] for name, spectrum in spectra.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
