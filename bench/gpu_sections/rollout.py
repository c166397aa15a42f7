"""Sampling eight answers of 128 tokens to prompts of 3700, 3B shape: ours against Hugging Face's two ways."""

from __future__ import annotations

from functools import partial

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PROMPT_LEN, model_config, on_gpu, random_model, video_prompt
from bench.gpu_sections.timing import in_turn, peak_gib, require
from bench.step_contenders import EOS, NO_EOS, huggingface_generate, make_prompt
from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.packing import pack
from tempsamp_fast.policy import Policy
from tempsamp_fast.rollout import SampledAnswer, SamplingParams, generate

NUM_ANSWERS, LENGTH, ROUNDS = 8, 128, 3
PARAMS = SamplingParams(max_completion_length=LENGTH)


def measure(record: Record) -> None:
    policy = Policy(random_model(model_config("3B"))).eval()
    for num_prompts in (1, 8, 32):
        with record.attempt(f"{num_prompts} prompts"):
            measure_videos(record, policy, num_prompts)
    with record.attempt("continuous batching"):
        measure_text(record, policy, num_prompts=8)


def ours(policy: Policy, prompts: list[Prompt], cuda_graphs: bool = False) -> list[list[SampledAnswer]]:
    return generate(policy, prompts, NUM_ANSWERS, PARAMS, seed=(0,), cuda_graphs=cuda_graphs, **NO_EOS)


@torch.no_grad()
def log_prob_error(policy: Policy, prompt: Prompt, answers: list[SampledAnswer]) -> float:
    """Mean distance of the sampled log-probs from those of the packed training forward."""
    group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
    (row,) = pack([group], config=policy.config, max_tokens_per_row=10**9)
    row = row.to("cuda")
    logits = policy(row, lambda hidden, weight: hidden @ weight.T).float()
    expected = logits.log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
    sampled = torch.cat([answer.logps for answer in answers]).cuda()
    return (sampled - expected).abs().mean().item()


def share_of_same_tokens(left: list[list[SampledAnswer]], right: list[list[SampledAnswer]]) -> float:
    """Of answers drawn with the same noise: 1 but for what rounding turns."""
    pairs = [(a, b) for some, others in zip(left, right, strict=True) for a, b in zip(some, others, strict=True)]
    return sum(float((a.ids == b.ids).float().mean()) for a, b in pairs) / len(pairs)


def rates(num_prompts: int, ms: float) -> dict[str, float]:
    rows = num_prompts * NUM_ANSWERS
    return {"rollouts_per_s": 1e3 * rows / ms, "tokens_per_s": 1e3 * rows * LENGTH / ms}


def measure_videos(record: Record, policy: Policy, num_prompts: int) -> None:
    prompts = [video_prompt(seed) for seed in range(num_prompts)]
    answers = ours(policy, prompts)
    assert all(len(answer.ids) == LENGTH for group in answers for answer in group)
    error = require(log_prob_error(policy, prompts[0], answers[0]), 0.02, "error of the sampled log-probs")
    same = share_of_same_tokens(answers, ours(policy, prompts, cuda_graphs=True))
    require(1 - same, 0.5, "share of tokens that CUDA graphs draw differently")
    runs = {"ours": partial(ours, policy, prompts), "ours, graphs": partial(ours, policy, prompts, True)}
    if num_prompts <= 8:  # 32 prompts are 256 copies of 3700 tokens there
        # Copies of one prompt, which cost what so many prompts of equal length do.
        runs["generate"] = partial(
            huggingface_generate, policy.base_model, on_gpu(prompts[0]), NUM_ANSWERS, LENGTH, copies=num_prompts
        )
    times = in_turn(runs, rounds=ROUNDS, warmup=1)
    for name, figures in times.items():
        record.add(
            f"{num_prompts} prompts {name}",
            **figures,
            **rates(num_prompts, figures["ms"]),
            peak_gib=peak_gib(runs[name]),
            **({"logp_error": error} if name == "ours" else {}),
            **({"same_tokens": same} if name == "ours, graphs" else {}),
            over_ours=times["ours"]["ms"] / figures["ms"],
            **({"over_generate": times["generate"]["ms"] / figures["ms"]} if "generate" in times else {}),
            goals={"rollouts_per_s": ("at least", 8.0)} if name.startswith("ours") and num_prompts == 8 else None,
        )


def measure_text(record: Record, policy: Policy, num_prompts: int) -> None:
    """Text only, which is all that continuous batching takes: a language model of the same shape."""
    text = policy.config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept = {name: text[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    with torch.device("cuda"):
        model = Qwen2ForCausalLM._from_config(
            Qwen2Config(**kept, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=EOS),
            dtype=torch.bfloat16,
        ).eval()
    prompts = [make_prompt(PROMPT_LEN, (0, 0, 0), seed) for seed in range(num_prompts)]
    inputs = [prompt.input_ids.tolist() for prompt in prompts for _ in range(NUM_ANSWERS)]
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=LENGTH, eos_token_id=-1, pad_token_id=EOS)

    def continuous() -> int:
        results = model.generate_batch(inputs, generation_config=config)
        return sum(len(result.generated_tokens) for result in results.values())

    generated = continuous()
    assert generated == len(inputs) * LENGTH, f"continuous batching made {generated} tokens"
    times = in_turn({"ours": partial(ours, policy, prompts), "continuous batching": continuous}, rounds=ROUNDS)
    for name, figures in times.items():
        over = times["continuous batching"]["ms"] / figures["ms"]
        record.add(
            f"text, {num_prompts} prompts {name}", **figures, **rates(num_prompts, figures["ms"]), over_continuous=over
        )
