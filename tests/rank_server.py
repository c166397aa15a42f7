"""Runs of several ranks without a launch each: one process imports everything once and forks the ranks.

Reads a request per line on stdin, `{"log": folder, "num_ranks": 2, "port": 1234, "words": [...], "main": null}`, and
answers each with the exit codes of its ranks, whose output is in `log/rank_*.log`. `main` names what runs with the
words in place of the trainer, `tests.folder.module:function`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path


def _serve(request: dict) -> list[int]:
    log, world_size, port = Path(request["log"]), request["num_ranks"], request["port"]
    module, _, function = (request["main"] or "tempsamp_fast.train:main").partition(":")
    main = getattr(import_module(module), function)
    processes = [
        start(request["words"], log / f"rank_{rank}.log", rank=rank, world_size=world_size, port=port, main=main).pid
        for rank in range(world_size)
    ]
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:  # the others would wait for it for ever
            for other in set(processes) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    from bench.fault_campaign.children import start

    for line in sys.stdin:
        os.write(answers, (json.dumps(_serve(json.loads(line))) + "\n").encode())
