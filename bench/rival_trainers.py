"""TRL's GRPO and RLOO trainers on a tiny model, with its own fused head and with ours: the same steps and record."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch
from tempsamp_kernels.integrations import patch_trl
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

WORDS = ["<pad>", "<eos>", *"abcdefghijklmn"]
LOGGED = ("loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean", "reward")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in LOSS_TYPES},
    **{
        f"{loss_type}, sequence": {"loss_type": loss_type, "importance_sampling_level": "sequence"}
        for loss_type in ("grpo", "dapo", "luspo")
    },
    "no KL": {"beta": 0.0},
    "corrected KL": {"use_bias_correction_kl": True},
    "two-sided clip": {"delta": 1.1},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "top entropies": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.05},
    "rewards as they are": {"scale_rewards": "none"},
    "rewards over the batch": {"scale_rewards": "batch"},
    "truncated masked": {"mask_truncated_completions": True},
    "one iteration": {"num_iterations": 1},
    "temperature": {"temperature": 0.7},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "RLOO": {"trainer": "RLOO"},
    "RLOO, no KL": {"trainer": "RLOO", "beta": 0.0},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word to a token."""
    tokenizers = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: id_ for id_, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def run(name: str, folder: str, with_patch: bool) -> Tensor:
    """What the trainer logs at each of four steps, [4, logged values]; always the same."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    options = dict(CONFIGURATIONS[name])
    kind = options.pop("trainer", "GRPO")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    set_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(WORDS), num_key_value_heads=1, **shape, **ids)).save_pretrained(folder)
    defaults = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 6, "learning_rate": 1e-2, "beta": 0.1, "num_iterations": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    with patch_trl() if with_patch else nullcontext():
        trainer = getattr(trl, f"{kind}Trainer")(
            model=Qwen2ForCausalLM.from_pretrained(folder),
            processing_class=tokenizer(),
            reward_funcs=lambda completions, **_: [float(text.count("a") - text.count("b")) for text in completions],
            args=getattr(trl, f"{kind}Config")(**defaults | options),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a b c", "d e f g"] * 4}),
        )
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([[entry.get(key, torch.nan) for key in LOGGED] for entry in steps])


def difference(name: str, folder: str) -> str | None:
    """How far the patched trainer's record is from the other's, None where it is the same within rounding."""
    theirs, ours = (run(name, folder, with_patch) for with_patch in (False, True))
    rtol = 5e-2 if CONFIGURATIONS[name].get("bf16") else 1e-3
    if len(theirs) != 4 or not theirs.any():
        return f"{len(theirs)} steps, nothing to compare"
    if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=rtol, atol=rtol / 100, equal_nan=True):
        return None
    return f"logged values differ by up to {float((ours - theirs).abs().max()):.1e}"
