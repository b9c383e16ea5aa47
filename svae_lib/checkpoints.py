r"""Files that hold the state of a run, or the weights of a classifier: whole or not there, and read without trust."""

from __future__ import annotations

from pathlib import Path

import torch

from svae_lib.errors import UserError
from svae_lib.files import whole


def write_checkpoint(state: dict, path: Path) -> None:
    r"""Write `state` to `path` so that the file is always whole: the old one, or the new one."""
    with whole(path) as new:
        torch.save(state, new)


def read_checkpoint(path: Path) -> dict:
    r"""The state in `path`, on the CPU. Raises UserError if the file is not a checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds here, all meaning the same
        raise UserError(f"{path} is not a readable checkpoint; delete it to start afresh") from None
