"""Work on what a stranger wrote that may not end or fit the memory: done in a fork, which ends instead."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path


def bounded(work: Callable[[], str], seconds: float, num_bytes: int) -> str:
    """The text that `work` gives. Raises ValueError when it fails, takes longer, or takes more memory than that."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))
            answer = f"+{work()}"
        except BaseException as error:
            answer = f"-{type(error).__name__}: {error}"
        os.write(writer, answer[:num_bytes].encode(errors="replace"))  # waits while the pipe is full
        os._exit(0)
    os.close(writer)
    parts, deadline = [], time.monotonic() + seconds
    try:
        while select.select([reader], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            parts.append(os.read(reader, 1 << 16))
            if not parts[-1]:
                break
        else:
            raise ValueError(f"was not done within {seconds:g} s")
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answer = b"".join(parts).decode()
    if not answer.startswith("+"):
        raise ValueError(answer[1:300] or f"died with {num_bytes >> 20} MiB")
    return answer[1:]
