"""One rank of `test_ranks.py`: rollouts and an update under ZeRO, checked against a model that is not partitioned.

RANK=0 WORLD_SIZE=2 ... python tests/rollout/rank_worker.py ZERO_STAGE
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Tiny
from tempsamp_fast.learning.engine import in_step, optimizer_step
from tempsamp_fast.learning.loss import idle_loss
from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.system.stopwatch import Stopwatch


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
    """Rank 0 has three prompts; rank 1 has one, whose answers all end at once."""
    prompts = [group.prompt for group in tiny.groups()][: 3 - 2 * rank]
    ends = list(range(20, 40)) if rank == 0 else list(range(60))
    params = SamplingParams(max_completion_length=4)
    answers = PolicyBackend(engine, ends, (), max_tokens_per_row=50).generate(prompts, 4, params, seed=(1,))
    expected = generate(Policy(tiny.model()), prompts, 4, params, seed=(1,), eos_token_ids=ends, max_tokens_per_row=50)
    flat = lambda groups: [answer.ids.tolist() for group in groups for answer in group]
    assert flat(answers) == flat(expected)
    assert rank == 0 or max(map(len, flat(answers))) == 1


def check_update(tiny: Tiny, engine, rank: int) -> None:
    """Uneven rows: rank 0 has three, rank 1 one; the loss falls on both."""
    own_rows = pack(tiny.groups()[: 3 - 2 * rank], config=engine.module.config, max_tokens_per_row=50)
    rows = in_step(engine, own_rows)

    def head_of(row):
        def head(hidden, weight):
            logps = (hidden @ weight.T).log_softmax(-1).gather(-1, row.token_ids[:, None])
            return -logps.mean(), float(-logps.mean())

        return head

    heads = [*map(head_of, own_rows), *[idle_loss] * (len(rows) - len(own_rows))]
    losses = [sum(optimizer_step(engine, rows, heads, 1e-3, Stopwatch())[0][: len(own_rows)]) for _ in range(3)]
    assert losses[-1] < losses[0], losses


def check_features(tiny: Tiny, zero_stage: int, rank: int) -> None:
    """A frozen tower: rank 0 has three videos to encode, rank 1 none."""
    engine, model = build_engine(tiny, zero_stage, has_frozen_tower=True), tiny.model()
    model.model.visual.requires_grad_(False)
    prompts = [group.prompt for group in tiny.groups()]
    expected = with_vision_features(Policy(model), prompts)
    for ours, theirs in zip(with_vision_features(engine, expected if rank else prompts), expected, strict=True):
        torch.testing.assert_close(ours.video.features.embeds, theirs.video.features.embeds)


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    tiny = Tiny("qwen2_5_vl")
    engine = build_engine(tiny, int(sys.argv[1]))
    check_rollouts(tiny, engine, dist.get_rank())
    check_update(tiny, engine, dist.get_rank())
    check_features(tiny, int(sys.argv[1]), dist.get_rank())


if __name__ == "__main__":
    main()
