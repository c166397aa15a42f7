"""Peak memory of the update at G = 8, packed against unpacked, each in a process of its own.

    pytest bench/bench_step_memory.py

The unpacked side is as careful as ours: only answer positions reach its head. `extra_info` holds the ratio of the peaks
of resident memory, less what was resident before the step, and its goal.
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, Sample, VideoPatches
from tempsamp_fast.packing import pack
from tempsamp_fast.policy import Policy

MODEL = Path(__file__).with_name("step_model.json")
NUM_GENERATIONS, COMPLETION_LEN, GRID = 8, 32, (6, 36, 36)


def make_group(config: Qwen2_5_VLConfig) -> RolloutGroup:
    """A prompt of 2110 tokens, 1944 of them video."""
    num_patches = GRID[0] * GRID[1] * GRID[2]
    video = VideoPatches(torch.randn(num_patches, 1176), GRID, 1.0, torch.arange(GRID[0]).double())
    ids = torch.cat([torch.full((num_patches // 4,), config.video_token_id), torch.randint(1, 2000, (166,))])
    prompt = Prompt(Sample("sample", Path("video.mp4"), "a query", 30.0, ((0.0, 1.0),)), "answer", ids, video)
    answers = torch.randint(1, 2000, (NUM_GENERATIONS, COMPLETION_LEN))
    return RolloutGroup(prompt, [Completion(answer, text="") for answer in answers])


def peak_of_update(mode: str) -> float:
    """GiB of resident memory that one forward and backward pass adds at its worst moment."""
    torch.manual_seed(0)
    policy = Policy(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_json_file(MODEL)))
    (row,) = pack([make_group(policy.config)], config=policy.config, max_tokens_per_row=10**9, mode=mode)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return -(hidden @ weight.T).log_softmax(-1).gather(-1, row.token_ids[:, None]).mean()

    before = resident_gib("VmRSS")
    policy(row, loss).backward()
    return resident_gib("VmHWM") - before


def resident_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def test_peak_memory_of_the_update(benchmark):
    peaks: dict[str, float] = {}

    def measure() -> None:
        for mode in ("shared_prefix", "none"):
            command = [sys.executable, __file__, mode]
            peaks[mode] = float(subprocess.run(command, check=True, capture_output=True).stdout)

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(ratio=peaks["shared_prefix"] / peaks["none"], goal=0.35, peak_gib=peaks)


if __name__ == "__main__":
    sys.stdout.write(str(peak_of_update(sys.argv[1])))
