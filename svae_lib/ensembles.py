r"""Many small runs as one: nets of the same shape stacked, so that one matrix product serves all of them.

A batch of R runs with B samples each is a plain batch of R·B, run after run. Only the linear layers know; objectives,
densities and the loop do not. R times an objective that is a mean over samples is then the sum of the runs' own, and
each run moves as it would move alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svae_lib.errors import UserError


class GroupedLinear(nn.Module):
    r"""R linear layers side by side; (R·B, inputs) -> (R·B, outputs), each run's B rows through its own layer.

    Weight and bias are stored divided by `scales` (R,), so that Adam with step size lr moves run r by scales_r · lr.
    """

    def __init__(self, layers: Sequence[nn.Linear], scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", scales[:, None, None])
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().mT for layer in layers]) / self.scales)
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]) / self.scales)

    def forward(self, x: Tensor) -> Tensor:
        runs = x.unflatten(0, (len(self.weight), -1))
        return torch.baddbmm(self.scales * self.bias, runs, self.scales * self.weight).flatten(0, 1)

    def alone(self, run: int) -> nn.Linear:
        r"""The layer of one run."""
        inputs, outputs = self.weight.shape[1:]
        layer = nn.Linear(inputs, outputs, dtype=self.weight.dtype, device=self.weight.device)
        layer.weight.data = (self.scales * self.weight)[run].detach().mT.clone()
        layer.bias.data = (self.scales * self.bias)[run, 0].detach().clone()
        return layer


class GroupedBatchNorm(nn.BatchNorm1d):
    r"""R batch normalisations side by side; (R·B, features), each run by the statistics of its own B rows.

    `scales` as in `GroupedLinear`, for the gain and bias that are learned.
    """

    def __init__(self, layers: Sequence[nn.BatchNorm1d], scales: Tensor) -> None:
        super().__init__(len(layers) * layers[0].num_features)
        self.runs = len(layers)
        self.register_buffer("scales", scales.repeat_interleave(layers[0].num_features))
        for name, value in self.state_dict().items():
            if name in ("weight", "bias"):
                value.copy_(torch.cat([getattr(layer, name).detach() for layer in layers]) / self.scales)
            elif name.startswith("running"):
                value.copy_(torch.cat([getattr(layer, name) for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        side_by_side = x.unflatten(0, (self.runs, -1)).transpose(0, 1).flatten(1)
        use_batch = self.training
        if use_batch:
            self.num_batches_tracked += 1
        y = nn.functional.batch_norm(
            side_by_side, self.running_mean, self.running_var, self.scales * self.weight, self.scales * self.bias,
            use_batch, self.momentum, self.eps,
        )  # fmt: skip
        return y.unflatten(1, (self.runs, -1)).transpose(0, 1).flatten(0, 1)

    def alone(self, run: int) -> nn.BatchNorm1d:
        r"""The layer of one run."""
        features = self.num_features // self.runs
        layer = nn.BatchNorm1d(features, dtype=self.weight.dtype, device=self.weight.device)
        mine = slice(run * features, (run + 1) * features)
        own = {"weight": self.scales * self.weight, "bias": self.scales * self.bias}
        own |= {"running_mean": self.running_mean, "running_var": self.running_var}
        layer.load_state_dict({name: value[mine] for name, value in own.items()}, strict=False)
        return layer.train(self.training)


def stack(nets: Sequence[nn.Module], scales: Tensor | None = None) -> nn.Module:
    r"""One net out of R of the same shape; `scales` (R,) are their relative step sizes.

    Raises UserError if something other than plain linear layers would learn or mix the samples.
    """
    scales = torch.ones(len(nets)) if scales is None else scales
    if type(nets[0]) is nn.Linear:  # not one whose weight is made from another, as by a spectral norm
        return GroupedLinear(nets, scales)
    if isinstance(nets[0], nn.BatchNorm1d):
        return GroupedBatchNorm(nets, scales)
    if [*nets[0].parameters(recurse=False)]:
        raise UserError(f"runs with a layer of type {type(nets[0]).__name__} cannot be trained together")
    stacked = copy.copy(nets[0])
    if hasattr(stacked, "runs"):  # it has to know, for it draws for each of them
        stacked.runs = len(nets)
    stacked._modules = {name: stack([net._modules[name] for net in nets], scales) for name in nets[0]._modules}
    return stacked


def alone(net: nn.Module, run: int) -> nn.Module:
    r"""One run's net out of a stacked one."""
    if isinstance(net, GroupedLinear | GroupedBatchNorm):
        return net.alone(run)
    single = copy.copy(net)
    if hasattr(single, "runs"):
        single.runs = 1
    single._modules = {name: alone(module, run) for name, module in net._modules.items()}
    return single
