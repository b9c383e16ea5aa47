"""What each of two processes does in test_distributed.py, under torchrun: shared_worker.py DEVICE FOLDER."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from svae_lib import cli, commands, data, distributed, experiment, train
from svae_lib.distributed import Share
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment

# Plain means, critics with BatchNorm and a penalty, slopes inside the objective, features compared, codes of others.
METHODS = ("vae", "svae-r", "wgan-gp", "mmd-gan", "as-vae")
RUN = ("run", "ring8", "svae-r", "--set", "norm=none", "--set", "updates=12", "--set", "log_every=4")


@contextmanager
def doubles():
    """Everything in fp64: in fp32 Adam makes whole steps of the rounding of gradients that BatchNorm cancels."""
    single, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def trainer(method, device="cpu"):
    made = Experiment.make("digits", method, updates=4, batch=8, log_every=2, ema=0.9, penalty=0.1, engine="eager")
    return experiment.prepare(made, data.load("digits"), torch.device(device))


def outcome(method, device="cpu"):
    """Weights, averages and loss curve."""
    with doubles():
        t = trainer(method, device)
        t.fit()
    nets = (t.model.players, t.average, t.critics)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in t.history]
    return [value.cpu() for net in nets for value in net.state_dict().values()], rows


def slopes(net, x):
    """Output, input gradient, and the weight gradients of a penalty on it, of a net with a BatchNorm."""
    x = x.clone().requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(slope.square().sum(), (x, *net.parameters()))
    return [y, slope, *second, net[1].running_mean, net[1].running_var]


def small_net(device="cpu"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh())
    return net.to(device, torch.float64), (3 + torch.randn(8, 2, 5, 5, dtype=torch.float64)).to(device)


def main(device, folder):
    if device == "cuda" and torch.cuda.device_count() == 1:  # both on the one card, by Gloo, for NCCL would refuse
        os.environ["LOCAL_RANK"] = "0"
        torch.distributed.init_process_group("gloo")
    own = distributed.join(torch.device(device))
    found = {method: outcome(method, own) for method in METHODS}
    net, x = small_net(own)
    with Share():
        found["slopes"] = [value.detach().cpu() for value in slopes(net, x.chunk(2)[distributed.rank()])]
    t = trainer("vae", own)
    with torch.no_grad():
        next(t.model.decoder.parameters())[0] += 1e-6 * distributed.rank()
    try:
        t.diagnose()
    except UserError as error:
        found["differ"] = str(error)
    torch.save(found, folder / f"{distributed.rank()}.pt")

    def die(row):
        if row["update"] == 8 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train.CHECKPOINT_SECONDS, commands.print_row = 0, die
    cli.main([*RUN, "--device", device, "--results", str(folder)])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
