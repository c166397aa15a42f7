"""Fixtures of all tests. `tiny`: model families in miniature, with prompts and random answers.

Property tests draw the same examples every time and have no time limit: they fail by the code, not by chance or load.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from transformers import PreTrainedModel

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, Sample, VideoPatches
from tempsamp_fast.model.families import FAMILIES

gc.disable()  # until `pytest_collection_finish`

settings.register_profile(
    "steady", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "kernels", settings.get_profile("steady"), max_examples=25, phases=[Phase.explicit, Phase.generate]
)
"""For examples that run kernels: few, and a failing one is shown as found, as a smaller one takes minutes to find."""
settings.load_profile("steady")


def pytest_collection_finish() -> None:
    """What was loaded and collected stays until the end: the garbage collector need not walk through it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


SPECIAL_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
NUM_TEXT_IDS = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
INTERLEAVED = {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
HYBRID = {
    # Half of every head is rotated, and layer 1 of 3 attends.
    "head_dim": 16,
    "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
FAMILY_TEXT = {
    "qwen2_5_vl": {"rope_parameters": ROPE},
    "qwen3_vl": INTERLEAVED,
    "qwen3_vl_moe": INTERLEAVED | EXPERTS,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16},
}
FAMILY_VISION = {
    # Windows of 2 x 2 merged patches, so that most videos have windows of several sizes.
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3_vl": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_vl_moe": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_5": {"num_position_embeddings": 16},
    "qwen3_5_moe": {"num_position_embeddings": 16},
}


@dataclass(frozen=True)
class Tiny:
    """One model family in miniature; everything it makes is random and the same every time."""

    family: str

    def model(self, **text: object) -> PreTrainedModel:
        """A new model with the same weights every time; `text` overrides fields of its text configuration."""
        torch.manual_seed(0)
        record = FAMILIES[self.family]
        parts = {
            "text_config": {**TEXT, **FAMILY_TEXT[self.family], **text},
            "vision_config": {**VISION, **FAMILY_VISION[self.family]},
        }
        return record.model_class(record.config_class(**parts, tie_word_embeddings=True, **SPECIAL_IDS))

    def prompt(
        self, grid_thw: tuple[int, int, int], *, num_text: int = 4, seed: int = 0, second_per_grid: float = 1.0
    ) -> Prompt:
        """`num_text` ids, the video (since Qwen3-VL: an id before every frame as its timestamp), `num_text` ids."""
        generator = torch.Generator().manual_seed(seed)
        t, h, w = grid_thw
        text = torch.randint(0, NUM_TEXT_IDS, (2, num_text), generator=generator)
        start, pad, end = (SPECIAL_IDS[f"{name}_token_id"] for name in ("vision_start", "video", "vision_end"))
        if self.family == "qwen2_5_vl":
            video = [start, *[pad] * (t * h * w // 4), end]
        else:
            video = [id_ for frame in range(t) for id_ in (frame, start, *[pad] * (h * w // 4), end)]
        return Prompt(
            sample=Sample(f"sample-{seed}", Path("video.mp4"), "a query", float(t), ((0.0, 1.0),)),
            mode="answer",
            input_ids=torch.cat([text[0], torch.tensor(video), text[1]]),
            video=VideoPatches(
                pixel_values=torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=generator),
                grid_thw=grid_thw,
                second_per_grid=second_per_grid,
                timestamps_s=torch.arange(t, dtype=torch.float64),
            ),
        )

    def group(self, prompt: Prompt, answer_lens: Sequence[int], *, seed: int = 0) -> RolloutGroup:
        """One random answer of each length."""
        generator = torch.Generator().manual_seed(seed)
        answers = [torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator) for length in answer_lens]
        return RolloutGroup(prompt, [Completion(ids, text="") for ids in answers])

    def groups(self) -> list[RolloutGroup]:
        """Unequal lengths, one-token answers, a single answer, ragged vision windows, several time scales."""
        return [
            self.group(self.prompt((3, 6, 4), seed=1), [4, 1, 7], seed=11),
            self.group(self.prompt((2, 4, 4), seed=2, second_per_grid=0.7), [2], seed=12),
            self.group(self.prompt((5, 2, 6), seed=3, second_per_grid=2.5), [3, 3, 1, 1], seed=13),
        ]

    def about(self, prompt: Prompt, questions: Sequence[Sequence[int]]) -> list[Prompt]:
        """Prompts that begin as this one does up to the text after its video: a question of their own."""
        start, sample = prompt.input_ids[:-4], prompt.sample
        return [
            replace(
                prompt,
                input_ids=torch.cat([start, torch.tensor(question)]),
                sample=replace(sample, sample_id=f"{sample.sample_id}/{index}"),
            )
            for index, question in enumerate(questions)
        ]

    def tree_groups(self) -> list[RolloutGroup]:
        """Two videos with several questions, some of which begin alike or are one token, and between them one alone."""
        first = self.about(self.prompt((3, 6, 4), seed=1), [[7, 8, 9, 3], [7, 5], [7, 9, 9]])
        alone = self.prompt((2, 4, 4), seed=2, second_per_grid=0.7)
        last = self.about(self.prompt((5, 2, 6), seed=3, second_per_grid=2.5), [[1], [2, 3, 4, 5, 6]])
        lengths = [[4, 1, 7], [2], [3, 3], [2, 5], [1, 1], [6, 2]]
        prompts = [*first, alone, *last]
        return [self.group(prompt, lengths[i], seed=10 + i) for i, prompt in enumerate(prompts)]


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Families of each kind in turn; tests that ask for `FAMILIES` get those with experts too."""
    return Tiny(request.param)
