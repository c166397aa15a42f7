"""Low-rank adapters on the language model, through PEFT (`pip install tempsamp-fast[lora]`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempsamp_fast.config import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"
TRAINED, REFERENCE = "default", "reference"
"""Adapters: the one that learns, and its copy from before reinforcement learning, which only a KL term needs."""


def add_adapters(model: nn.Module, config: ModelConfig, seed: int) -> Any:
    """A `PeftModel` around `model`, everything frozen but fresh adapters on `config.lora_targets`, drawn from `seed`.

    Raises ValueError for a target that no linear layer of the language model is named after, the head included.
    """
    LoraConfig, get_peft_model = _peft("LoraConfig", "get_peft_model")
    targets = [target.strip() for target in config.lora_targets.split(",")]
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "language_model" in name and isinstance(module, nn.Linear)
    }
    if set(targets) - names:
        unknown = ", ".join(sorted(set(targets) - names))
        raise ValueError(f"lora_targets={config.lora_targets!r}: no {unknown}; choose from {', '.join(sorted(names))}")
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, settings, adapter_name=TRAINED, autocast_adapter_dtype=False)


def add_reference(model: Any) -> None:
    """Give the `PeftModel` a frozen adapter for `remember_reference`."""
    model.add_adapter(REFERENCE, model.peft_config[TRAINED], autocast_adapter_dtype=False)
    model.set_adapter(TRAINED)


def base_checkpoint(folder: str) -> str | None:
    """The checkpoint that the adapters in `folder` belong on; None for a folder of whole weights."""
    path = Path(folder) / ADAPTER_CONFIG
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def load_adapters(model: nn.Module, folder: str) -> Any:
    """A `PeftModel` of `model` and the adapters that a checkpoint keeps in `folder`."""
    (PeftModel,) = _peft("PeftModel")
    options = {"autocast_adapter_dtype": False, "torch_device": "cpu"}
    wrapped = PeftModel.from_pretrained(model, folder, adapter_name=TRAINED, is_trainable=True, **options)
    if (Path(folder) / REFERENCE / ADAPTER_CONFIG).is_file():
        wrapped.load_adapter(str(Path(folder) / REFERENCE), REFERENCE, **options)
        wrapped.set_adapter(TRAINED)
    return wrapped


@torch.no_grad()
def remember_reference(model: Any) -> None:
    """Make the reference adapter, if there is one, equal to the trained one as it is now; called by every rank."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            trained = model.get_parameter(name.replace(f".{REFERENCE}.", f".{TRAINED}."))
            with deepspeed.zero.GatheredParameters([parameter, trained], modifier_rank=0):
                parameter.copy_(trained)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """The model inside is the frozen reference: with the reference adapter, or else without any."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def _peft(*names: str) -> list[Any]:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora_rank and adapters need PEFT (pip install 'tempsamp-fast[lora]'): {error}") from error
    return [getattr(peft, name) for name in names]
