r"""`from svae_lib._torchvision import torchvision`, so that it loads beside any build of torch.

The wheels of torchvision on the package index are CUDA builds. Beside a CPU build of torch their
native library does not load, and `import torchvision` then stops because two operators have no
schema. We try the native library first; only where it cannot load are the two schemas declared
(declaring them twice would abort the process). Nothing in the book calls the operators.
"""

import glob
import importlib.util
import os

import torch


def _declare_missing_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in glob.glob(os.path.join(os.path.dirname(spec.origin), "_C.*so")):
        try:
            torch.ops.load_library(library)
        except OSError:
            schemas = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _keep_alive.append(schemas)


_keep_alive: list[torch.library.Library] = []
_declare_missing_operators()

import torchvision  # noqa: E402, F401
