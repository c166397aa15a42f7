"""Runs of families with linear layers and experts: what is sampled, learned, adapted and saved is one model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.model.loading import load_model
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.video import Geometry, normalise_rows

FAMILIES = pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"])
TINY = ("--model", "tiny", "--learning_rate", "1e-3")


@FAMILIES
def test_a_saved_checkpoint_answers_the_same_without_this_package(stepper, tmp_path: Path, family: str) -> None:
    """Plain `from_pretrained` and a forward over prompt and answer: greedy tokens are its best ones, and the log-probs
    of sampler and trainer are its own.
    """
    one = stepper("--phases", "sft:1,grpo:2", "--beta", "0.04", "--tiny_family", family, *TINY)
    rows = one.steps()
    assert 0 < rows[1]["rollout/logp_gap"] < 1e-5
    one.run.policy.base_model.save_pretrained(tmp_path / "saved")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    (prompt, *_) = one.run.prompts(list(plan(one.run.phases))[-1])
    ((answer,),) = one.run.greedy([prompt], [1])
    ((sampled,),) = one.run.sample([prompt], 1, 1.0)
    for ids, logps in ((answer.ids, None), (sampled.ids, sampled.sampled_logps)):
        with torch.no_grad():
            logits = plain_logits(model, prompt, ids, one.run.loader.geometry)
        if logps is None:
            logits[:, one.run.chat.banned_token_ids] = float("-inf")
            assert torch.equal(logits.argmax(-1), ids)
        else:
            expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)


def plain_logits(model, prompt, ids: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[len(ids), vocab_size]: what predicts them."""
    video, length = prompt.video, len(ids)
    positions, start = mrope_positions(prompt.input_ids, [video.grid_thw], [video.second_per_grid], model.config)
    own = torch.arange(start, start + length).expand(3, -1)
    return model(
        input_ids=torch.cat([prompt.input_ids, ids])[None],
        position_ids=torch.cat([positions, own], dim=1)[:, None],
        pixel_values_videos=normalise_rows(video.pixel_values, geometry),
        video_grid_thw=torch.tensor([video.grid_thw]),
        use_cache=False,
    ).logits[0, -length - 1 : -1]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_checkpoints_come_in_shards_with_layers_that_are_not_used(tmp_path: Path, family: str) -> None:
    """As the published ones do: theirs predict several tokens at once."""
    folder = build_tiny_checkpoint(tmp_path / "made", ["When? <answer> 1.00 to 2.00 </answer>"] * 2, family)
    expected, _ = load_model(str(folder), ModelConfig(), torch.float32)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    extra = {"mtp.fc.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}
    shards = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": extra}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model, _ = load_model(str(folder), ModelConfig(), torch.float32)
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize(
    "family", ["qwen3_5", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3_5_moe", "qwen3_vl_moe"))]
)
def test_linear_and_attention_projections_take_adapters(stepper, family: str) -> None:
    targets = "q_proj,o_proj" + ",in_proj_qkv,in_proj_z,out_proj" * family.startswith("qwen3_5")
    one = stepper("--phases", "sft:2", "--tiny_family", family, *TINY, "--lora_rank", "2", "--lora_targets", targets)
    before = {name: tensor.detach().clone() for name, tensor in one.run.policy.named_parameters()}
    one.steps()
    changed = {n for n, tensor in one.run.policy.named_parameters() if not torch.equal(tensor, before[n])}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in changed} == set(targets.split(","))
    assert all(".lora_" in name for name in changed)
