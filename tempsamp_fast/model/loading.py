"""Loading a video language model and its tokenizer, from a checkpoint or built from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.lora import base_checkpoint, load_adapters
from tempsamp_fast.system.files import WEIGHTS, check_files, read_json

PREPROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
FETCH = "the hub is only asked for what is typed; fetch it (hf download NAME), or type --model (train) or --base NAME"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_model(checkpoint: str, config: ModelConfig, dtype: torch.dtype) -> tuple[Any, Chat]:
    """A model and its chat format from a Hugging Face folder or hub name; a `PeftModel` from a folder of adapters.

    Weights are read from safetensors alone, unless `allow_pickle`. The hub is asked for `config.model` alone, not for
    what a folder names.
    Raises ValueError for a folder without a model, an architecture that is not supported, files that lead out of their
    folder, and weights that are missing or cannot be read.
    """
    base = base_checkpoint(checkpoint)
    weights = base or checkpoint
    for folder in filter(Path.is_dir, map(Path, (checkpoint, weights))):
        check_folder(folder, config.allow_pickle)
    with hub_for(weights, config):
        settings = check_architecture(weights, config.trust_remote_code)
        settings._attn_implementation = "sdpa"  # of all parts: they may name a kernel on the hub
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                weights,
                config=settings,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if config.allow_pickle else True,
                output_loading_info=True,
            )
            model, loading = loaded
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model={checkpoint!r}: cannot be loaded: {error}") from error
    with hub_for(checkpoint, config):
        tokenizer, preprocessor_files = _load_tokenizer(checkpoint, config), _preprocessor_files(checkpoint)
    if loading["missing_keys"]:
        raise ValueError(f"model={weights!r}: has no weights for {', '.join(sorted(loading['missing_keys']))}")
    apply_liger_layers(model, config.liger_layers)
    if base:
        model = load_adapters(model, checkpoint, config.allow_pickle)
    return model, Chat(tokenizer, model.config, preprocessor_files)


def _load_tokenizer(checkpoint: str, config: ModelConfig) -> Any:
    try:
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # what a damaged file raises is plain Exception in tokenizers
        raise ValueError(f"model={checkpoint!r}: its tokenizer cannot be used: {error}") from error


@contextmanager
def hub_for(name: str, config: ModelConfig) -> Iterator[None]:
    """Inside, the hub is reached for `name` if that is what was typed, and otherwise only its cache is read."""
    was, is_here = hub.HF_HUB_OFFLINE, Path(name).exists()
    hub.HF_HUB_OFFLINE = was or config.offline or name != config.model or is_here
    try:
        yield
    except (OSError, ValueError) as error:
        if hub.HF_HUB_OFFLINE and not is_here:
            raise ValueError(f"{error}; {FETCH}") from error
        raise
    finally:
        hub.HF_HUB_OFFLINE = was


def check_folder(folder: Path, allow_pickle: bool) -> None:
    """Raise ValueError for a checkpoint's folder whose files lead out of it, name others, or cannot be read."""
    check_files(folder)
    for index in folder.glob("*.index.json"):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        suffixes = (".safetensors",) if "safetensors" in index.name and not allow_pickle else WEIGHTS
        names = shards.values() if isinstance(shards, dict) else [shards]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in suffixes:
                raise ValueError(f"{index}: names {name!r}; expected files of {' or '.join(suffixes)} beside it")
    for path in filter(Path.is_file, (folder / "config.json", folder / "tokenizer_config.json")):
        settings = read_json(path)
        for name, value in settings.items() if isinstance(settings, dict) else ():
            is_elsewhere = str(name).endswith("_file") and isinstance(value, str) and Path(value).name != value
            if name in ("transformers_weights", "fast_tokenizer_files") or (is_elsewhere and (folder / value).exists()):
                raise ValueError(f"{path}: {name} names files to load instead, and is not obeyed; remove it")


def _preprocessor_files(checkpoint: str) -> dict[str, str]:
    """Read at once: the checkpoint that a run was resumed from is deleted when newer ones are kept."""
    found = {
        name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in PREPROCESSOR_FILES
    }
    return {name: Path(file).read_text() for name, file in found.items() if file is not None}


def check_architecture(checkpoint: str, trust_remote_code: bool = False) -> Any:
    """A checkpoint's configuration. Raises ValueError, naming it and the families, unless it can be trained here."""
    folder = Path(checkpoint)
    looks_local = folder.is_absolute() or checkpoint.startswith(".") or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"model={checkpoint!r}: no config.json in this folder")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration of anything makes transformers raise nearly every kind
        raise ValueError(f"model={checkpoint!r}: cannot be read as a checkpoint: {error}") from error
    try:
        family_of(config)
    except ValueError as error:
        raise ValueError(f"model={checkpoint!r}: {error}") from None
    return config
