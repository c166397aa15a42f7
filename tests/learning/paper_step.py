"""A training step written out in plain torch from the paper's formulas (arXiv 2509.18056), for the trainer to equal.

Nothing of the trainer or its kernels is called: rewards are given as written down for known answers, every answer is a
row of its own through the plain transformers model, and advantages, loss and optimizer are spelled out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
"""By the names of the command line."""


@dataclass(frozen=True)
class KnownAnswer:
    """One row: its tokens and what it earns."""

    ids: Tensor
    """[length] int64, end-of-sequence id included."""
    task_reward: float
    format_reward: float
    """0 in answer mode."""
    is_off_policy: bool = False


@dataclass(frozen=True)
class KnownGroup:
    """A prompt with its video, and its answers."""

    prompt_ids: Tensor
    pixel_values: Tensor
    grid_thw: tuple[int, int, int]
    second_per_grid: float
    answers: list[KnownAnswer]

    def num_tokens(self, packing: str) -> int:
        """That the trainer should run: the prompt once, or with each answer."""
        num_prompts = 1 if packing == "shared_prefix" else len(self.answers)
        return num_prompts * len(self.prompt_ids) + sum(len(answer.ids) for answer in self.answers)


@dataclass
class Step:
    """What a training step gives."""

    advantages: list[list[float]]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each update, before clipping."""
    grad_norms: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last update."""


def shaped(reward: float, tau: float, alpha_1: float, alpha_2: float) -> float:
    """Equation 4."""
    if reward >= tau:
        return tau + alpha_1 * math.log(1 + reward - tau)
    return tau - (math.exp(alpha_2 * (tau - reward)) - 1) / (math.exp(alpha_2) - 1)


def normalised(rewards: Sequence[float]) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    return [(reward - fmean(rewards)) / (stdev(rewards) + 1e-4) for reward in rewards]


def oracle_advantages(on_policy: Sequence[float], off_policy: float) -> tuple[list[float], float]:
    """OraRL (arXiv 2608.20492): of the sampled answers, and of the given one."""
    mean = fmean(on_policy)
    gain = ((stdev([*on_policy, off_policy])) / (stdev(on_policy) + 1e-6)) ** 0.25
    centred = [reward - mean for reward in on_policy]
    raised = [each * min(max(gain, 1.0), 4.0) if each > 0 else each for each in centred]
    advantages = [each - fmean(raised) for each in raised]
    surplus = min(max((off_policy - mean) / (off_policy + 1e-6), 0.0), 1.0)
    cap = min(max(1.2 * max(advantages), 0.05), 1.0)
    return advantages, min(2 * surplus**2, cap)


def advantages(answers: Sequence[KnownAnswer], rule: str, settings: Settings) -> list[float]:
    """Of one group whose off-policy answer, if it has one, comes last; section 3.3 of the paper."""
    task = [answer.task_reward for answer in answers]
    form = [settings["format_weight"] * answer.format_reward for answer in answers]
    num_sampled = sum(not answer.is_off_policy for answer in answers)
    if rule == "nonlinear":
        task = [shaped(reward, settings["tau"], settings["alpha_1"], settings["alpha_2"]) for reward in task]
    if rule == "downscale":
        task = [*task[:num_sampled], *[settings["downscale"] * max(task)] * (len(task) - num_sampled)]
    rewards = [sum(both) for both in zip(task, form, strict=True)]
    sampled, given = rewards[:num_sampled], rewards[num_sampled:]
    if rule == "anchor":
        on_policy = normalised(sampled)
        return [*on_policy, *[settings["lambda_off"] * max(on_policy)] * len(given)]
    if rule == "orarl" and given:
        on_policy, off_policy = oracle_advantages(sampled, *given)
        return [*on_policy, off_policy]
    return normalised(rewards)


def positions(group: KnownGroup, config: Any) -> Tensor:
    """[3, prompt_len]: time, height and width; text counts on after the largest position so far."""
    is_video = (group.prompt_ids == config.video_token_id).tolist()
    frames, height, width = (side // merge for side, merge in zip(group.grid_thw, (1, 2, 2), strict=True))
    found: list[tuple[int, int, int]] = []
    frame, free = 0, 0
    while len(found) < len(is_video):
        if not is_video[len(found)]:
            found.append((free, free, free))
            free += 1
            continue
        if config.model_type == "qwen3_vl":  # frame by frame between timestamps
            times = [0]
        else:
            rate = group.second_per_grid * config.vision_config.tokens_per_second
            times = [math.floor(k * rate) for k in range(frames)]
        found += [(free + t, free + h, free + w) for t in times for h in range(height) for w in range(width)]
        free = max(max(each) for each in found) + 1
        frame += len(times)
    assert frame == frames
    return torch.tensor(found).T


def log_probs(model: Any, group: KnownGroup, temperature: float) -> list[Tensor]:
    """[length] of each answer, each a row of its own that is filled up behind its end."""
    num_rows, prompt_len = len(group.answers), len(group.prompt_ids)
    longest = max(len(answer.ids) for answer in group.answers)
    filled = torch.stack([torch.cat([a.ids, a.ids.new_zeros(longest - len(a.ids))]) for a in group.answers])
    of_prompt = positions(group, model.config)
    of_answer = (of_prompt.max() + 1 + torch.arange(longest)).expand(3, -1)
    logits = model(
        input_ids=torch.cat([group.prompt_ids.expand(num_rows, -1), filled], dim=1),
        position_ids=torch.cat([of_prompt, of_answer], dim=1)[:, None].expand(-1, num_rows, -1),
        pixel_values_videos=group.pixel_values.repeat(num_rows, 1),
        video_grid_thw=torch.tensor([group.grid_thw] * num_rows),
        use_cache=False,
    ).logits
    logps = (logits[:, prompt_len - 1 : -1].float() / temperature).log_softmax(-1)
    return [
        logps[row, : len(answer.ids)].gather(-1, answer.ids[:, None])[:, 0] for row, answer in enumerate(group.answers)
    ]


@dataclass
class AdamW:
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, after clipping the whole gradient to `max_norm`."""

    parameters: dict[str, Tensor]
    weight_decay: float
    beta_2: float
    eps: float
    max_norm: float
    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        self.count += 1
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = min(1.0, self.max_norm / float(norm)) if self.max_norm else 1.0
        for name, parameter in self.parameters.items():
            gradient = scale * gradients[name]
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
            self.second[name] = self.beta_2 * self.second.get(name, 0.0) + (1 - self.beta_2) * gradient**2
            mean = self.first[name] / (1 - 0.9**self.count)
            variance = self.second[name] / (1 - self.beta_2**self.count)
            parameter -= rate * (mean / (variance.sqrt() + self.eps) + self.weight_decay * parameter)


@dataclass(frozen=True)
class Row:
    """One answer in one update."""

    logps: Tensor
    old: Tensor
    ref: Tensor | None
    advantage: float
    is_off_policy: bool

    def ratio(self, level: str) -> Tensor:
        log_ratio = self.logps - self.old
        return (log_ratio if level == "token" else log_ratio.mean().expand_as(log_ratio)).exp()

    def kl(self) -> Tensor:
        """k3 to the reference."""
        if self.ref is None:
            return torch.zeros_like(self.logps)
        gap = self.ref - self.logps
        return gap.exp() - gap - 1


def token_losses(row: Row, settings: Settings) -> Tensor:
    """[length]: minus the clipped surrogate, plus what the KL costs."""
    ratio, low, high = (
        row.ratio(settings["importance_sampling_level"]),
        settings["epsilon_low"],
        settings["epsilon_high"],
    )
    bounded = torch.minimum(ratio, torch.tensor(settings["delta"] or math.inf))
    surrogate = torch.minimum(bounded * row.advantage, ratio.clamp(1 - low, 1 + high) * row.advantage)
    pays = settings["off_policy_kl"] or not row.is_off_policy
    return (settings["beta"] * row.kl() if pays else 0.0) - surrogate


def whole_loss(rows: Sequence[Row], method: str, settings: Settings) -> Tensor:
    num_tokens = sum(len(row.logps) for row in rows)
    if method == "sft":
        return -torch.stack([row.logps.mean() for row in rows]).mean()
    losses = [token_losses(row, settings) for row in rows]
    if settings["loss_type"] == "grpo":
        return torch.stack([loss.mean() for loss in losses]).mean()
    budget = len(rows) * settings["max_completion_length"] if settings["loss_type"] == "dr_grpo" else num_tokens
    return torch.cat(losses).sum() / budget


def described(rows: Sequence[Row], settings: Settings) -> dict[str, float]:
    """Means over tokens and extremes, of all rows and of either source."""
    metrics = {}
    for side, chosen in (
        ("", rows),
        ("on_policy/", [row for row in rows if not row.is_off_policy]),
        ("off_policy/", [row for row in rows if row.is_off_policy]),
    ):
        if not chosen:
            continue
        ratio = torch.cat([row.ratio(settings["importance_sampling_level"]) for row in chosen])
        sign = torch.cat([torch.full_like(row.logps, row.advantage) for row in chosen])
        tokens = {
            "logp": torch.cat([row.logps for row in chosen]),
            "kl": torch.cat([row.kl() for row in chosen]),
            "ratio_mean": ratio,
            "clip_low": ((ratio < 1 - settings["epsilon_low"]) & (sign < 0)).float(),
            "clip_high": ((ratio > 1 + settings["epsilon_high"]) & (sign > 0)).float(),
        }
        if chosen[0].ref is None:
            del tokens["kl"]  # it is not computed
        metrics |= {f"policy/{side}{name}": float(values.detach().mean()) for name, values in tokens.items()}
        metrics |= {
            f"policy/{side}ratio_min": float(ratio.detach().min()),
            f"policy/{side}ratio_max": float(ratio.detach().max()),
        }
        metrics[f"policy/{side}num_tokens"] = float(len(ratio))
    return metrics


def paper_step(
    model: Any, reference: Any, groups: Sequence[KnownGroup], method: str, settings: Settings, optimizer: AdamW
) -> Step:
    """Train `model` on `groups` as one step of the trainer should."""
    rule = "grpo" if method == "grpo" else settings["shaping"]
    step = Step([[1.0] * len(g.answers) if method == "sft" else advantages(g.answers, rule, settings) for g in groups])
    temperature = 1.0 if method == "sft" else settings["temperature"]
    num_updates = 1 if method == "sft" else settings["updates_per_batch"]
    has_kl = method != "sft" and settings["beta"] > 0
    with torch.no_grad():
        ref = [log_probs(reference, group, temperature) if has_kl else None for group in groups]
    teaches = [method == "sft" or has_kl or any(values) for values in step.advantages]
    teaching = [group for group, does in zip(groups, teaches, strict=True) if does]
    old: list[list[Tensor]] = []
    for _ in range(num_updates):
        rows: list[Row] = []
        learning: list[Row] = []
        for index, group in enumerate(groups):
            logps = log_probs(model, group, temperature)
            old += [[each.detach() for each in logps]] if len(old) == index else []
            known = ref[index] or [None] * len(logps)
            for place, answer in enumerate(group.answers):
                detached = answer.is_off_policy and settings["off_policy_ratio"] == "detach"
                before = logps[place].detach() if detached else old[index][place]
                advantage = step.advantages[index][place]
                rows.append(Row(logps[place], before, known[place], advantage, answer.is_off_policy))
            learning += rows[-len(logps) :] if teaches[index] else []
        loss = whole_loss(rows, method, settings)
        model.zero_grad()
        loss.backward()
        step.gradients.append({name: parameter.grad.clone() for name, parameter in optimizer.parameters.items()})
        step.grad_norms.append(float(torch.stack([each.norm() for each in step.gradients[-1].values()]).norm()))
        optimizer.step(step.gradients[-1], settings["learning_rate"])
        step.metrics = described(learning, settings) | {
            "loss": float(loss.detach()),
            "batch/num_tokens": sum(group.num_tokens(settings["packing"]) for group in teaching),
            "batch/skipped_share": 1 - len(teaching) / len(groups),
            "optim/learning_rate": settings["learning_rate"],
            "optim/grad_norm": max(step.grad_norms),
        }
    return step
