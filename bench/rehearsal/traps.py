"""Proof that a rehearsal can fail: known faults of the GPU path, put back one by one into a copy of the tree.

`python -m bench.rehearsal.traps` plays the small scenario on each copy. It exits with 1 where one of them passes, or
fails for another reason than its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.rehearsal.ledger import REPOSITORY

COPIED = ("tempsamp_fast", "kernels", "bench")


@dataclass(frozen=True)
class Trap:
    """A fault: in `file`, `right` becomes `wrong`, and a line of the rehearsal has to say `complaint`."""

    name: str
    file: str
    right: str
    wrong: str
    complaint: str


TRAPS = (
    Trap(
        "a scalar assigned per token",
        "tempsamp_fast/rollout/decoding.py",
        "cache.step.add_(1)",
        "cache.step[0] = 1",
        "decoding.py decode_token: cache.step[0] = 1",
    ),
    Trap(
        "a value read per token",
        "tempsamp_fast/rollout/decoding.py",
        "    logits = policy(new, next_token_logits, attention=cache)",
        "    logits = policy(new, next_token_logits, attention=cache)\n    logits.sum().item()",
        "a CUDA graph cannot record a wait",
    ),
    Trap(
        "a graph recorded anew in every rollout",
        "tempsamp_fast/rollout/decoding.py",
        "        return self._rooms\n",
        "        self._rooms, self._version = Rooms(), -1\n        return self._rooms\n",
        "a CUDA graph was recorded again",
    ),
    Trap(
        "pixels in float32",
        "tempsamp_fast/model/packing.py",
        "    return videos[0].pixel_values if len(videos) == 1",
        "    return videos[0].pixel_values.float() if len(videos) == 1",
        "MiB travel as float32",
    ),
    Trap(
        "keys repeated to all heads",
        "tempsamp_fast/model/varlen_attention.py",
        "and not groups_right(query.device, query.dtype)",
        "and True",
        "keys are repeated to all heads",
    ),
    Trap(
        "an index on the CPU",
        "tempsamp_fast/model/policy.py",
        "hidden.flatten(0, 1)[row.logit_indices]",
        "hidden.flatten(0, 1)[row.logit_indices.cpu()]",
        "an index on the CPU is copied to the card",
    ),
)


def main() -> int:
    with ThreadPoolExecutor(2) as pool:
        unharmed, *fallen = pool.map(fall_into, (None, *TRAPS))
    if unharmed:
        print(f"the tree as it is does not pass:\n{unharmed[-2000:]}")
        return 1
    missed = 0
    for trap, found in zip(TRAPS, fallen, strict=True):
        missed += trap.complaint not in found
        print(f"{'missed' if trap.complaint not in found else 'caught'}: {trap.name}", flush=True)
        if trap.complaint not in found:
            print(found[-2000:], flush=True)
    return 1 if missed else 0


def fall_into(trap: Trap | None) -> str:
    """What the rehearsal of a tree with the fault prints; empty where it passes. None: of the tree as it is."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(REPOSITORY / name, Path(folder) / name, ignore=ignored)
        if trap is not None:
            file = Path(folder) / trap.file
            text = file.read_text()
            assert text.count(trap.right) == 1, f"{trap.file} has {text.count(trap.right)} times {trap.right!r}"
            file.write_text(text.replace(trap.right, trap.wrong))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(Path(folder) / "kernels")])}
        command = [sys.executable, "-m", "bench.rehearsal", "--small"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
