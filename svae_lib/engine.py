r"""What makes one update fast: a CUDA graph instead of Python, and an average that costs one pass over the weights."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

WARM_UP = 3  # eager updates, in which libraries choose algorithms and the optimisers make their state


class Graph:
    r"""`alternate`, captured once as a CUDA graph and then replayed: same kernels, same random numbers, one launch.

    The first updates are eager, on the stream of the capture, and count as any other. What changes from update to
    update must be written into tensors beforehand. Work that waits for the host cannot be captured: it is noticed in
    the last eager update, one sentence says so, and all further updates are eager.
    """

    def __init__(self, alternate: Callable[[], None], device: torch.device) -> None:
        self.alternate, self.device = alternate, device
        self.stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        self.eager_updates, self.captured, self.waits = 0, False, False

    def __call__(self) -> None:
        if self.waits:
            self.alternate()
            return
        if self.eager_updates < WARM_UP:
            self._warm_up()
            return
        if not self.captured:
            gc.collect()  # garbage on the device must not be freed during the capture
            with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=self.stream):
                self.alternate()  # is written down, not done
            self.captured = True
        self.graph.replay()

    def _warm_up(self) -> None:
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.alternate()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        outer.wait_stream(self.stream)
        self.eager_updates += 1
        synchronised = sum("synchronizing CUDA operation" in str(warning.message) for warning in heard)
        if self.eager_updates == WARM_UP and synchronised:
            self.waits = True
            reason = f"an update waits for the host at {synchronised} places"
            tqdm.write(f"no CUDA graph: {reason}; training goes on without", file=sys.stderr)


class Average(AveragedModel):
    r"""The exponential moving average of a net, its buffers included.

    AveragedModel lists its tensors anew at each update, a tenth of the time of nets as small as those of points.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, use_buffers=True)
        averages = [*self.module.parameters(), *self.module.buffers()]
        currents = [*net.parameters(), *net.buffers()]
        self.moving = _of_kind(True, averages), _of_kind(True, currents)
        self.counters = _of_kind(False, averages), _of_kind(False, currents)  # of BatchNorm

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        r"""average ← average + share · (net − average), share a number or a tensor on the device."""
        average, current = self.moving
        if isinstance(share, Tensor):
            gap = torch._foreach_sub(current, average)
            torch._foreach_mul_(gap, share)
            torch._foreach_add_(average, gap)
        else:
            torch._foreach_lerp_(average, current, share)
        if self.counters[0]:
            torch._foreach_copy_(*self.counters)


def _of_kind(floating: bool, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point() == floating]
