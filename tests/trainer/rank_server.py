"""Runs of several ranks without a launch each: one process imports everything once and forks the ranks.

Reads a request per line on stdin, `{"log": folder, "num_ranks": 2, "port": 1234, "words": [...]}`, and answers each
with the exit codes of its ranks, whose output is in `log/rank_*.log`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def _be_rank(rank: int, num_ranks: int, port: int, words: Sequence[str], log: Path) -> None:
    output = os.open(log / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_PORT=str(port))
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(request: dict) -> list[int]:
    processes = []
    for rank in range(request["num_ranks"]):
        process = os.fork()
        if process == 0:
            _be_rank(rank, request["num_ranks"], request["port"], request["words"], Path(request["log"]))
        processes.append(process)
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
    from tempsamp_fast.train import main

    for line in sys.stdin:
        os.write(answers, (json.dumps(_serve(json.loads(line))) + "\n").encode())
