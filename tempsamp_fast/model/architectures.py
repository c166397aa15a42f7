"""What a checkpoint is made of, without its weights: its configuration and its parameters counted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.config.setting import did_you_mean
from tempsamp_fast.embedded.model import tiny_config
from tempsamp_fast.model.families import FAMILIES, family_named
from tempsamp_fast.model.loading import check_folder, found_checkpoint, hub_for


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a model."""

    total: int
    vision: int
    head: int
    """Of the output embedding."""
    adapters: int
    """Of LoRA adapters, on top of the total; 0 without."""

    def trained(self, model: ModelConfig) -> int:
        """What the optimizer sees."""
        if model.lora_rank:
            return self.adapters
        return self.total - (self.vision if model.freeze_vision else 0)


def model_config(model: ModelConfig) -> Any:
    """The transformers configuration of a folder, a hub name, or the embedded model; no weights are read.

    Hub names known here are not looked up. Raises ValueError for a model that is found nowhere.
    """
    if model.model == "tiny":
        family_named(model.tiny_family, "tiny_family")
        return tiny_config(1024, lambda token: 0, model.tiny_family)
    name = model.model.rpartition("/")[2]
    family = next((each for each in FAMILIES.values() if name in each.published), None)
    if family and not Path(model.model).exists():
        return family.published_config(name)
    if (folder := Path(os.path.expanduser(model.model))).is_dir():
        check_folder(folder, model.allow_pickle)
    try:
        with hub_for(model.model, model):
            found = found_checkpoint(model.model)
            return AutoConfig.from_pretrained(found, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        known = [name for each in FAMILIES.values() for name in each.published]
        raise ValueError(
            f"model={model.model!r}: no such folder, nor a copy in the hub's cache: its config.json is not here; known "
            f"without it are {', '.join(known)}{did_you_mean(name, known)}"
        ) from error


def count_parameters(config: Any, model: ModelConfig) -> Parameters:
    """Counted on a model without storage; tied weights once."""
    return _count(config.to_json_string(), model.lora_rank, model.lora_targets)


@lru_cache(maxsize=8)
def _count(config_json: str, lora_rank: int, lora_targets: str) -> Parameters:
    config = AutoConfig.for_model(**json.loads(config_json))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        built: Any = AutoModelForImageTextToText.from_config(config)
    targets = tuple(target.strip() for target in lora_targets.split(","))
    adapters = sum(
        lora_rank * (module.in_features + module.out_features)
        for name, module in built.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(targets)
    )
    return Parameters(
        total=sum(parameter.numel() for parameter in built.parameters()),
        vision=sum(parameter.numel() for parameter in built.model.visual.parameters()),
        head=built.lm_head.weight.numel(),
        adapters=adapters,
    )
