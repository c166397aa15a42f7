"""What a step leaves out or moves to another rank changes nothing: skipped groups, idle ranks, balanced tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.batch import Completion, Prompt, VisionFeatures
from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.learning import balance as balance_module
from tempsamp_fast.learning import metrics as metrics_module
from tempsamp_fast.learning.balance import MIN_GAIN, assign_groups, balance, new_owners
from tempsamp_fast.learning.engine import in_step
from tempsamp_fast.learning.groups import RecordedRollouts
from tempsamp_fast.learning.loss import idle_loss
from tempsamp_fast.model.flops import forward_flops
from tempsamp_fast.model.packing import idle_row, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.segments import by_tree, num_tree_tokens
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan

MIXED, SAME, ENDED = ("truth", "wrong", "long"), ("wrong", "wrong", "wrong"), ("end", "end", "end")
ANSWERS = (
    (MIXED, MIXED, SAME, SAME),  # the second of two ranks has nothing to learn from: a group travels to it
    (SAME, MIXED, SAME, SAME),  # one rank stays idle
    (SAME, SAME, SAME, SAME),  # both do
    (MIXED, MIXED, ENDED, ENDED),  # the answers of the second rank end at once
)
FOUR_STEPS = ("--phases", "grpo:3,tempsamp:1", "--learning_rate", "1e-4", "--beta", "0")


def completions(run: Run, prompt: Prompt, kinds: Sequence[str]) -> list[Completion]:
    texts = {"truth": off_policy_text(prompt.sample, prompt.mode) or "", "wrong": "no", "long": "no " * 20, "end": ""}
    return [replace(run.chat.off_policy_completion(texts[kind]), is_off_policy=False) for kind in kinds]


@pytest.fixture(scope="module")
def replay(trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Words that feed a run the answers of ANSWERS, of which groups with SAME and ENDED alone have equal rewards."""
    folder = tmp_path_factory.mktemp("replay")
    run = trainer.run(folder / "run", *FOUR_STEPS, "--gradient_accumulation_steps", "4")
    record = RecordedRollouts(folder / "answers.jsonl", run.chat)
    for at, kinds in zip(plan(run.phases), ANSWERS, strict=True):
        prompts = run.prompts(at)
        record.write(at.step, prompts, [completions(run, p, k) for p, k in zip(prompts, kinds, strict=True)])
    return (*FOUR_STEPS, "--replay_rollouts", str(folder / "answers.jsonl"))


@pytest.mark.parametrize(
    "words", [(), ("--loss_type=dapo", "--updates_per_batch=2"), ("--packing=none", "--prompts_per_device=2")]
)
def test_groups_without_advantage_are_left_out_and_nothing_changes(
    stepper: Callable, replay: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """Losses, gradient norms and weights, also of a step without any group: Adam's moments still move the weights."""
    accumulation = "2" if "--prompts_per_device=2" in words else "4"
    words = (*replay, *words, "--gradient_accumulation_steps", accumulation)
    skipping = stepper(*words)
    start = skipping.weights()
    ours = skipping.steps()
    assert [metrics["batch/skipped_share"] for metrics in ours] == [0.5, 0.75, 1, 0]
    assert ours[2]["loss"] == ours[2]["optim/grad_norm"] == 0
    monkeypatch.setattr("tempsamp_fast.learning.update._has_gradient", lambda *_: True)
    complete = stepper(*words)
    theirs = complete.steps()
    for name in ("loss", "optim/grad_norm"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4, abs=1e-7), name
    assert [a["batch/num_tokens"] < b["batch/num_tokens"] for a, b in zip(ours, theirs, strict=True)] == [1, 1, 1, 0]
    assert (skipping.weights() - complete.weights()).norm() < 1e-3 * (skipping.weights() - start).norm()


def test_groups_stay_where_they_pay_the_kl_term(stepper, replay) -> None:
    """Where no group has an advantage, it is all that is left: of equal answers, beta times their mean divergence."""
    steps = stepper(*replay, "--gradient_accumulation_steps", "4", "--beta=0.04").steps()
    assert [metrics["batch/skipped_share"] for metrics in steps] == [0, 0, 0, 0]
    assert steps[2]["policy/kl"] > 0 and steps[2]["optim/grad_norm"] > 0
    assert steps[2]["loss"] == pytest.approx(0.04 * steps[2]["policy/kl"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--zero_stage=2",),
        ("--zero_stage=0", "--freeze_vision"),
        ("--zero_stage=3", "--freeze_vision"),
        ("--zero_stage=3",),
    ],
)
def test_two_ranks_share_what_is_left_and_train_as_one(trainer, replay, tmp_path: Path, words: tuple) -> None:
    """Groups travel with their videos; ranks without work or with answers of one token hold no other up."""
    frozen = [word for word in words if word == "--freeze_vision"]
    expected = trainer.main(tmp_path / "one", *replay, *frozen, "--gradient_accumulation_steps", "4")
    rows = trainer.ranks(tmp_path / "two", 2, *replay, *words, "--gradient_accumulation_steps", "2")
    for ours, theirs in zip(rows, expected, strict=True):
        for name in ("loss", "optim/grad_norm", "policy/entropy", "batch/skipped_share", "reward/on_policy_mean"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (ours["step"], name)
        assert 2 * ours["batch/num_tokens"] == theirs["batch/num_tokens"]
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def weights(run: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForImageTextToText

    folder, _ = latest_checkpoint(run)
    return dict(AutoModelForImageTextToText.from_pretrained(folder / "model").named_parameters())


@pytest.mark.parametrize("has_frozen_tower", [False, True])
def test_a_rank_with_fewer_rows_than_another_has_idle_ones_after_them(
    tiny, monkeypatch: pytest.MonkeyPatch, has_frozen_tower: bool
) -> None:
    """Which run the vision tower where the others' rows do."""
    policy = Policy(tiny.model())
    policy.base_model.model.visual.requires_grad_(not has_frozen_tower)
    monkeypatch.setattr("tempsamp_fast.learning.engine.max_over_ranks", lambda own, device: max(own, 3))
    engine: Any = SimpleNamespace(module=policy, device=torch.device("cpu"), zero_optimization_stage=lambda: 2)
    own = pack(tiny.groups()[:1], config=policy.config, max_tokens_per_row=1000)
    first, *idle = in_step(engine, own)
    assert first is own[0]
    assert [each.num_completions for each in idle] == [1, 1]
    assert [each.vision is not None for each in idle] == [has_frozen_tower] * 2


@pytest.mark.parametrize("has_features", [False, True])
def test_an_idle_row_gives_every_parameter_a_gradient_of_zero(tiny, has_features: bool) -> None:
    """Through the vision tower too, unless its features are at hand everywhere."""
    policy = Policy(tiny.model())
    row = idle_row(policy.config, has_features)
    loss, _ = policy(row, idle_loss)
    loss.backward()
    for name, parameter in policy.named_parameters():
        if "visual" in name and has_features:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and not parameter.grad.any(), name


@given(st.lists(st.lists(st.integers(1, 10_000), max_size=6), min_size=1, max_size=6))
def test_groups_move_only_to_lower_the_largest_load(num_tokens: list[list[int]]) -> None:
    owners = new_owners(num_tokens)
    before, after = [sum(counts) for counts in num_tokens], [0] * len(num_tokens)
    for counts, receivers in zip(num_tokens, owners, strict=True):
        for tokens, receiver in zip(counts, receivers, strict=True):
            after[receiver] += tokens
    if any(receiver != rank for rank, receivers in enumerate(owners) for receiver in receivers):
        assert max(after) <= (1 - MIN_GAIN) * max(before)
    else:
        assert after == before


@pytest.mark.parametrize(
    ("num_tokens", "owners"),
    [
        ([[5, 5], [5, 5]], [[0, 0], [1, 1]]),
        ([[9, 9], []], [[0, 1], []]),
        ([[8], [1, 1, 8]], [[0], [0, 1, 1]]),
        ([[100, 1], [99]], [[0, 0], [1]]),
    ],
)
def test_a_group_stays_unless_its_rank_gets_enough_relief(num_tokens: list, owners: list) -> None:
    assert new_owners(num_tokens) == owners


def test_ranks_that_share_rows_get_groups_together() -> None:
    """Two and two of four: one of the first pair's groups goes to both of the second."""
    first, second = range(0, 2), range(2, 4)
    assert balance_module._owners([[9], [9], [], []], 2) == [[first], [second], [], []]
    assert balance_module._owners([[9], [], [9], []], 2) == [[first], [], [second], []]


@given(st.lists(st.integers(1, 10_000), max_size=20), st.integers(1, 6))
def test_ranks_get_whole_groups_balanced_by_tokens(num_tokens: list[int], num_ranks: int) -> None:
    """Every group once; no rank empty while another has two; the fullest within 4/3 of what nothing can beat."""
    ranks = assign_groups(num_tokens, num_ranks)
    assert sorted(group for groups in ranks for group in groups) == list(range(len(num_tokens)))
    assert len(ranks) == num_ranks and (all(ranks) or max(map(len, ranks), default=0) <= 1)
    by_size = sorted([*num_tokens, *[0] * (num_ranks + 1)], reverse=True)
    unbeatable = max(by_size[0], sum(num_tokens) / num_ranks, by_size[num_ranks - 1] + by_size[num_ranks])
    assert max(sum(num_tokens[group] for group in groups) for groups in ranks) <= 4 / 3 * unbeatable + 1e-9


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, groups: Sequence[Sequence], config) -> list[list]:
    """What each of two ranks has after `balance`; only the first one sends."""
    told = list(map(trees_told(config), groups))
    monkeypatch.setattr(balance_module, "num_ranks", lambda: 2)

    def of_all_ranks(own: list) -> list[list]:
        assert own == told[balance_module.own_rank()]
        return told

    monkeypatch.setattr(balance_module, "of_all_ranks", of_all_ranks)
    sent: list[torch.Tensor] = []

    def all_to_all(arrived, outgoing, coming, splits) -> None:
        if not sent:
            assert coming == [0, 0] and splits[0] == 0 and sum(splits) == len(outgoing)
            return sent.append(outgoing)
        assert splits == [0, 0] and coming == [len(sent[0]), 0]
        arrived.copy_(sent[0])

    monkeypatch.setattr(balance_module.dist, "all_to_all_single", all_to_all)
    arrived = []
    for rank, own in enumerate(groups):
        monkeypatch.setattr(balance_module, "own_rank", lambda rank=rank: rank)
        arrived.append(balance(own, config, torch.device("cpu")))
    return arrived


def trees_told(config) -> Callable:
    """What a rank tells the others of its trees."""
    return lambda groups: [
        (num_tree_tokens(tree, config), balance_module._message(tree).num_bytes) for tree in by_tree(groups)
    ]


@pytest.mark.parametrize("tiny", ["qwen3_vl"], indirect=True)
def test_a_group_arrives_with_its_features_and_advantages(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three from the first of two ranks to the second, as bytes, behind texts of several lengths."""
    groups = []
    for seed in range(6):
        group = tiny.group(tiny.prompt((2, 4, 4), seed=seed), [3, 2], seed=seed)
        features = VisionFeatures(torch.full((8, 32), float(seed)), (torch.full((8, 32), -float(seed)),))
        sample = replace(group.prompt.sample, query="q" * (1 + seed))
        prompt = replace(group.prompt, sample=sample, video=replace(group.prompt.video, features=features))
        groups.append(replace(group, prompt=prompt, advantages=torch.tensor([1.0, float(seed)])))
    arrived = on_two_ranks(monkeypatch, [groups, []], tiny.model().config)
    assert [len(arrived[rank]) for rank in range(2)] == [3, 3]
    assert {group.prompt.sample.sample_id for group in [*arrived[0], *arrived[1]]} == {f"sample-{i}" for i in range(6)}
    for group in [*arrived[0], *arrived[1]]:
        seed, features = int(group.prompt.sample.sample_id.removeprefix("sample-")), group.prompt.video.features
        assert bool((features.embeds == seed).all()) and bool((features.deepstack[0] == -seed).all())
        assert group.advantages.tolist() == [1.0, seed] and group.prompt.sample.query == "q" * (1 + seed)


def test_groups_about_one_video_travel_together_and_stay_about_one(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighed by what they are as a tree."""
    config = tiny.model().config
    groups = tiny.tree_groups()
    units = [tree for of_rank in on_two_ranks(monkeypatch, [groups, []], config) for tree in by_tree(of_rank)]
    assert sorted(len(unit) for unit in units) == [1, 2, 3]
    found = []
    for unit in units:
        (row,) = pack(unit, config=config, max_tokens_per_row=10_000)
        assert len(row.layout) == 1
        found.append(row.num_tokens)
    assert sorted(found) == sorted(num_tokens for num_tokens, _ in trees_told(config)(groups))


def test_every_phase_of_a_step_is_timed(finished_run) -> None:
    """Supervised steps neither sample nor compare; the phases add up to the step."""
    common = {"data", "reward", "pack", "forward_backward", "optimizer"}
    for row in finished_run.rows:
        if row["phase"] == "eval":
            continue
        phases = {name[5:-2]: value for name, value in row.items() if name.startswith("time/")}
        step_s = phases.pop("step")
        assert phases.keys() == common if row["phase"].startswith("sft") else common | {"rollout", "reference"}
        assert step_s == pytest.approx(sum(phases.values()))
        assert row["perf/tokens_per_s"] == pytest.approx(row["batch/num_tokens"] / step_s)
        assert "perf/mfu" not in row  # the peak of a CPU is not known


def test_mfu_is_three_forwards_of_the_packed_rows_over_their_time_and_the_peak(
    stepper, replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "device_peak_flops", lambda _: 1e12)
    one = stepper(*replay, "--gradient_accumulation_steps", "4", "--updates_per_batch", "2")
    at = next(plan(one.run.phases))
    groups = one.groups(at)
    metrics = one.run.update(at, groups)
    rows = pack(groups[:2], config=one.run.policy.config, max_tokens_per_row=10**6)
    flops = 2 * sum(3 * forward_flops(row, one.run.policy.config) for row in rows)
    seconds = one.run.watch.seconds["time/forward_backward_s"]
    assert metrics["perf/mfu"] == pytest.approx(flops / seconds / 1e12, rel=1e-6)
