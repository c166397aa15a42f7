"""Attention cores on a group of real size, then a packed model: both against fp32 on separate rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PUBLISHED, Scale, Size
from bench.gpu_sections.timing import distance, in_turn, require
from tempsamp_fast.config import AttentionCore
from tempsamp_fast.model.attention import PackedAttention, packed_attention
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import PackedRow, PackingMode
from tempsamp_fast.model.policy import Policy

HEADS: dict[Size, tuple[int, int]] = {"3B": (16, 2), "7B": (28, 4)}
HEAD_DIM, SCALING = 128, 128**-0.5
PROMPT_LEN = PUBLISHED.prompt_len
CORES: tuple[AttentionCore, ...] = ("varlen", "flex", "split")
MODES: tuple[PackingMode, ...] = ("none", "shared_prefix")


def measure(record: Record) -> None:
    """Flex attention last, and once: it compiles for every shape."""
    with record.attempt("packed model"):
        measure_model(record)
    shapes = list(product(HEADS, (32, 256), (8, 4)))
    for cores, chosen in ((("varlen", "split"), shapes), (("flex",), shapes[:1])):
        for size, completion_len, num_generations in chosen:
            label = f"{size} C={completion_len} G={num_generations}"
            with record.attempt(label):
                measure_cores(record, label, size, completion_len, num_generations, cores)


def outputs(attention: PackedAttention, leaves: list[Tensor]) -> list[Tensor]:
    """The output [1, N, heads, dim] and the gradients of query, key and value."""
    output = attention(0, *leaves, SCALING)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def separate_rows(leaves: list[Tensor], completion_len: int, num_generations: int) -> list[Tensor]:
    """The same tokens as rows [prompt | answer], one after the other."""
    prompt = torch.arange(PROMPT_LEN, device="cuda")
    own = torch.arange(completion_len * num_generations, device="cuda").view(num_generations, -1) + PROMPT_LEN
    index = torch.cat([torch.cat([prompt, answer]) for answer in own])
    return [leaf.detach()[:, :, index].requires_grad_() for leaf in leaves]


def measure_cores(
    record: Record,
    label: str,
    size: Size,
    completion_len: int,
    num_generations: int,
    cores: Sequence[AttentionCore] = CORES,
) -> None:
    layout = [GroupLayout(PROMPT_LEN, (completion_len,) * num_generations)]
    row_layout = [GroupLayout(PROMPT_LEN + completion_len, ())] * num_generations
    heads, kv_heads = HEADS[size]
    torch.manual_seed(0)
    shapes = [(1, count, layout[0].num_tokens, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    build = partial(packed_attention, device=torch.device("cuda"))
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = outputs(build(layout, dtype=torch.float32, core="split"), exact)

    runs: dict[str, Callable[[], list[Tensor]]] = {}
    errors: dict[str, float] = {}
    for core in cores:
        with record.attempt(f"{label} {core}"):
            run = partial(outputs, build(layout, dtype=torch.bfloat16, core=core), leaves)
            worst = max(map(distance, run(), expected))
            errors[core] = require(worst, 0.02, "distance of output and gradients from fp32")
            runs[core] = run
    rows = separate_rows(leaves, completion_len, num_generations)
    separate = partial(outputs, build(row_layout, dtype=torch.bfloat16, core="varlen"), rows)
    answers = separate()[0].view(num_generations, -1, heads, HEAD_DIM)[:, PROMPT_LEN:].flatten(0, 1)
    errors["separate rows"] = require(
        distance(answers, expected[0][0, PROMPT_LEN:]), 0.02, "distance of separate rows from the packed answers"
    )
    times = in_turn({**runs, "separate rows": separate})
    pairs = PROMPT_LEN * (PROMPT_LEN + 1) // 2
    pairs += num_generations * (completion_len * PROMPT_LEN + completion_len * (completion_len + 1) // 2)
    flops = 3.5 * 4 * heads * HEAD_DIM * pairs  # the backward pass is five products where the forward is two
    for name, figures in times.items():
        if name == "separate rows" and "varlen" not in cores:
            continue
        record.add(
            f"{label} {name}",
            **figures,
            error=errors[name],
            useful_tflops_per_s=flops / figures["ms"] / 1e9,
            over_separate_rows=times["separate rows"]["ms"] / figures["ms"],
        )


def log_prob_gradients(policy: Policy, rows: list[PackedRow]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of all answer tokens, and the gradients of a sum that weighs each of them differently."""
    num_predicted = sum(len(row.token_ids) for row in rows)
    weights = torch.linspace(-1, 1, num_predicted, device=rows[0].token_ids.device)
    policy.zero_grad()
    parts = []
    for row, weight in zip(rows, weights.split([len(row.token_ids) for row in rows]), strict=True):
        head = lambda hidden, table, ids=row.token_ids: _log_probs(hidden, table, ids)
        logps = policy(row, head)
        (weight * logps).sum().backward()
        parts.append(logps.detach())
    return torch.cat(parts), [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]


def _log_probs(hidden: Tensor, table: Tensor, token_ids: Tensor) -> Tensor:
    return (hidden.float() @ table.float().T).log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def measure_model(record: Record, scale: Scale = PUBLISHED) -> None:
    """Full width, four layers: the error of packed bf16 must not be over that of separate bf16 rows by half."""
    config = scale.config("3B", depth=4)
    exact = Policy(scale.model("3B", torch.float32, depth=4), attention_core="split")
    expected_logps, expected = log_prob_gradients(exact, scale.rows(config, 32, 4, mode="none"))
    rounded = scale.model("3B", depth=4)
    rounded.load_state_dict(exact.base_model.state_dict())
    policy = Policy(rounded)
    errors = {}
    for mode in MODES:
        logps, gradients = log_prob_gradients(policy, scale.rows(config, 32, 4, mode=mode))
        pairs = list(zip(gradients, expected, strict=True))
        total = sum((a.float() - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        errors[mode] = {"logp": (logps - expected_logps).abs().mean().item(), "gradient": total.sqrt().item()}
        record.add(f"3B width, 4 layers, {mode}", **errors[mode])
    for name, error in errors["shared_prefix"].items():
        require(error, 1.5 * errors["none"][name], f"error of {name} when packed")
