"""Seconds of a step from what `bench/gpu.py` measured on one GPU, for `tempsamp_fast.plan --measured FILE`.

The file of a rehearsal (`make rehearse`) serves as well; its figures are simulated, and are called so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempsamp_fast.config import Config, ModelConfig
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.planning.estimate import Work, update_flops
from tempsamp_fast.system.files import read_json

SAMPLED_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
"""Whose shape the section `rollout` of bench/gpu.py samples from."""
ASSUMPTIONS = (
    "updates run at the FLOP/s measured for the row nearest in FLOPs; sampling takes the time measured for the next "
    "larger number of answers, their prompts included, times the ratios of answer lengths and of numbers of weights, "
    "and no less than its own prompts take at the FLOP/s of updates; the optimizer, traffic between GPUs, evaluations "
    "and checkpoints take no time, videos are decoded meanwhile"
)


@dataclass(frozen=True)
class Update:
    """A measured forward and backward pass over one packed row."""

    label: str
    flops: float
    """Three times those of the forward pass, recomputation not counted."""
    seconds: float
    mfu: float | None
    is_recomputed: bool


@dataclass(frozen=True)
class Sampling:
    """Measured sampling of `num_answers` answers of `answer_len` tokens each, from their prompts' pixels on."""

    label: str
    num_answers: int
    answer_len: float
    seconds: float
    has_cuda_graphs: bool


@dataclass(frozen=True)
class Measured:
    """The figures of one GPU that a forecast is made from."""

    file: Path
    gpu: str
    updates: tuple[Update, ...]
    samplings: tuple[Sampling, ...]
    is_simulated: bool = False
    """Whether no GPU ran: the file is a rehearsal's."""


@dataclass(frozen=True)
class Forecast:
    """Of one device's share of a step, and which measured rows it was made from."""

    update_s: float
    sampling_s: float
    labels: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.update_s + self.sampling_s


def read_measured(file: Path) -> Measured:
    """The sections `update` and `rollout` of a results file of bench/gpu.py.

    Raises ValueError naming a file that cannot be read or lacks a figure of either section.
    """
    try:
        document = read_json(file)
        rows = {name: document["sections"].get(name, {"rows": []})["rows"] for name in ("update", "rollout")}
        updates = tuple(_update(row) for row in rows["update"] if row["label"].endswith(" packed") and "ms" in row)
        found = [(row, re.fullmatch(r"\d+ prompts ours(, graphs)?", row["label"])) for row in rows["rollout"]]
        samplings = tuple(_sampling(row, bool(match[1])) for row, match in found if match and "ms" in row)
        gpu, is_simulated = str(document["gpu"]), bool(document.get("simulated"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"--measured {file}: not a results file of bench/gpu.py: {error!r}") from error
    for name, figures in (("update", updates), ("rollout", samplings)):
        if not figures:
            raise ValueError(
                f"--measured {file}: has no figures of the section {name}; run bench/gpu.py --section {name}"
            )
    return Measured(file, gpu, updates, samplings, is_simulated)


def _update(row: dict[str, Any]) -> Update:
    return Update(row["label"], 1e12 * row["tflop"], row["ms"] / 1e3, row["mfu"], " recomputed" in row["label"])


def _sampling(row: dict[str, Any], has_cuda_graphs: bool) -> Sampling:
    answer_len, seconds = row["tokens_per_s"] / row["rollouts_per_s"], row["ms"] / 1e3
    return Sampling(row["label"], round(row["rollouts_per_s"] * seconds), answer_len, seconds, has_cuda_graphs)


def forecast(measured: Measured, work: Work, shape: Any, config: Config, method: str, num_prompts: int) -> Forecast:
    """Under `ASSUMPTIONS`. shape: the model's transformers configuration. num_prompts: of this device and step."""
    one_row = 3 * work.forward_flops(work.num_answers, shape)
    nearest = min(
        measured.updates,
        key=lambda each: (
            each.is_recomputed != config.model.gradient_checkpointing,
            abs(math.log(each.flops / one_row)),
        ),
    )
    update_s = update_flops(work, shape, config.algorithm, method, num_prompts) * nearest.seconds / nearest.flops
    num_answers = num_prompts * work.num_sampled
    if num_answers == 0:
        return Forecast(update_s, 0.0, (nearest.label,))
    sampling = min(
        measured.samplings,
        key=lambda each: (
            each.has_cuda_graphs != (config.rollout.cuda_graphs is not False),
            each.num_answers < num_answers,
            abs(each.num_answers - num_answers),
        ),
    )
    own, theirs = (
        count_parameters(model_config(model), model).total for model in (config.model, ModelConfig(model=SAMPLED_MODEL))
    )
    batches = max(1.0, num_answers / sampling.num_answers)
    sampling_s = sampling.seconds * batches * work.answer_len / sampling.answer_len * own / theirs
    prompts_s = num_prompts * work.forward_flops(0, shape) * nearest.seconds / nearest.flops
    return Forecast(update_s, max(sampling_s, prompts_s), (nearest.label, sampling.label))


def describe(measured: Measured, forecasts: list[Forecast]) -> str:
    """Where the forecasts come from and what they assume, in one line."""
    mfu = {update.label: update.mfu for update in measured.updates}
    labels = list(dict.fromkeys(label for each in forecasts for label in each.labels))
    rows = [f"{label!r}" + (f" (MFU {mfu[label]:.2f})" if mfu.get(label) else "") for label in labels]
    how = "simulated, not measured: " if measured.is_simulated else ""
    return f"{how}expected from {measured.file} ({measured.gpu}), rows {', '.join(rows)}; assuming that {ASSUMPTIONS}"
