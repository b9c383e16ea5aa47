r"""How images look to a classifier: score, Fréchet distance and kernel distance of features, and what moves them.

The classifier is trained by this project (`svae_lib.classifier`), so the numbers are a *classifier score*, a *Fréchet
classifier distance* (`fcd`) and a *kernel classifier distance* (`kcd`): the formulas of the inception score, FID and
KID, and not comparable with those. Real data and known degradations, measured alike, say what a difference means.
"""

from __future__ import annotations

from importlib.util import find_spec

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from svae_lib import data, ipm, metrics
from svae_lib.classifier import Classifier, accuracy, load_classifier
from svae_lib.errors import UserError
from svae_lib.metrics import Metric
from svae_lib.records import Record

REFERENCE = 10_000  # training images that distances are measured to, at most half of all
SUBSETS, SUBSET_SIZE = 100, 1_000  # of the kernel distance (Bińkowski et al. 2018)


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""‖m_a − m_b‖² + tr(S_a + S_b − 2 (S_a S_b)^½) of the means and covariances of features; (N, d), (M, d) -> scalar.

    The trace of the root is Σ √λ over the eigenvalues of S_a^½ S_b S_a^½, which is symmetric. In float64.
    Source: Heusel et al. 2017.
    """
    (m_a, s_a), (m_b, s_b) = ((x.mean(0), x.T.cov()) for x in (a.double(), b.double()))
    values, axes = torch.linalg.eigh(s_a)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return (m_a - m_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    r"""(a·b/d + 1)³; (N, d), (M, d) -> (N, M). Source: Bińkowski et al. 2018."""
    return (a @ b.mT / a.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> Metric:
    r"""Unbiased MMD² of features under the cubic kernel: mean over random subsets, and the error of that mean.

    The error is that of choosing subsets of *these* features, which share rows: fresh samples differ by more.
    (N, d), (M, d); subsets are of `size` or of what there is. Source: Bińkowski et al. 2018.
    """
    generator = torch.Generator().manual_seed(0)
    size, found = min(size, len(a), len(b)), []
    for _ in range(subsets):
        rows = [torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (a, b)]
        found.append(ipm.mmd2(a[rows[0]].double(), b[rows[1]].double(), cubic_kernel))
    return metrics.summary(torch.stack(found)) | {"n": len(a)}


@torch.no_grad()
def features(net: Classifier, images: Tensor) -> Tensor:
    r"""Features of uint8 images (N, C, H, W), on the CPU; (N, width)."""
    return torch.cat([net.features(x).float().cpu() for x in metrics.batches(images)])


def in_mixed_order(dataset: data.Dataset) -> Tensor:
    r"""The rows of the training images, mixed where they lie class by class, as sets on disk do."""
    count = len(dataset.train)
    by_class = dataset.name in data.ON_DISK
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)) if by_class else torch.arange(count)


def reference(dataset: data.Dataset, device: torch.device) -> Tensor:
    r"""The training images that distances are measured to, uint8."""
    rows = in_mixed_order(dataset)[: min(REFERENCE, len(dataset.train) // 2)]
    return dataset.train.take(rows).to(device)


def quality(net: Classifier, images: Tensor, real: Tensor) -> dict[str, Metric]:
    r"""Classifier score of uint8 images, and the distances `fcd`, `kcd` of their features to features (M, width).

    `fcd` is one number of the whole sample; it has no standard error, and it falls with the number of images.
    """
    made = features(net, images)
    fcd = {"value": frechet_distance(made, real).item(), "se": 0.0, "n": len(images)}
    return {"score": metrics.classifier_score(net, images), "fcd": fcd, "kcd": kernel_distance(made, real)}


def inception_is_possible(shape: tuple[int, ...]) -> None:
    r"""Raises UserError where `inception` would fail after the training: without colours, or without the package."""
    if shape[0] != 3 or len(shape) != 3:
        raise UserError("inception=true needs colour images; leave it off")
    if find_spec("torch_fidelity") is None:
        raise UserError("inception=true needs torch-fidelity; run `pip install torch-fidelity`")


def inception(images: Tensor, real: Tensor) -> dict[str, Metric]:
    r"""The published measures, by torch-fidelity and the Inception weights of 2015-12-05: `is`, `fid` and `kid`.

    uint8 (N, 3, H, W) and the real images that the distances are to. Raises UserError without the package or weights.
    """
    inception_is_possible(tuple(images.shape[1:]))
    import svae_lib._torchvision  # noqa: F401, I001  (torch_fidelity imports torchvision)
    import torch_fidelity

    sizes = {"kid_subsets": SUBSETS, "kid_subset_size": min(SUBSET_SIZE, len(images), len(real))}
    sizes["cuda"] = images.device.type == "cuda"
    try:
        found = torch_fidelity.calculate_metrics(
            input1=Images(images), input2=Images(real), isc=True, fid=True, kid=True, verbose=False, **sizes
        )
    except (OSError, RuntimeError) as error:  # no network, a broken download, too little memory
        why = f"the published measures need the Inception weights and failed ({error})"
        raise UserError(f"{why}; mend that and give the same command again, which trains nothing anew") from None
    count, kid_std = {"n": len(images)}, found["kernel_inception_distance_std"]
    return {
        "is": {"value": found["inception_score_mean"], "se": found["inception_score_std"]} | count,
        "fid": {"value": found["frechet_inception_distance"], "se": 0.0} | count,
        "kid": {"value": found["kernel_inception_distance_mean"], "se": kid_std / SUBSETS**0.5} | count,
    }


class Images(Dataset):
    r"""uint8 images as torch-fidelity reads them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.images[row]


# Calibration --------------------------------------------------------------------------------------------

RULER = {  # what is measured of each classifier -> in words
    "train": "real, other training images",
    "test": "real, test images",
    "blur": "test, blurred by 3 × 3",
    "noise": "test, noise of 0.1",
    "class_missing": "test, one class missing",
}


def blur(images: Tensor) -> Tensor:
    r"""Every number the mean of its 3 × 3 neighbours; uint8 -> uint8."""
    padded = F.pad(images.float(), [1] * 4, mode="replicate")
    return F.avg_pool2d(padded, 3, stride=1).round().to(torch.uint8)


def noise(images: Tensor, std: float = 0.1) -> Tensor:
    r"""Gaussian noise, its standard deviation in units of the grey axis; uint8 -> uint8."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (images + 255 * std * drawn).round().clamp(0, 255).to(torch.uint8)


def calibrate(dataset: data.Dataset, device: torch.device) -> dict:
    r"""A report: accuracy on validation and test, and what the measures say of real and of degraded images.

    Rows are of the test images, but for `train`: training images that are not the reference.
    """
    net, test = load_classifier(dataset, device), dataset.test.to(device)
    real = features(net, reference(dataset, device))
    others = in_mixed_order(dataset)[len(real) : len(real) + len(test)]
    train = dataset.train.take(others).to(device)
    rows = (train, test.images, blur(test.images), noise(test.images), test.images[test.labels != 0])
    found = {
        f"{name}_{key}": value
        for name, images in zip(RULER, rows, strict=True)
        for key, value in quality(net, images, real).items()
    }
    splits = {"validation": dataset.validation.to(device), "test": test}
    for name, split in splits.items():
        hits = accuracy(net, split)
        found[f"{name}_accuracy"] = {"value": hits, "se": (hits * (1 - hits) / len(split)) ** 0.5, "n": len(split)}
    return {"name": f"classifier-{dataset.name}", "dataset": dataset.name, "metrics": found}


def ruler(report: Record) -> pd.DataFrame:
    r"""The rows of `calibrate` as a table: what the numbers of models are to be held against."""
    decimals = {"score": 2, "fcd": 2, "kcd": 3}
    of = {row: [report["metrics"][f"{row}_{key}"]["value"] for key in decimals] for row in RULER}
    table = pd.DataFrame(of, index=list(decimals)).T.round(decimals)
    return (table + 0.0).rename(index=RULER, columns={"fcd": "FCD", "kcd": "KCD"})  # no "-0.000"
