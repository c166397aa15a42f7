"""Low-rank adapters on the language model, through PEFT (`pip install tempsamp-fast[lora]`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.system.files import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED, REFERENCE = "default", "reference"
"""Adapters: the one that learns, and its copy from before reinforcement learning, which only a KL term needs."""
OWN_TARGETS = r"\.\*language_model\\\.\.\*\\\.\([\w|]+\)"
"""The form of `target_modules` that `add_adapters` writes."""
TAKEN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save")
IGNORED = ("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
           "inference_mode", "init_lora_weights", "task_type", "revision", "auto_mapping", "peft_version")  # fmt: skip
"""Settings of adapters that are taken from their folder, and those that say nothing once their weights are there."""


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


def with_adapters(model: Any, checkpoint: str, config: ModelConfig, seed: int) -> tuple[Any, bool]:
    """The model with what `config.lora_rank` asks for, and whether its adapters were found in `checkpoint`.

    Raises ValueError where those have another rank.
    """
    rank, found = config.lora_rank, base_checkpoint(checkpoint) is not None
    has = model.peft_config[TRAINED].r if found else rank
    if has != rank:
        raise ValueError(f"lora_rank={rank}: the adapters in {checkpoint} have rank {has}; ask for that")
    return (add_adapters(model, config, seed) if rank and not found else model), found


def add_reference(model: Any) -> None:
    """Give the `PeftModel` a frozen adapter for `remember_reference`."""
    model.add_adapter(REFERENCE, model.peft_config[TRAINED], autocast_adapter_dtype=False)
    model.set_adapter(TRAINED)


def base_checkpoint(folder: str) -> str | None:
    """The checkpoint that the adapters in `folder` belong on; None for a folder of whole weights.

    Raises ValueError naming an adapter_config.json that cannot be read or names no checkpoint.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    settings = read_json(path)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}; expected a checkpoint folder or hub name")
    return base


def load_adapters(model: nn.Module, folder: str, allow_pickle: bool) -> Any:
    """A `PeftModel` of `model` and the adapters that a checkpoint keeps in `folder`.

    Their weights are read from safetensors alone, unless `allow_pickle`.
    Raises ValueError naming the folder whose adapters are missing or cannot be read.
    """
    PeftConfig, PeftModel = _peft("PeftConfig", "PeftModel")
    reference = Path(folder) / REFERENCE
    folders = {TRAINED: Path(folder)} | ({REFERENCE: reference} if (reference / ADAPTER_CONFIG).is_file() else {})
    wrapped: Any = None
    for name, saved in folders.items():
        if not allow_pickle and not (saved / ADAPTER_WEIGHTS).is_file():
            raise ValueError(f"model={str(saved)!r}: has no {ADAPTER_WEIGHTS}; only --allow_pickle loads other files")
        try:
            if wrapped is None:
                config = PeftConfig.from_pretrained(str(saved)) if allow_pickle else _settings_of(saved)
                wrapped = PeftModel(model, config, name, autocast_adapter_dtype=False)
            options = {"is_trainable": name == TRAINED, "autocast_adapter_dtype": False, "torch_device": "cpu"}
            missing = wrapped.load_adapter(str(saved), name, **options).missing_keys
        except Exception as error:  # damaged files make PEFT raise nearly every kind
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model={str(saved)!r}: its adapters cannot be loaded: {reason}") from error
        if missing:
            raise ValueError(f"model={str(saved)!r}: has no weights for {len(missing)} adapters, such as {missing[0]}")
    wrapped.set_adapter(TRAINED)
    return wrapped


def _settings_of(folder: Path) -> Any:
    """The `LoraConfig` of saved adapters: numbers from their settings, places from the names of their weights.

    PEFT would import a module that settings name, and match what regular expressions they hold.
    Raises ValueError for settings that say more.
    """
    (LoraConfig,) = _peft("LoraConfig")
    settings, default = read_json(folder / ADAPTER_CONFIG), LoraConfig().to_dict()
    more = [name for name, value in settings.items() if value and value != default.get(name, 0)]
    more = [name for name in more if name not in (*TAKEN, *IGNORED)]
    if more:
        raise ValueError(f"{ADAPTER_CONFIG} sets {', '.join(more)}, which is not supported")
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as weights:
        names = list(weights.keys())
        ranks = {weights.get_slice(name).get_shape()[0] for name in names if ".lora_A." in name}
    if any(rank != settings.get("r") for rank in ranks):
        raise ValueError(f"{ADAPTER_CONFIG} has r={settings.get('r')!r}, its weights {sorted(ranks)}")
    targets = settings.get("target_modules")
    if not isinstance(targets, str) or not re.fullmatch(OWN_TARGETS, targets):
        places = [name.partition(".lora_") for name in names]
        targets = sorted({name.removeprefix("base_model.model.") for name, adapter, _ in places if adapter})
    taken = {name: settings[name] for name in TAKEN if name in settings}
    base = settings["base_model_name_or_path"]
    return LoraConfig(**taken, target_modules=targets, base_model_name_or_path=base)


@torch.no_grad()
def remember_reference(model: Any) -> None:
    """Make the reference adapter, if there is one, equal to the trained one as it is now; called by every rank."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            trained = model.get_parameter(name.replace(f".{REFERENCE}.", f".{TRAINED}."))
            with deepspeed.zero.GatheredParameters([parameter, trained], modifier_rank=0):
                parameter.copy_(trained)


@torch.no_grad()
def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the trained adapters make of a model's parameters, by the names in its checkpoint.

    model: without the wrapper of PEFT. One adapted layer at a time is merged, copied, and put back to the bit.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        value = parameter.detach()
        if name.endswith(".base_layer.weight"):
            layer: Any = model.get_submodule(name.removesuffix(".base_layer.weight"))
            before = value.clone()
            layer.merge(adapter_names=[TRAINED])
            value = parameter.detach().clone()
            layer.unmerge()
            parameter.copy_(before)
        yield name.replace(".base_layer.", "."), value


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
