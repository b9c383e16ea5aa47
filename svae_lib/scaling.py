r"""How the time of an update changes with the number of processes that train one model (`svae_lib.distributed`).

`torchrun` starts this module as it starts `svae run`. The experiment and its batch stay the same and every process has
one thread: N processes do the arithmetic of one, and need 1/N of its time if nothing waits for the others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from svae_lib import distributed
from svae_lib.device import choose_device
from svae_lib.engine import WARM_UP
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment, prepare
from svae_lib.timing import Effort, Row, clock, dataset, missing, row


def rows(device: torch.device, effort: Effort) -> Iterator[Row]:
    r"""Seconds of an update of N processes over those of one, for each N that has the cores or graphics cards."""
    there = {"cpu": os.cpu_count() or 1, "cuda": torch.cuda.device_count()}.get(device.type, 1)
    if there < 2:
        yield missing("processes: 2 ÷ 1", "each process needs a core or a graphics card of its own, and there is one")
    for number in (n for n in ((2, 4, 8) if effort.large else (2,)) if n <= there):
        times: dict[int, list[float]] = {1: [], number: []}
        try:
            for processes in (1, number, number, 1)[: None if effort.large else 2]:  # a drift meets both alike
                times[processes] += launch(processes, device.type, effort)
        except UserError as error:
            yield missing(f"processes: {number} ÷ 1", error)
            continue
        one, several = map(np.array, times.values())
        medians = {"1": np.median(one), str(number): np.median(several)}
        yield row(f"processes: {number} ÷ 1", several / one, aim=f"{1 / number:g}, ideal", **medians)


def launch(processes: int, device: str, effort: Effort) -> list[float]:
    r"""Seconds of an update in each of several blocks. Raises UserError with the first error of the processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "seconds.json"
        start = distributed.torchrun(processes, f"--log-dir={folder}")  # or its empty folders would stay
        named = ["-m", "svae_lib.scaling", device, str(effort.turns), str(effort.seconds), str(found)]
        ended = subprocess.run([*start, *named], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if ended.returncode:  # of who was killed torchrun tells last; who raised an error has printed it before
            signal = re.search("Signal .+", ended.stderr.partition("Root Cause")[2])
            said = signal or re.search(r"\w+Error: .+", ended.stderr)
            reason = said[0] if said else f"code {ended.returncode}"
            raise UserError(f"`torchrun --nproc_per_node={processes} -m svae_lib.scaling` failed with {reason}")
        return json.loads(found.read_text())


def main(device: str, turns: str, seconds: str, path: str) -> None:
    r"""What each process does: time `turns` blocks of about so many seconds. The first writes seconds of an update."""
    torch.set_num_threads(1)
    own = distributed.join(choose_device(device))
    torch.manual_seed(0)  # all processes hold the same images
    trainer = prepare(Experiment.make("mnist", "vae"), dataset("mnist", 4_096), own)

    def block(updates: int) -> float:
        start = clock(own)
        for _ in range(updates):
            trainer.update()
        return (clock(own) - start) / updates

    block(WARM_UP + 2)  # libraries choose algorithms, optimisers make their state, a graph is captured
    updates = distributed.from_first(max(1, round(float(seconds) / block(3))))  # unequal numbers would wait for ever
    times = [block(updates) for _ in range(int(turns))]
    if trainer.writes:
        Path(path).write_text(json.dumps(times))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
