"""The step and its parts beside what users run otherwise, on the CPU: a 4-layer, 512-wide Qwen2.5-VL in fp32.

    pytest bench/bench_step.py

The vocabulary is small, so that the head weighs beside the layers about what it does in the 7B model (9 against 8 %).

Every benchmark first checks that both sides compute the same, then times them in turn. `extra_info` holds the ratio
(median over rounds), its spread and its goal. Times are CPU seconds of the whole
process, save where a wait is measured.
"""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TrainerCallback,
)

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, Sample, VideoPatches
from tempsamp_fast.packing import PackedRow, pack
from tempsamp_fast.policy import Policy
from tempsamp_fast.prefetch import Prefetch
from tempsamp_fast.rollout import SamplingParams, generate

MODEL = Path(__file__).with_name("step_model.json")
ROUNDS = 3
VOCAB, EOS = 2048, 0
IMAGE, VIDEO, VISION_START, VISION_END = range(VOCAB - 4, VOCAB)
UNLIMITED = 10**9
BETA = 0.04
NO_EOS: dict[str, list[int]] = {"eos_token_ids": [], "banned_token_ids": [EOS, VISION_START, VISION_END]}


def tiny_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_json_file(MODEL))


def make_prompt(prompt_len: int, grid_thw: tuple[int, int, int], seed: int = 0) -> Prompt:
    """A video of this grid (none if it has no frames), and text around it up to `prompt_len`.

    Grids are wider than their times are long, where transformers' positions agree with ours.
    """
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid_thw
    video = [VISION_START, *[VIDEO] * (t * h * w // 4), VISION_END] if t else []
    text = torch.randint(1, IMAGE, (prompt_len - len(video),), generator=generator)
    return Prompt(
        sample=Sample(f"sample-{seed}", Path("video.mp4"), "a query", 30.0, ((0.0, 1.0),)),
        mode="answer",
        input_ids=torch.cat([text[:5], torch.tensor(video, dtype=torch.int64), text[5:]]),
        video=VideoPatches(
            torch.randn(t * h * w, 3 * 2 * 14 * 14, generator=generator), grid_thw, 1.0, torch.arange(t).double()
        ),
    )


def random_group(prompt: Prompt, completion_len: int, num_generations: int) -> RolloutGroup:
    ids = torch.randint(1, IMAGE, (num_generations, completion_len), generator=torch.Generator().manual_seed(1))
    return RolloutGroup(prompt, [Completion(answer, text="") for answer in ids])


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(
    benchmark,
    ours: Callable[[], object],
    peer: Callable[[], object],
    goal: float,
    rounds: int = ROUNDS,
    **extra: object,
) -> None:
    """Time both in turn; ratio of the peer's CPU seconds to ours, by round."""
    peer_s, ours_s = [], []
    benchmark.pedantic(
        lambda: ours_s.append(cpu_seconds(ours)), setup=lambda: peer_s.append(cpu_seconds(peer)), rounds=rounds
    )
    report(benchmark, [p / o for p, o in zip(peer_s, ours_s, strict=True)], goal, ours_s=ours_s, peer_s=peer_s, **extra)


def report(benchmark, ratios: list[float], goal: float, **extra: object) -> None:
    benchmark.extra_info.update(ratio=median(ratios), spread=[min(ratios), max(ratios)], goal=goal, **extra)


def weighted_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """A loss that weighs every answer token differently."""
    weights = torch.linspace(-1, 1, len(token_ids))
    return (weights * logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]).sum()


# (a) The update: a packed row against one row per completion.


@pytest.mark.parametrize("shape", [(830, 48, 5), (2110, 64, 5), (2110, 64, 9)])
def test_update_packed_against_one_row_per_completion(benchmark, shape):
    """Text only, which is the hardest case: the tower's share alone would be `num_generations` times."""
    prompt_len, completion_len, num_generations = shape
    model, policy = tiny_model(), Policy(tiny_model())
    group = random_group(make_prompt(prompt_len, (0, 0, 0)), completion_len, num_generations)
    (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
    weights = torch.linspace(-1, 1, len(row.token_ids)).split(completion_len)

    def separate() -> None:
        for completion, weight in zip(group.completions, weights, strict=True):
            ids = torch.cat([group.prompt.input_ids, completion.ids])[None]
            logits = model(input_ids=ids, logits_to_keep=completion_len + 1, use_cache=False).logits[0, :-1]
            logps = logits.log_softmax(-1).gather(-1, completion.ids[:, None])[:, 0]
            (weight * logps).sum().backward()

    def packed() -> None:
        policy(row, lambda hidden, weight: weighted_log_probs(hidden @ weight.T, row.token_ids)).backward()

    separate()
    packed()
    assert_same_gradients(policy.base_model, model)
    total = prompt_len + completion_len
    token_ratio = num_generations * total / row.num_tokens
    compare(benchmark, packed, separate, goal=0.85 * token_ratio, token_ratio=token_ratio)


def assert_same_gradients(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    for (name, left), right in zip(actual.named_parameters(), expected.parameters(), strict=True):
        if right.grad is not None:
            assert (left.grad - right.grad).norm() < 1e-3 * right.grad.norm(), name


# (b) Rollouts: one prefill for all answers against `generate(num_return_sequences=G)`.


def huggingface_inputs(prompt: Prompt, copies: int = 1) -> dict[str, Tensor]:
    ids = prompt.input_ids[None].repeat(copies, 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": prompt.video.pixel_values.repeat(copies, 1),
        "video_grid_thw": torch.tensor([prompt.video.grid_thw]).repeat(copies, 1),
        "second_per_grid_ts": torch.tensor([prompt.video.second_per_grid]).repeat(copies),
    }


def huggingface_generate(model: PreTrainedModel, prompt: Prompt, num_answers: int, length: int, sample: bool) -> Tensor:
    config = GenerationConfig(
        do_sample=sample,
        top_k=0,
        max_new_tokens=length,
        num_return_sequences=num_answers,
        suppress_tokens=[EOS, IMAGE, VIDEO, VISION_START, VISION_END],
        eos_token_id=None,
        pad_token_id=EOS,
    )
    return model.generate(**huggingface_inputs(prompt), generation_config=config)[:, len(prompt.input_ids) :]


def test_rollout_against_generate(benchmark):
    model, policy = tiny_model().eval(), Policy(tiny_model()).eval()
    prompt = make_prompt(830, (4, 28, 28))
    greedy = SamplingParams(temperature=0, max_completion_length=24)
    ((answer,),) = generate(policy, [prompt], 1, greedy, seed=(0,), **NO_EOS)
    assert answer.ids.tolist() == huggingface_generate(model, prompt, 1, 24, sample=False)[0].tolist()
    params = SamplingParams(max_completion_length=24)
    ours = partial(generate, policy, [prompt], 5, params, seed=(0,), **NO_EOS)
    compare(benchmark, ours, lambda: huggingface_generate(model, prompt, 5, 24, sample=True), goal=2.0, rounds=5)


# (c) The whole step against a TimeZero-style one: pixels and prompts repeated, full logits, a separate reference pass.


def separate_log_probs(model: PreTrainedModel, prompt: Prompt, answers: Tensor) -> Tensor:
    """[num_answers, completion_len]; row by row after the head, as the released trainers do to save memory."""
    inputs = huggingface_inputs(prompt, len(answers))
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    zeros = torch.zeros_like(answers, dtype=torch.int32)
    inputs |= {"input_ids": ids, "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)}
    logits = model(**inputs | {"attention_mask": torch.ones_like(ids)}, use_cache=False).logits[:, :-1]
    rows = [row.log_softmax(-1).gather(-1, row_ids[1:, None])[:, 0] for row, row_ids in zip(logits, ids, strict=True)]
    return torch.stack(rows)[:, -answers.shape[1] :]


def separate_loss(model: PreTrainedModel, reference: PreTrainedModel, prompt: Prompt, answers: Tensor) -> Tensor:
    logps = separate_log_probs(model, prompt, answers)
    with torch.no_grad():
        delta = separate_log_probs(reference, prompt, answers) - logps.detach()
    delta = delta + logps.detach() - logps
    advantages = torch.linspace(-1, 1, len(answers))[:, None]
    return -((logps - logps.detach()).exp() * advantages - BETA * (delta.exp() - delta - 1)).mean(1).mean()


def packed_loss(policy: Policy, reference: Policy | None, row: PackedRow, beta: float) -> Tensor:
    with torch.no_grad():
        head = lambda hidden, weight: linear_logprob(hidden, weight, row.token_ids)[0]
        ref_logps = reference(row, head) if reference is not None else None

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_grpo_loss(
            hidden,
            weight,
            row.token_ids,
            row.row_ids,
            advantages=torch.linspace(-1, 1, row.num_completions),
            ref_logps=ref_logps,
            loss_type="grpo",
            beta=beta,
        )[0]

    return policy(row, loss)


def test_step_against_a_plain_huggingface_step(benchmark):
    prompt, num_answers, length = make_prompt(2110, (6, 36, 36)), 8, 32
    model, reference = tiny_model(), tiny_model(1).eval()
    policy, packed_reference = Policy(tiny_model()), Policy(tiny_model(1)).eval()
    optimizers = [torch.optim.AdamW(side.parameters(), lr=1e-6) for side in (model, policy)]
    params = SamplingParams(max_completion_length=length)

    def plain_step() -> None:
        answers = huggingface_generate(model, prompt, num_answers, length, sample=True)
        separate_loss(model, reference, prompt, answers).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def fast_step() -> None:
        (answers,) = generate(policy, [prompt], num_answers, params, seed=(0,), **NO_EOS)
        group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
        (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
        packed_loss(policy, packed_reference, row, BETA).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    group = random_group(prompt, length, 2)
    answers = torch.stack([completion.ids for completion in group.completions])
    (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
    expected = separate_loss(model, reference, prompt, answers)
    loss = packed_loss(policy, packed_reference, row, BETA)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    loss.backward()
    assert_same_gradients(policy.base_model, model)
    compare(benchmark, fast_step, plain_step, goal=4.0, rounds=2)


# (d) The whole step against trl.GRPOTrainer on text.


class Alternating(TrainerCallback):
    """After each of the trainer's steps, one of ours; CPU seconds of both."""

    def __init__(self, ours: Callable[[], object]) -> None:
        self.ours, self.trl_s, self.ours_s = ours, [], []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.trl_s.append(time.process_time() - self.started)
        self.ours_s.append(cpu_seconds(self.ours))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Id i is the word `w<i>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{EOS}", pad_token=f"w{EOS}")


def test_step_against_trl(benchmark, tmp_path):
    """Same model, prompt, answer length and sampling; beta 0, AdamW at 1e-6 and clipping at 1 on both sides."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    prompt, num_answers, length = make_prompt(1024, (0, 0, 0)), 8, 32
    policy = Policy(tiny_model())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    params = SamplingParams(max_completion_length=length)
    words = " ".join(f"w{index}" for index in prompt.input_ids.tolist())

    def fast_step() -> None:
        (answers,) = generate(policy, [prompt], num_answers, params, seed=(0,), **NO_EOS)
        group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
        (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
        packed_loss(policy, None, row, beta=0.0).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seen_lengths: list[int] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        seen_lengths.extend(map(len, completion_ids))
        return torch.linspace(0, 1, len(prompts)).tolist()

    alternating = Alternating(fast_step)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=num_answers,
        num_generations=num_answers,
        gradient_accumulation_steps=1,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        learning_rate=1e-6,
        max_steps=ROUNDS + 1,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_model(),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": words}] * (ROUNDS + 1)),
        processing_class=word_tokenizer(),
        callbacks=[alternating],
    )
    benchmark.pedantic(trainer.train, rounds=1)
    assert set(seen_lengths) == {length}
    ratios = [t / o for t, o in zip(alternating.trl_s[1:], alternating.ours_s[1:], strict=True)]
    report(benchmark, ratios, goal=3.0, ours_s=alternating.ours_s, trl_s=alternating.trl_s)


# (e) Time blocked on the video queue.


def decode_for(seconds: float) -> bytes:
    """A stand-in for decoding that, like it, computes without the interpreter lock."""
    end, block = time.perf_counter() + seconds, bytes(2**20)
    while time.perf_counter() < end:
        hashlib.sha256(block).digest()
    return block


def test_blocked_on_the_video_queue(benchmark):
    """Decoding takes half of the compute time, in the background; the share of a step spent waiting, after step 3."""
    policy = Policy(tiny_model())
    group = random_group(make_prompt(830, (0, 0, 0)), 48, 5)
    (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
    compute = lambda: policy(row).sum().backward()
    compute()
    start = time.perf_counter()
    compute()
    decode_s, shares = (time.perf_counter() - start) / 2, []

    def steps() -> None:
        with Prefetch((decode_for(decode_s) for _ in range(12)), depth=2) as videos:
            blocked, begun = 0.0, time.perf_counter()
            for _ in videos:
                compute()
                ended = time.perf_counter()
                shares.append((videos.blocked_s - blocked) / (ended - begun))
                blocked, begun = videos.blocked_s, ended

    benchmark.pedantic(steps, rounds=1)
    report(benchmark, shares[3:], goal=0.05, decode_s=decode_s)
