"""How the embedded base was made: `python -m tempsamp_fast.demo.pretrain OUT [--work DIR]`, some ten minutes.

A million random weights learn to look at videos of one event, and then see a few of the demo's: it stands for what
users bring, a pretrained model that answers, thinks when asked to, and is often wrong. The same versions on the same
kind of machine make the same file, to the bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tempsamp_fast.demo.runs import draw, train_all
from tempsamp_fast.embedded.videos import SyntheticConfig
from tempsamp_fast.export import export
from tempsamp_fast.run.checkpoint import model_folder
from tempsamp_fast.system.files import log_printably, own_folder, write_file

EASY = SyntheticConfig(
    num_train=1200,
    num_val=0,
    num_test=60,
    min_duration_s=10.0,
    max_duration_s=10.0,
    sizes=("64x64",),
    colours=("red", "green", "blue", "yellow", "purple", "cyan"),
    shapes=("circle",),
    max_events=1,
    num_distractors=0,
    min_event_share=0.1,
    max_event_share=0.3,
    time_step_s=1.0,
    background=20.0,
)
"""One event and nothing else: where a model learns to look at all."""

HARD = dataclasses.replace(EASY, num_train=2400, num_test=540, max_events=3, num_distractors=1, max_event_share=0.2)
"""Up to three events of 1 or 2 s in 10 s beside a shape that never goes: a guess rarely hits, and no constant span does
well."""

SEED = 9000
STAGES = {
    "easy": (EASY, "sft:1500@1e-3,sft/answer+think:100@3e-4"),
    "hard": (HARD, "sft/answer+think:30@3e-4"),
}
"""Videos and phases; the second begins with what the first ended with, and is short: few sampled answers hit."""
NUM_ASKED = 200
"""Held-out queries that the card's scores are of."""
CARD = """
## How it was made

    python -m tempsamp_fast.demo.pretrain OUT

made it: {stages}, each with seed {seed} on videos that `tempsamp_fast/embedded/videos.py` draws from seed 0
(`EASY` and `HARD` of `tempsamp_fast/demo/pretrain.py`). SHA-256 of `model.safetensors`: `{digest}`.
"""


def pretrain(work: Path, out: Path) -> str:
    """Write the base into the new folder `out`, in bfloat16; returns its SHA-256. Data and runs stay in `work`.

    Raises ValueError for an `out` that exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already")
    own_folder(work)
    model = "tiny"
    for name, (videos, phases) in STAGES.items():
        files = draw(work / "data" / name, videos)
        words = ["--config=demo", f"--model={model}", f"--phases={phases}", f"--seed={SEED}", *files]
        words += ["--eval_start=false", f"--max_eval_samples={NUM_ASKED}"]
        train_all(work, {name: words})
        model = model_folder(str(work / name))
    export(work / name, out, torch.bfloat16)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    stages = ", then ".join(f"`{phases}` on {name} videos" for name, (_, phases) in STAGES.items())
    card = out / "README.md"
    write_file(card, card.read_text() + CARD.format(stages=stages, seed=SEED, digest=digest))
    return digest


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 2 and one line on stderr for what cannot be written."""
    log_printably()
    parser = argparse.ArgumentParser(
        prog="python -m tempsamp_fast.demo.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="data and runs")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{pretrain(options.work, options.out)}\n")
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
