"""Several processes train one model: they end where one process ends, and go on where they were killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import shared_worker
import torch
from shared_worker import METHODS, RUN
from torch.nn.functional import dropout
from torch.testing import assert_close

from svae_lib import cli, distributed, train
from svae_lib.errors import UserError
from svae_lib.levels import Cells


def torchrun(*arguments, cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *where, *map(str, arguments)]
    paths = os.pathsep.join([str(Path(cli.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a graphics card")
    return request.param


@pytest.fixture(scope="module")
def folder(device, tmp_path_factory):
    """Where two processes leave what they found, and the remains of a run of which one was killed."""
    folder = tmp_path_factory.mktemp(device)
    ended = torchrun(shared_worker.__file__, device, folder, cache=folder)
    assert ended.returncode and (folder / "1.pt").exists(), ended.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_does(found, device, method):
    weights, rows = shared_worker.outcome(method, device)
    for theirs in found:
        assert_close(theirs[method][0], weights, atol=1e-7, rtol=0)
        for row, same in zip(theirs[method][1], rows, strict=True):
            assert row == pytest.approx(same, rel=1e-8)


def test_batch_norm_and_its_second_derivative_are_those_of_the_whole_batch(found, device):
    whole = [value.detach().cpu() for value in shared_worker.slopes(*shared_worker.small_net(device))]
    y, slope, of_x, *of_weights, mean, var = zip(*(theirs["slopes"] for theirs in found), strict=True)
    parts = [*map(torch.cat, (y, slope, of_x)), *map(sum, of_weights), mean[0], var[1]]
    assert_close(parts, whole, atol=1e-10, rtol=1e-10)


def test_different_weights_are_noticed(found):
    for theirs in found:
        assert theirs["differ"].startswith("the processes' weights differ at update 0; ")


def test_killed_processes_leave_no_record_and_resume(folder, device, tmp_path, monkeypatch, capsys):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two graphics cards")
    assert not [*folder.glob("ring8/*.json")]
    (checkpoint,) = folder.glob("svae_lib/runs/*.pt")
    assert train.read_checkpoint(checkpoint)["done"] in (7, 8)  # the first may have written before it noticed
    ended = torchrun("-m", "svae_lib", *RUN, "--device", device, "--results", folder, cache=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("record: ") == ended.stdout.count("update 12 ") == 1 and "update 4 " not in ended.stdout
    (path,) = folder.glob("ring8/*.json")
    theirs = json.loads(path.read_text())
    assert theirs["processes"] == 2 and len(theirs["history"]) == 3 and theirs["status"] == "done"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main([*RUN, "--device", device, "--results", str(tmp_path)]) == 0
    ours = json.loads((tmp_path / "ring8" / path.name).read_text())
    for row, same in zip(theirs["history"], ours["history"], strict=True):
        assert row | {"seconds": 0} == pytest.approx(same | {"seconds": 0}, rel=1e-3)  # in fp32


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn(len(x), 3),
        lambda x: torch.rand((len(x), 3)),
        lambda x: torch.randn_like(x),
        lambda x: Cells.draw((256 * x).to(torch.uint8)),
        lambda x: torch.randint(10, (len(x),)),
        lambda x: torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), len(x), replacement=True),
        lambda x: dropout(x, 0.5),
    ],
    ids=["randn", "rand", "randn_like", "rand_like", "randint", "multinomial", "dropout"],
)
def test_each_process_draws_its_rows_of_what_one_would_draw(monkeypatch, draw):
    x = torch.rand(8, 3)
    torch.manual_seed(0)
    whole, parts = draw(x), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(0)
        with distributed.Share():
            parts.append(draw(x[4 * rank : 4 * rank + 4]))
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(*parts)


def test_what_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share a batch of 8; set batch to a multiple of 3"):
        shared_worker.trainer("vae")
    with pytest.raises(UserError, match="cannot share one mps device; choose --device cpu"):
        distributed.join(torch.device("mps"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="start at most 2 on this machine"):
        distributed.join(torch.device("cuda"))


def test_without_torchrun_there_is_one_process():
    assert distributed.count() == 1 and distributed.rank() == 0
    assert distributed.join(torch.device("cpu")) == torch.device("cpu") and distributed.from_first("x") == "x"
