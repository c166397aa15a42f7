"""`tempsamp COMMAND ...`, or `python -m tempsamp_fast COMMAND ...`: every command of the package by its name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from tempsamp_fast import __version__
from tempsamp_fast.config.setting import choose_from

COMMANDS = {
    "demo": "train a small model by three methods, side by side: ten minutes on two CPU cores",
    "train": "train a model; on several GPUs: deepspeed --module tempsamp_fast.train",
    "eval": "evaluate a checkpoint on a data set, beside the published scores",
    "infer": "ask a model when something happens in a video",
    "score": "score predictions",
    "data": "check that a data set is complete",
    "video": "look at a video file as the trainer reads it",
    "plan": "what a run will take: steps, FLOPs, memory",
    "report": "compare runs on one page",
    "export": "write a trained model for others to load",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command as `python -m tempsamp_fast.COMMAND` does; exit code 2 for one that there is not."""
    given = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    name, words = given[0], given[1:]
    if name in ("-h", "--help"):
        described = "\n".join(f"  {command:8}{meaning}" for command, meaning in COMMANDS.items())
        sys.stdout.write(f"usage: tempsamp COMMAND ... (--help for each)\n\n{described}\n")
    elif name == "--version":
        sys.stdout.write(f"tempsamp-fast {__version__}\n")
    elif name not in COMMANDS:
        sys.stderr.write(f"error: no command {name[:80]!r}; {choose_from(name, COMMANDS)}\n")
        sys.exit(2)
    else:
        sys.argv = [f"tempsamp {name}", *words]
        runpy.run_module(f"tempsamp_fast.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
