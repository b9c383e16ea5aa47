"""The update as the device sees it: no waiting, no growth, one sentence when memory ends, and CUDA's graph."""

import gc
import os
import platform
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from svae_lib import commands, data, engine, experiment, memory, train
from svae_lib import device as devices
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS

CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")

# Operations whose result, or its shape, the host has to see: each stops a GPU, and none can be captured.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "bincount", "lift_fresh", "_linalg_svd", "_linalg_eigh", "linalg_inv_ex", "_linalg_solve_ex",
}  # fmt: skip
EXCUSED = {"mcgan-cov": "the singular values of S25's covariances come from a solver that reports to the host"}


class Waits(TorchDispatchMode):
    """Notes what would make a device wait for the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if name in WAITING or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def trainer(dataset, method, device=CPU, **changes):
    changes = {"updates": 40, "batch": 8, "log_every": 20, "hidden": 8, "critic_hidden": 8} | changes
    return experiment.prepare(Experiment.make(dataset, method, **changes), data.load(dataset), device)


def waits(t):
    t.update()  # the first makes the optimisers' state
    with Waits() as noted:
        t.update()
    return noted.seen


@pytest.mark.parametrize("dataset, kind", [("digits", "images"), ("ring8", "points")])
def test_no_update_waits_for_the_host(dataset, kind):
    sizes = {"flow_length": 2, "channels": 4, "ema": 0.5, "decay": True}
    for name, row in METHODS.items():
        if kind in row.data and name not in EXCUSED:
            small = {"depth": 1, "hidden": 4} if name.startswith("pixel") else {}
            t = trainer(dataset, name, **sizes, **small, penalty=0.1 if row.critic else 0.0)
            assert waits(t) == [], name


def test_what_waits_is_noticed():
    assert "equal" in waits(trainer("ring8", "svae-r", encoder="planar", flow_length=2)), "Newton's method asks"
    assert "_linalg_svd" in waits(trainer("ring8", "mcgan-cov"))
    with Waits() as noted:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert noted.seen == ["index", "_local_scalar_dense"]


def test_nothing_is_left_behind_by_2000_updates():
    t = trainer("ring8", "gan", penalty=0.1, depth=1, updates=9_999)
    status = Path("/proc/self/status")

    def resident():
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, memory._read(str(status), "VmRSS")

    for _ in range(200):
        t.update()
    tensors, before = resident()
    for _ in range(2_000):
        t.update()
    tensors_now, after = resident()
    assert tensors_now < tensors + 100
    assert after - before < 8e6, "4 kB an update"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_freed_memory_is_kept_until_it_is_returned():
    """In a process of its own: where an allocation has failed before, as in some tests, glibc maps large blocks."""
    lines = """
import torch
from svae_lib import device, memory

device.choose_device("cpu")
resident = lambda: memory._read("/proc/self/status", "VmRSS") / 1e6
block = torch.ones(50_000_000)  # 200 MB
with_block = resident()
del block
freed = resident()
memory.return_freed()
print(with_block - freed, freed - resident())
"""
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    lost, returned = map(float, run.stdout.split())
    assert lost < 20
    assert returned > 180


def test_the_average_is_that_of_pytorch_and_takes_a_tensor():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    own, by_tensor = engine.Average(net), engine.Average(net)
    other = AveragedModel(
        net,
        multi_avg_fn=lambda a, b, _: [
            x.lerp_(y, 0.3) if x.is_floating_point() else x.copy_(y) for x, y in zip(a, b, strict=True)
        ],
        use_buffers=True,
    )
    for share in (1.0, 0.3, 0.3):
        net(torch.randn(5, 3))
        for parameter in net.parameters():
            parameter.data += torch.randn_like(parameter)
        own.follow(share)
        by_tensor.follow(torch.tensor(share))
        other.update_parameters(net)
    for a, b, c in zip(
        own.module.state_dict().values(),
        other.module.state_dict().values(),
        by_tensor.module.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert_close(c, b, rtol=1e-6, atol=1e-6)


# Memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_says_which_batch_would_fit(monkeypatch, error):
    t = trainer("ring8", "vae", batch=1280)
    draw, tried = t.draw, []

    def draw_what_fits(split):
        tried.append(t.training.batch)
        if t.training.batch > 500:
            raise error
        return draw(split)

    def peak(work, device):
        work()
        return 1_000 + 10 * tried[-1]

    t.draw = draw_what_fits
    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(memory, "available", lambda device: (1_000 + 10 * 450) / memory.USABLE)
    with pytest.raises(UserError, match="a batch of 1280 does not fit .* about 450 would: set batch=450"):
        t.fit()
    assert tried == [1280, 20, 40] and t.training.batch == 1280


def test_of_a_small_batch_too_it_is_said_which_would_fit(monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda work, device: 100)
    monkeypatch.setattr(memory, "available", lambda device: 1_000)
    assert memory.largest_batch(lambda size: None, 32, torch.device("cpu")) == 16
    assert memory.largest_batch(lambda size: None, 4, torch.device("cpu")) == 0


def test_what_a_log_and_a_bar_show(capsys, monkeypatch):
    rows = []
    t = trainer("ring8", "vae", updates=4, log_every=2)
    t.fit(on_log=rows.append)
    for row, kept in zip(rows, t.history, strict=True):
        seconds = 8 * row["update"] / row["points/s"]
        assert row["minutes left"] == pytest.approx((4 - row["update"]) / row["update"] * seconds / 60)
        assert row.items() >= kept.items() and "points/s" not in kept
        commands.print_row(row)
    assert "points/s" in (shown := capsys.readouterr().out) and "minutes left 0" in shown
    monkeypatch.setattr(train, "tqdm", lambda **choices: choices)
    bar = trainer("digits", "vae", updates=4, log_every=2)._progress()
    assert (bar["total"], bar["unit"]) == (32, " images")


def test_other_errors_are_not_taken_for_it():
    t = trainer("ring8", "vae")
    t.draw = lambda split: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        t.fit()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is reset by /proc")
def test_peak_memory_is_measured():
    less, more = (memory.peak(lambda n=n: torch.ones(n * 10_000_000), CPU) for n in (4, 8))
    assert 1.4e8 < more - less < 1.8e8 and memory.available(CPU) > more


# Precision --------------------------------------------------------------------------------


def test_bf16_and_fp32_reach_the_same_objective(ring, monkeypatch):
    monkeypatch.setattr(experiment, "usable", lambda precision, device: precision)  # imitated bf16 will do here
    ends = {}
    for precision in ("fp32", "bf16"):
        changes = {"updates": 150, "batch": 64, "log_every": 150, "precision": precision, "hidden": 16, "lr": 1e-2}
        made = [Experiment.make("ring8", "vae", seed=seed, **changes) for seed in range(12)]
        t = experiment.prepare_together(made, ring, CPU)
        start = t.diagnose()["objective"]
        t.fit()
        assert t.history[-1]["objective"] > start, "something was learned"
        torch.manual_seed(0)
        ends[precision] = torch.stack([of_run(t, run) for run in range(12)])
    a, b = ends.values()
    assert not torch.equal(a, b), "bf16 was used"
    error = ((a.var() + b.var()) / len(a)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * error, (a.mean(), b.mean(), error)


@pytest.mark.parametrize(("known", "wanted"), [(False, "fp32"), (True, "bf16")])
def test_bf16_is_used_where_it_is_not_imitated(ring, monkeypatch, known, wanted):
    monkeypatch.setattr(devices, "knows_bf16", lambda device: known)
    made = Experiment.make("ring8", "vae", precision="bf16", updates=1, hidden=4)
    trainer = experiment.prepare(made, ring, CPU)
    assert trainer.training == replace(made.training, precision=wanted)
    assert devices.describe(CPU).endswith("threads" if known else "no bf16")
    assert [devices.usable(other, CPU) for other in ("fp32", "tf32")] == ["fp32", "tf32"]


@torch.no_grad()
def of_run(t, run):
    players = experiment.evaluated(t, run)
    q = players["encoder"](t.held_out.images)
    return (players["decoder"](q.rsample()).log_prob(t.held_out.images) - q.kl_to_standard()).mean()


# CUDA -------------------------------------------------------------------------------------


class Pretended:
    """Takes the place of torch.cuda and notes what is asked of it."""

    def __init__(self, waits=False):
        self.said, self.waits = [], waits

    CUDAGraph = current_stream = Stream = lambda self, *_, **__: self
    wait_stream = set_sync_debug_mode = lambda self, *_: None
    stream = device = lambda self, *_: nullcontext()

    def graph(self, graph, stream):
        self.said.append("capture")
        return nullcontext()

    def replay(self):
        self.said.append("replay")

    def alternate(self):
        self.said.append("alternate")
        if self.waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("waits", [False, True])
def test_updates_are_eager_then_captured_then_replayed(monkeypatch, capsys, waits):
    pretended = Pretended(waits)
    monkeypatch.setattr(torch, "cuda", pretended)
    graph = engine.Graph(pretended.alternate, CPU)
    for _ in range(6):
        graph()
    fast = ["capture", "alternate", "replay", "replay", "replay"]
    assert pretended.said == ["alternate"] * 3 + (["alternate"] * 3 if waits else fast)
    assert ("no CUDA graph: an update waits for the host" in capsys.readouterr().err) == waits


@pytest.fixture
def cuda(monkeypatch):
    device = experiment.choose_device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return device


def weights(t):
    return [
        p.detach().cpu()
        for p in (
            *t.players.state_dict().values(),
            *t.critics.state_dict().values(),
            *(t.average.module.state_dict().values() if t.average else ()),
        )
    ]


@on_cuda
@pytest.mark.parametrize(
    "dataset, method",
    [
        ("digits", "vae"),
        ("digits", "svae-r"),
        ("digits", "as-vae"),
        ("digits", "wgan-gp"),
        ("digits", "fisher-gan"),
        ("ring8", "svae-exact"),
    ],
)
def test_graph_and_eager_updates_give_the_same_numbers(cuda, dataset, method):
    changes = {"updates": 20, "log_every": 10, "ema": 0.9, "decay": True}
    changes |= {"penalty": 0.1} if method in ("svae-r", "svae-exact") else {}
    graph, eager = (trainer(dataset, method, cuda, engine=name, **changes) for name in ("auto", "eager"))
    graph.fit()
    eager.fit()
    assert graph.engine == "graph" and eager.engine == "eager"
    for a, b in zip(weights(graph), weights(eager), strict=True):
        assert_close(a, b, rtol=0, atol=1e-5)


@on_cuda
def test_a_graph_allocates_nothing_per_update(cuda):
    t = trainer("digits", "svae-r", cuda, updates=9_999, penalty=0.1, ema=0.9)
    for _ in range(10):
        t.update()
    before = torch.cuda.memory_stats(cuda)
    for _ in range(200):
        t.update()
    after = torch.cuda.memory_stats(cuda)
    assert t.engine == "graph"
    for key in ("allocated_bytes.all.current", "allocation.all.allocated", "reserved_bytes.all.current"):
        assert after[key] == before[key], key


@on_cuda
def test_a_graph_resumes_from_a_checkpoint(cuda, tmp_path):
    whole = trainer("digits", "svae-r", cuda, ema=0.9, decay=True)
    whole.fit()
    first = trainer("digits", "svae-r", cuda, ema=0.9, decay=True)

    def stop_at_20(row):
        if row["update"] == 20:
            train.write_checkpoint(first.state(), tmp_path / "run.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "run.pt", stop_at_20)
    second = trainer("digits", "svae-r", cuda, ema=0.9, decay=True)
    second.fit(tmp_path / "run.pt")
    assert second.engine == "graph" and second.done == 40
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert_close(a, b, rtol=0, atol=1e-5)


@on_cuda
def test_an_update_that_waits_is_not_captured(cuda, capsys):
    t = trainer("ring8", "svae-r", cuda, encoder="planar", flow_length=2)
    t.fit()
    assert t.advance.waits and t.engine == "eager" and t.done == 40
    assert "no CUDA graph: an update waits for the host" in capsys.readouterr().err


@on_cuda
def test_tf32_rounds_in_training_only(cuda):
    exact, rounded = (trainer("digits", "vae", cuda, updates=5, precision=p) for p in ("fp32", "tf32"))
    exact.fit()
    rounded.fit()
    assert not all(torch.equal(a, b) for a, b in zip(weights(exact), weights(rounded), strict=True))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


@on_cuda
def test_a_run_on_points_is_trained_and_evaluated(cuda, tmp_path):
    made = [Experiment.make("ring8", "svae-exact", seed=seed, updates=10, log_every=5) for seed in range(2)]
    for record in experiment.run_together(made, "cuda", tmp_path):
        assert record["status"] == "done" and record["engine"] == "graph" and "l2" in record["metrics"]
