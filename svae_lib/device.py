r"""The one place that chooses where, in which precision and by which engine tensors are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svae_lib.errors import UserError
from svae_lib.memory import keep_freed

PRECISIONS = ("fp32", "tf32", "bf16")
ENGINES = ("auto", "eager")


def choose_device(name: str = "auto") -> torch.device:
    r"""The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises UserError if the device does not exist on this machine.
    """
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if count[kind])
    kind, colon, index = name.partition(":")
    number = index if colon else "0"
    if not number.isdecimal() or int(number) >= count.get(kind, 0):
        usable = ", ".join(kind for kind, there in count.items() if there)
        raise UserError(f"device '{name}' is not available here; choose auto or one of: {usable}")
    if kind == "cuda":
        _tf32(False)  # PyTorch's own default rounds convolutions: here fp32 means fp32
        torch.backends.cudnn.benchmark = True  # shapes never change: the fastest algorithm is timed once
    if kind == "cpu":
        keep_freed()
    return torch.device(name)


def describe(device: torch.device) -> str:
    r"""A short description for run records, e.g. "cpu, 2 threads", "cpu, 2 threads, no bf16" or "cuda, NVIDIA H200"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads" + ("" if knows_bf16(device) else ", no bf16")
    return device.type


def replays(engine: str, device: torch.device) -> bool:
    r"""Whether updates are captured in a CUDA graph and replayed (`svae_lib.engine`): on CUDA, unless it is "eager".

    Elsewhere updates are eager. On one CPU core `torch.compile` made a VAE slower, by 13 % on digits and 8 % on MNIST
    with A.1's nets, after half a minute of compiling (torch 2.13), and it cannot differentiate twice, as the slope of
    a critic needs.
    """
    return engine == "auto" and device.type == "cuda"


def synchronise(device: torch.device) -> None:
    r"""Wait until the device has done what it was told, as honest timing needs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Precision --------------------------------------------------------------------------------


def knows_bf16(device: torch.device) -> bool:
    r"""Whether bf16 is multiplied by the device itself, and not imitated. Among x86 processors AVX-512 decides."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def usable(precision: str, device: torch.device) -> str:
    r"""What a run that asks for `precision` is computed in: fp32 instead of a bf16 that the device would imitate.

    On a processor with AVX2 alone an update of A.1 took 7.5 times as long in imitated bf16 as in fp32, of A.2 10 times.
    """
    return "fp32" if precision == "bf16" and not knows_bf16(device) else precision


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    r"""Inside, CUDA multiplies and convolves fp32 numbers with 10 bits of mantissa, forwards and backwards."""
    if on:
        _tf32(True)
    try:
        yield
    finally:
        if on:
            _tf32(False)


def _tf32(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
