r"""The one place that chooses where and in which precision tensors live."""

from __future__ import annotations

import torch

from svae_lib.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    r"""The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises UserError if the device does not exist on this machine.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device '{name}' is not available here; choose auto or one of: {usable}")
    return torch.device(name)


def describe(device: torch.device) -> str:
    r"""A short description for run records, e.g. "cpu, 2 threads" or "cuda, NVIDIA H200"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return device.type
