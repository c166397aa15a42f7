"""Peak memory of one update at G = 8: `python -m bench.step_memory MODEL.json shared_prefix|none` prints GiB.

Also unpacked, only answer positions reach the head.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.memory import resident_gib
from bench.step_contenders import UNLIMITED, make_prompt, random_group
from tempsamp_fast.model.packing import PackingMode, pack
from tempsamp_fast.model.policy import Policy


def peak_of_update(model_config: str, mode: PackingMode) -> float:
    """GiB of resident memory that one forward and backward pass adds at its worst moment; 1944 tokens are video."""
    torch.manual_seed(0)
    policy = Policy(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_json_file(model_config)))
    group = random_group(make_prompt(2110, (6, 36, 36)), completion_len=32, num_generations=8)
    (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED, mode=mode)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return -(hidden @ weight.T).log_softmax(-1).gather(-1, row.token_ids[:, None]).mean()

    before = resident_gib("VmRSS")
    policy(row, loss).backward()
    return resident_gib("VmHWM") - before


if __name__ == "__main__":
    sys.stdout.write(str(peak_of_update(sys.argv[1], sys.argv[2])))  # type: ignore[arg-type]
