"""What a rank of `test_ranks.py` checks: rollouts and an update under ZeRO against a model that is not partitioned."""

from __future__ import annotations

import os

import deepspeed
import torch
import torch.distributed as dist

from bench.traffic import Traffic
from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.learning.balance import balance_prompts
from tempsamp_fast.learning.engine import in_step, optimizer_step
from tempsamp_fast.learning.loss import idle_loss
from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.segments import by_tree, num_tree_tokens
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.system.ranks import of_all_ranks
from tempsamp_fast.system.stopwatch import Stopwatch
from tests.conftest import Tiny


def build_engine(tiny: Tiny, zero_stage: int, has_frozen_tower: bool = False):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    policy = Policy(tiny.model())
    policy.base_model.model.visual.requires_grad_(not has_frozen_tower)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=policy, model_parameters=trainable, config=config)[0]


def check_rollouts(tiny: Tiny, engine, rank: int) -> None:
    """Rank 0 has three prompts; rank 1 has one, whose answers all end at once. ZeRO-3 gathers every weight once."""
    prompts = [group.prompt for group in tiny.groups()][: 3 - 2 * rank]
    ends = list(range(20, 40)) if rank == 0 else list(range(60))
    params = SamplingParams(max_completion_length=4)
    expected = generate(Policy(tiny.model()), prompts, 4, params, seed=(1,), eos_token_ids=ends, max_tokens_per_row=50)
    flat = lambda groups: [answer.ids.tolist() for group in groups for answer in group]
    is_partitioned = engine.zero_optimization_stage() == 3
    num_bytes = sum(4 * getattr(each, "ds_numel", 0) for each in engine.module.parameters())
    for gathers_once in (True, False):
        backend = PolicyBackend(engine, ends, (), max_tokens_per_row=50, gathers_once=gathers_once)
        with Traffic() as seen:
            answers = backend.generate(prompts, 4, params, seed=(1,))
        assert flat(answers) == flat(expected)
        if is_partitioned and gathers_once:
            assert set(seen.calls) == {"all_gather"}
            assert num_bytes <= seen.bytes["all_gather"] < 1.01 * num_bytes  # each weight is padded to even parts
            assert not any(each.numel() for each in engine.module.parameters())
        elif is_partitioned:
            assert seen.bytes["all_gather"] > 3 * num_bytes and seen.calls["all_reduce"]
        else:
            assert not seen.calls
    assert rank == 0 or max(map(len, flat(answers))) == 1


def check_update(tiny: Tiny, engine, rank: int) -> None:
    """Uneven rows: rank 0 has three, two of which run in stages, rank 1 has one; the loss falls on both."""
    own_rows = pack(tiny.groups()[: 3 - 2 * rank], config=engine.module.config, max_tokens_per_row=50 if rank else 30)
    assert [len(row.stages) for row in own_rows] == [[2, 0, 2], [0]][rank]
    rows = in_step(engine, own_rows)

    def head_of(row):
        def head(hidden, weight):
            logps = (hidden @ weight.T).log_softmax(-1).gather(-1, row.token_ids[:, None])
            return -logps.mean(), float(-logps.mean())

        return head

    heads = [*map(head_of, own_rows), *[idle_loss] * (len(rows) - len(own_rows))]
    losses = [sum(optimizer_step(engine, rows, heads, 1e-3, Stopwatch())[0][: len(own_rows)]) for _ in range(3)]
    assert losses[-1] < losses[0], losses


def check_rollouts_follow_updates(tiny: Tiny, engine) -> None:
    """Gathered weights are those of now: both ways draw the same, and not what the first weights drew."""
    (prompt, *_), params = [group.prompt for group in tiny.groups()], SamplingParams(max_completion_length=6)
    drawn = [
        PolicyBackend(engine, [], (), 50, gathers_once=gathers_once).generate([prompt], 4, params, seed=(1,))
        for gathers_once in (True, False)
    ]
    before = generate(Policy(tiny.model()), [prompt], 4, params, seed=(1,), eos_token_ids=[], max_tokens_per_row=50)
    once, layered, first = (torch.stack([each.logps for each in answers]) for ((*answers,),) in (*drawn, before))
    torch.testing.assert_close(once, layered)
    assert not torch.allclose(once, first, atol=1e-3)


def check_balance(tiny: Tiny, rank: int) -> None:
    """Rank 0 has three prompts, rank 1 a short one: trees travel in one exchange, bit for bit, and none by a pair."""
    config = tiny.model().config
    prompts = [group.prompt for group in tiny.tree_groups()] if rank == 0 else [tiny.prompt((1, 4, 4), seed=9)]
    every = [prompt for of_rank in of_all_ranks(prompts) for prompt in of_rank]
    with Traffic() as seen:
        mine = balance_prompts(prompts, config, torch.device("cpu"))
    assert set(seen.calls) == {"all_gather", "all_to_all"} and seen.calls["all_to_all"] == 1
    by_id = {prompt.sample.sample_id: prompt for prompt in every}
    found = of_all_ranks([prompt.sample.sample_id for prompt in mine])
    assert sorted(each for of_rank in found for each in of_rank) == sorted(by_id) and len(found[1]) > 1
    for prompt in mine:
        assert torch.equal(prompt.video.pixel_values, by_id[prompt.sample.sample_id].video.pixel_values)
    tokens = [sum(num_tree_tokens(tree, config) for tree in by_tree([RolloutGroup(each, []) for each in share]))
              for share in (prompts, mine)]  # fmt: skip
    before, after = zip(*of_all_ranks(tokens), strict=True)
    assert max(after) < max(before)


def check_gradient_traffic(tiny: Tiny, rank: int) -> None:
    """Bytes that a step of three rows reduces under ZeRO-2: all gradients once, or in every row; the same weights."""
    rows = pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=50)
    weights = []
    for reduces_once in (True, False):
        engine = build_engine(tiny, 2)
        num_bytes = sum(each.nbytes for each in engine.module.parameters())
        heads = [lambda hidden, weight: ((hidden @ weight.T).square().mean() * (1 + rank), None)] * len(rows)
        with Traffic() as seen:
            optimizer_step(engine, rows, heads, 1e-3, Stopwatch(), reduces_once)
        times = 1 if reduces_once else len(rows)
        assert times * num_bytes <= seen.bytes["all_reduce"] < times * num_bytes + 1000
        assert num_bytes <= seen.bytes["all_gather"] < 1.01 * num_bytes
        weights.append(torch.cat([each.detach().flatten() for each in engine.module.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def check_features(tiny: Tiny, zero_stage: int, rank: int) -> None:
    """A frozen tower: rank 0 has three videos to encode, rank 1 none."""
    engine, model = build_engine(tiny, zero_stage, has_frozen_tower=True), tiny.model()
    model.model.visual.requires_grad_(False)
    prompts = [group.prompt for group in tiny.groups()]
    expected = with_vision_features(Policy(model), prompts)
    for ours, theirs in zip(with_vision_features(engine, expected if rank else prompts), expected, strict=True):
        torch.testing.assert_close(ours.video.features.embeds, theirs.video.features.embeds)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed.init_distributed("gloo", verbose=False)
    tiny, zero_stage = Tiny("qwen2_5_vl"), int(words[0])
    engine = build_engine(tiny, zero_stage)
    check_rollouts(tiny, engine, dist.get_rank())
    check_update(tiny, engine, dist.get_rank())
    check_rollouts_follow_updates(tiny, engine)
    check_features(tiny, zero_stage, dist.get_rank())
    if zero_stage == 3:
        check_balance(tiny, dist.get_rank())
        check_gradient_traffic(tiny, dist.get_rank())
