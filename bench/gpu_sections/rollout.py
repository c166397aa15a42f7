"""Sampling eight answers of 128 tokens to prompts of 3700, 3B shape: ours against Hugging Face's two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PUBLISHED, Scale
from bench.gpu_sections.timing import in_turn, memory, require
from bench.step_contenders import EOS, NO_EOS, huggingface_generate
from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.learning.vision_features import with_pixels_on
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams, generate

NUM_ANSWERS, LENGTH = 8, 128
NUM_PROMPTS = (8, 1, 32)
GRAPHS = "ours, graphs"
MOST_EAGER = 8
"""Prompts that are sampled without graphs too."""
LOGP_BOUND = 0.1
"""Mean distance of bfloat16 log-probs: in 36 layers rounding alone makes 0.03."""
GOALS = {1: {"decode_over_weights": ("at most", 2.0)}, 8: {"rollouts_per_s": ("at least", 20.0)}}
"""Of the trainer's default, by number of prompts."""
COPIED_BYTES = 1 << 30


def measure(
    record: Record, scale: Scale = PUBLISHED, length: int = LENGTH, num_prompts: Sequence[int] = NUM_PROMPTS
) -> None:
    model = scale.model("3B")
    apply_liger_layers(model, "auto")  # the trainer's default on a GPU; for the peers that sample from it too
    policy = Policy(model).eval()
    for number in num_prompts:
        with record.attempt(f"{number} prompts"):
            measure_videos(record, scale, policy, number, length)
    with record.attempt("continuous batching"):
        measure_text(record, scale, policy, num_prompts[0], length)


def ours(
    policy: Policy, length: int, prompts: list[Prompt], decoder: Decoder | None = None
) -> list[list[SampledAnswer]]:
    params = SamplingParams(max_completion_length=length)
    return generate(policy, prompts, NUM_ANSWERS, params, seed=(0,), decoder=decoder, **NO_EOS)


@torch.no_grad()
def log_prob_error(policy: Policy, prompt: Prompt, answers: list[SampledAnswer]) -> float:
    """Mean distance of the sampled log-probs from those of the packed training forward."""
    group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
    (row,) = pack([group], config=policy.config, max_tokens_per_row=10**9)
    row = row.to(policy.base_model.device)
    logits = policy(row, lambda hidden, weight: hidden @ weight.T).float()
    expected = logits.log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
    sampled = torch.cat([answer.logps for answer in answers]).to(row.token_ids.device)
    return (sampled - expected).abs().mean().item()


def share_of_same_tokens(left: list[list[SampledAnswer]], right: list[list[SampledAnswer]]) -> float:
    """Of answers drawn with the same noise: 1 but for what rounding turns."""
    pairs = [(a, b) for some, others in zip(left, right, strict=True) for a, b in zip(some, others, strict=True)]
    return sum(float((a.ids == b.ids).float().mean()) for a, b in pairs) / len(pairs)


def rates(num_prompts: int, length: int, ms: float) -> dict[str, float]:
    rows = num_prompts * NUM_ANSWERS
    return {"rollouts_per_s": 1e3 * rows / ms, "tokens_per_s": 1e3 * rows * length / ms}


def measure_videos(record: Record, scale: Scale, policy: Policy, num_prompts: int, length: int) -> None:
    """With CUDA graphs, as the trainer does by default, and of few prompts without, and by `generate`.

    What fails leaves the others' figures.
    """
    prompts = with_pixels_on(policy.base_model.device, [scale.video_prompt(seed) for seed in range(num_prompts)])
    graphs = GraphDecoder()
    runs: dict[str, Callable[[], list[list[SampledAnswer]]]] = {}
    found: dict[str, dict[str, float]] = {}
    eager: list[list[SampledAnswer]] = []
    for name, decoder in {"ours": None, GRAPHS: graphs}.items():
        if name == "ours" and num_prompts > MOST_EAGER:
            continue
        with record.attempt(f"{num_prompts} prompts {name}"):
            run = partial(ours, policy, length, prompts, decoder)
            sampled: list[list[list[SampledAnswer]]] = []
            used = memory(lambda run=run, sampled=sampled: sampled.append(run()))
            (answers,) = sampled
            assert all(len(answer.ids) == length for group in answers for answer in group)
            error = require(
                log_prob_error(policy, prompts[0], answers[0]), LOGP_BOUND, "error of the sampled log-probs"
            )
            found[name] = {**used, "logp_error": error}
            if eager:
                same = share_of_same_tokens(eager, answers)
                require(1 - same, 0.5, "share of tokens that CUDA graphs draw differently")
                found[name]["same_tokens"] = same
            eager, runs[name] = answers, run
    if not runs:
        return
    *_, default = runs
    half = partial(ours, policy, length // 2, prompts, graphs if default == GRAPHS else None)
    times = in_turn({**runs, "half": half}, rounds=scale.rounds, warmup=0)
    per_token_ms = (times[default]["ms"] - times.pop("half")["ms"]) / (length - length // 2)
    found[default] |= {"decode_ms_per_token": per_token_ms, "decode_over_weights": per_token_ms / weights_ms(policy)}
    for name, figures in times.items():
        record.add(
            f"{num_prompts} prompts {name}",
            **figures,
            **rates(num_prompts, length, figures["ms"]),
            **found[name],
            over_eager=times["ours"]["ms"] / figures["ms"] if "ours" in times else None,
            goals=GOALS.get(num_prompts) if name == default else None,
        )
    if num_prompts == 1:
        with record.attempt(f"{num_prompts} prompts, generate"):
            prompt = scale.on_device(prompts[0])
            plain = partial(huggingface_generate, policy.base_model, prompt, NUM_ANSWERS, length)
            figures = in_turn({"generate": plain}, rounds=1, warmup=1)["generate"]
            ratio = times[default]["ms"] / figures["ms"]
            record.add("1 prompts generate", **figures, **rates(1, length, figures["ms"]), over_ours=ratio)


def weights_ms(policy: Policy) -> float:
    """What a decoded token reads of weights (every layer, and the head), as milliseconds of a copy of as many bytes."""
    model = policy.base_model
    layers = [each for name, each in model.model.language_model.named_parameters() if "embed_tokens" not in name]
    num_bytes = sum(each.nbytes for each in (*layers, model.lm_head.weight))
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=model.device)
    target = torch.ones_like(source)
    copied = in_turn({"copy": lambda: target.copy_(source)})["copy"]
    return copied["ms"] * num_bytes / (2 * COPIED_BYTES)


def measure_text(record: Record, scale: Scale, policy: Policy, num_prompts: int, length: int) -> None:
    """Text only, which is all that continuous batching takes: a language model of the same shape.

    Its manager, with its graphs and its cache, is made before anything is timed and kept between rounds. It also keeps
    the blocks of prompts it has seen, so that every call gets new ones.
    """
    text = policy.config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept = {name: text[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    with torch.device(scale.device):
        model = Qwen2ForCausalLM._from_config(
            Qwen2Config(**kept, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=EOS),
            dtype=torch.bfloat16,
        ).eval()
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, eos_token_id=-1, pad_token_id=EOS)
    batching = ContinuousBatchingConfig(max_memory_percent=scale.cache_share)
    seeds = count()

    def new_prompts() -> list[Prompt]:
        return [scale.text_prompt(next(seeds)) for _ in range(num_prompts)]

    def continuous() -> None:
        inputs = [prompt.input_ids.tolist() for prompt in new_prompts() for _ in range(NUM_ANSWERS)]
        results = model.generate_batch(
            inputs, generation_config=config, continuous_batching_config=batching, persistent_manager=True
        )
        generated = sum(len(result.generated_tokens) for result in results.values())
        assert generated == len(inputs) * length, f"continuous batching made {generated} tokens"

    try:
        runs = {"ours": lambda: ours(policy, length, new_prompts()), "continuous batching": continuous}
        times = in_turn(runs, rounds=scale.rounds, warmup=2)
    finally:
        model.destroy_cached_continuous_batching_manager()
    for name, figures in times.items():
        over = times["continuous batching"]["ms"] / figures["ms"]
        record.add(
            f"text, {num_prompts} prompts {name}",
            **figures,
            **rates(num_prompts, length, figures["ms"]),
            over_continuous=over,
        )
