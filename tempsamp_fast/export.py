"""Write a trained model for others to load: `python -m tempsamp_fast.export RUN_OR_MODEL OUT [--dtype bfloat16]`.

Adapters are merged into their base, weights are rounded to 16 bits; plain `from_pretrained` loads the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tempsamp_fast.system.device import prepare_environment

prepare_environment()

from tempsamp_fast.arguments import FIELDS  # noqa: E402
from tempsamp_fast.config import ModelConfig  # noqa: E402
from tempsamp_fast.data.prompt_file import SAVED  # noqa: E402
from tempsamp_fast.model.loading import DTYPES, load_model  # noqa: E402
from tempsamp_fast.model.lora import base_checkpoint  # noqa: E402
from tempsamp_fast.model.processor_files import processor_files  # noqa: E402
from tempsamp_fast.report.model_card import model_card  # noqa: E402
from tempsamp_fast.run.checkpoint import VIDEO_SETTINGS, model_folder  # noqa: E402
from tempsamp_fast.system.files import (  # noqa: E402
    escaped,
    log_printably,
    one_line,
    os_errors_of_safetensors,
    write_file,
)


def export(source: Path, out: Path, dtype: torch.dtype, base: str | None = None) -> None:
    """Write the model of a run's newest checkpoint, or of a checkpoint, into the new folder `out`.

    base: the hub name to fetch where the model is adapters on it; otherwise the hub's cache must have it.
    Files that others may read: weights, tokenizer, settings of processors (made from the family's where the checkpoint
    has none), how frames were taken, own prompts, and a card with settings, data and scores.
    Raises ValueError for a source without a model, weights that are not finite, and an `out` that holds anything.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already")
    folder = Path(model_folder(str(source)))
    has_adapters = base_checkpoint(str(folder)) is not None
    model, chat = load_model(
        str(folder), ModelConfig(model=base or str(folder)), torch.float32 if has_adapters else dtype
    )
    if has_adapters:
        model = model.merge_and_unload().to(dtype)
    for name, weights in model.state_dict().items():
        if not weights.isfinite().all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity (in {dtype}): nothing was written")
    defaults = {name: field.default for name, field in FIELDS.items()}
    out.mkdir(parents=True, exist_ok=True)
    try:
        with os_errors_of_safetensors():
            model.save_pretrained(out)
        chat.tokenizer.save_pretrained(out)
        for name, text in (chat.preprocessor_files or processor_files(model.config)).items():
            write_file(out / name, text)
        for name in filter(lambda each: (folder / each).is_file(), (VIDEO_SETTINGS, SAVED)):
            shutil.copy(folder / name, out)
        write_file(out / "README.md", model_card(out.resolve().name, folder, defaults))
        for path in out.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    except BaseException:
        shutil.rmtree(out)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 on bad input."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.export", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_MODEL")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", help="hub name of the model that adapters belong on, where the hub's cache lacks it")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        export(options.source, options.out, DTYPES[options.dtype], options.base)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    print(f"written: {escaped(str(options.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
