"""How often the vision tower runs, and that features at hand change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempsamp_fast.batch import Prompt
from tempsamp_fast.data.crop import crop
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.learning.vision_features import tower_fingerprint, with_vision_features
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.segments import by_tree
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan

FROZEN = ("--phases", "sft:1,tempsamp:2", "--gradient_accumulation_steps", "6", "--freeze_vision", "--beta", "0.04")


@pytest.fixture
def patches_seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module], list[int]]:
    """`patches_seen(model)`: the number of patches of every further pass through its tower."""

    def watch(model: torch.nn.Module) -> list[int]:
        seen: list[int] = []
        model.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return seen

    return watch


def test_a_frozen_tower_sees_each_video_once_per_step_and_the_training_is_the_same(
    stepper, patches_seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, reference and update share the features, and so do all queries about a video."""
    once = stepper(*FROZEN)
    start, seen = once.weights(), patches_seen(once.run.policy.base_model)
    ours, seen_by_reference = [], None
    for at in plan(once.run.phases):
        prompts = once.run.prompts(at)
        videos = {prompt.sample.video: len(prompt.video.pixel_values) for prompt in prompts}
        ours.append(once.run.update(at, once.groups(at)))
        assert sorted(seen) == sorted(videos.values())
        seen.clear()
        if once.run.reference and seen_by_reference is None:
            seen_by_reference = patches_seen(once.run.reference.base_model)
    assert seen_by_reference == []
    monkeypatch.setattr(Run, "with_features", lambda _, prompts: prompts)
    often = stepper(*FROZEN)
    seen = patches_seen(often.run.policy.base_model)
    theirs = often.steps()
    assert len(seen) > 3 * 6
    for name in ("loss", "optim/grad_norm", "policy/entropy"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4, abs=1e-7), name
    assert (once.weights() - often.weights()).norm() < 1e-3 * (once.weights() - start).norm()


def test_a_trained_tower_sees_each_group_once_per_pass(stepper, patches_seen) -> None:
    """Not once per answer; once to sample, for neighbours about one video together, and once to update each row."""
    one = stepper("--phases", "grpo:1", "--gradient_accumulation_steps", "6")
    at = next(plan(one.run.phases))
    seen = patches_seen(one.run.policy.base_model)
    groups = one.groups(at)
    videos = [len(group.prompt.video.pixel_values) for group in groups]
    assert len({group.prompt.sample.video for group in groups}) < len(groups)
    assert sum(seen) == sum(len(tree[0].prompt.video.pixel_values) for tree in by_tree(groups))
    seen.clear()
    one.run.update(at, [replace(group, advantages=torch.tensor([1.0, 0.0, -1.0])) for group in groups])
    assert sum(seen) == sum(videos)


@pytest.mark.parametrize("memory_gib", [pytest.param("1", marks=pytest.mark.slow), "0"])
def test_kept_features_spare_later_epochs_decoding_and_encoding(
    stepper, patches_seen, decoded: list[Path], memory_gib: str
) -> None:
    words = (*FROZEN, "--random_crop", "0.5", "--video_cache_gib", memory_gib)
    plain, caching = stepper(*words), stepper(*words, "--cache_features")
    samples = caching.run.train_samples
    caching.run.with_features(caching.run.loader.prompts(samples, ["answer"] * len(samples)))
    seen = patches_seen(caching.run.policy.base_model)
    decoded.clear()
    ours = caching.steps()
    assert (not seen and not decoded) == (memory_gib == "1")
    assert bool(caching.run.loader._videos) == (memory_gib == "1")
    theirs = plain.steps()
    for name in ("loss", "optim/grad_norm", "batch/num_tokens"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4, abs=1e-7), name


def test_features_on_disk_are_those_of_one_tower(stepper, decoded: list[Path], tmp_path: Path) -> None:
    run = stepper(*FROZEN, "--cache_features", "--patch_cache", str(tmp_path)).run
    ask = lambda source: source.prompts(run.train_samples[:1], ["answer"])
    (fresh,) = run.with_features(ask(run.loader))
    ask(run.loader)  # takes the features in
    decoded.clear()
    again = lambda tower: PromptLoader(run.chat, run.loader.geometry, run.config.data, tower=tower)
    (stored,) = ask(again(tower_fingerprint(run.policy.base_model)))
    assert torch.equal(stored.video.features.embeds, fresh.video.features.embeds)
    assert torch.equal(stored.input_ids, fresh.input_ids)
    with torch.no_grad():
        next(run.policy.base_model.model.visual.parameters()).add_(1)
    (other,) = ask(again(tower_fingerprint(run.policy.base_model)))
    assert other.video.features is None and len(other.video.pixel_values)
    assert not decoded  # its pixels were stored too


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_towers_with_other_windows_have_other_fingerprints(tiny) -> None:
    """Though their weights are alike."""
    model = tiny.model()
    first = tower_fingerprint(model)
    assert tower_fingerprint(tiny.model()) == first
    model.config.vision_config.window_size *= 2
    assert tower_fingerprint(model) != first


def test_features_of_a_trained_tower_cannot_be_cached(trainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_features=True.*freeze_vision"):
        trainer.run(tmp_path / "run", "--phases", "sft:1", "--cache_features")


def test_a_stretch_of_the_features_is_the_features_of_the_stretch(tiny) -> None:
    """No temporal patch sees another one in the tower."""
    model = tiny.model()
    model.model.visual.requires_grad_(False)
    policy = Policy(model)
    whole = tiny.prompt((6, 4, 4))
    sample = replace(whole.sample, duration_s=6.0, windows=((2.0, 3.0),))

    def encoded(prompt: Prompt) -> Prompt:
        return with_vision_features(policy, [prompt])[0]

    stretches = set()
    for seed in range(4):
        stretch = lambda video, seed=seed: crop([sample], video, torch.Generator().manual_seed(seed))[1]
        ours = stretch(encoded(whole).video)
        theirs = encoded(replace(whole, video=stretch(whole.video))).video
        assert ours.grid_thw == theirs.grid_thw and not ours.is_whole
        stretches.add(ours.grid_thw)
        for one, other in zip(
            (ours.features.embeds, *ours.features.deepstack),
            (theirs.features.embeds, *theirs.features.deepstack),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    assert len(stretches) > 1


def test_encoding_leaves_no_pixels_behind(tiny) -> None:
    model = tiny.model()
    model.model.visual.requires_grad_(False)
    (prompt,) = with_vision_features(Policy(model), [tiny.prompt((2, 4, 4))])
    assert prompt.video.pixel_values.untyped_storage().nbytes() == 0
    (row,) = pack([tiny.group(prompt, [2])], config=model.config, max_tokens_per_row=100)
    assert row.vision is not None and not row.vision.embeds.requires_grad
