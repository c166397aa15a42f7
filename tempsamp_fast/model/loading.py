"""Loading a video language model and its tokenizer, from a checkpoint or built from scratch."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig
from transformers.integrations import deepspeed as integration
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.families import family_of, why_refused
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.lora import ADAPTER_CONFIG, base_checkpoint, load_adapters
from tempsamp_fast.system.files import WEIGHTS, check_files, read_json

logger = logging.getLogger(__name__)
HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
HUB_TIMEOUT_S = 4.0
MOST_LAYERS = 4096
"""Of a checkpoint: each takes time to build, whatever it weighs."""
PREPROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
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
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers draws it into files too
    with hub_for(checkpoint, config):
        checkpoint = found_checkpoint(checkpoint)
    weights = base = base_checkpoint(checkpoint)
    if base:
        with hub_for(base, config):
            weights = found_checkpoint(base)
    weights = weights or checkpoint
    for folder in filter(Path.is_dir, map(Path, (checkpoint, weights))):
        check_folder(folder, config.allow_pickle)
    with hub_for(weights, config):
        settings = check_architecture(weights, config.trust_remote_code)
        settings._attn_implementation = "sdpa"  # of all parts: they may name a kernel on the hub
        _check_size(settings, weights)
        family = family_of(settings)
        if family.wide_parameters:
            family.model_class._keep_in_fp32_modules_strict = set(family.wide_parameters)
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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # settings and weights of anything make transformers raise every kind
            raise ValueError(f"model={checkpoint!r}: cannot be loaded: {_reason(error)}") from error
    with hub_for(checkpoint, config):
        tokenizer, preprocessor_files = _load_tokenizer(checkpoint, config), _preprocessor_files(checkpoint)
    if loading["missing_keys"]:
        raise ValueError(f"model={weights!r}: has no weights for {', '.join(sorted(loading['missing_keys']))}")
    eos = getattr(model.generation_config, "eos_token_id", None)
    apply_liger_layers(model, config.liger_layers)
    if base:
        model = load_adapters(model, checkpoint, config.allow_pickle)
    return model, Chat(tokenizer, model.config, preprocessor_files, eos)


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """Under ZeRO stage 3 too, models made inside are whole: without weights there is nothing to partition."""
    partitioning = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = partitioning


def _check_size(settings: Any, weights: str) -> None:
    """Raise ValueError for a configuration of more layers or weights than the folder's files can hold."""
    folder = Path(weights)
    if not folder.is_dir():
        return
    layers = settings.text_config.num_hidden_layers + settings.vision_config.depth
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        return  # refused where it is loaded, or pickles that were asked for
    build: Any = family_of(settings).model_class
    try:
        with torch.device("meta"), _unpartitioned():
            described = sum(each.numel() for each in build(settings).parameters()) if layers <= MOST_LAYERS else None
    except Exception as error:  # as where it is loaded
        raise ValueError(f"model={weights!r}: config.json describes no model: {_reason(error)}") from error
    if described is None or described > held:
        what = f"{layers} layers" if described is None else f"{described} weights"
        raise ValueError(f"model={weights!r}: config.json describes {what}, and its files hold {held} bytes of weights")


def _load_tokenizer(checkpoint: str, config: ModelConfig) -> Any:
    try:
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # what a damaged file raises is plain Exception in tokenizers
        raise ValueError(f"model={checkpoint!r}: its tokenizer cannot be used: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a library says that may quote a whole file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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


def found_checkpoint(name: str) -> str:
    """A folder, or a hub name that can be asked for now; where the hub cannot be reached, the copy in its cache.

    Raises ValueError for a path that is no folder with a config.json, and within `HUB_TIMEOUT_S` for a hub name that is
    neither to be reached nor cached.
    """
    folder = Path(os.path.expanduser(name))
    beside = folder.parent != Path() and (folder.parent.exists() or folder.parent == Path("runs"))
    is_path = beside or not re.fullmatch(HUB_NAME, name, re.ASCII)
    if folder.exists() or is_path:
        if not folder.is_dir():
            raise ValueError(f"model={name!r}: no such folder")
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise ValueError(f"model={name!r}: no config.json in this folder")
        return str(folder)
    unreachable = _why_unreachable(name)
    if not unreachable:
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        logger.warning("model=%r: %s; taking the copy in %s", name, unreachable, Path(cached).parent)
        return str(Path(cached).parent)
    raise ValueError(f"model={name!r}: no such folder, nor a copy in the hub's cache, and {unreachable}")


def _why_unreachable(name: str) -> str:
    """Empty where the hub answers at once, whatever it says. Names are looked up without a time limit: in a thread."""
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = f"{hub.ENDPOINT}/api/models/{name}"
    reasons = [f"{hub.ENDPOINT} did not answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S).close()
            reasons.append("")
        except urllib.error.HTTPError as error:
            reasons.append("" if error.code < 500 else f"{hub.ENDPOINT} cannot be used: {error}")
        except (OSError, ValueError) as error:
            reasons.append(f"{hub.ENDPOINT} cannot be reached: {error}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return reasons[-1]


def check_architecture(checkpoint: str, trust_remote_code: bool = False) -> Any:
    """A checkpoint's configuration. Raises ValueError, naming it and the families, unless it can be trained here.

    Of other types that is told by their name alone, whether this release of transformers knows them or not.
    """
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model={checkpoint!r}: no config.json in this folder")
    try:
        refused = why_refused(PretrainedConfig.get_config_dict(checkpoint)[0])
        config: Any = refused or AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration of anything makes transformers raise nearly every kind
        raise ValueError(f"model={checkpoint!r}: cannot be read as a checkpoint: {_reason(error)}") from error
    if refused:
        raise ValueError(f"model={checkpoint!r}: {refused}")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model={checkpoint!r}: its weights are quantised (quantization_config); take the unquantised")
    return config
