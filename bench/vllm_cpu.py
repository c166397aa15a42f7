"""vLLM itself on a CPU beside the policy: `python bench/vllm_cpu.py`, in the environment that `make test-vllm` makes.

Of each family a model of random weights answers greedily and sampled, before and after a change of its weights, and
vLLM's log-probs are compared with the policy's. Then sixty supervised and twenty TempSamp-R1 steps are run twice from
one seed, sampled by the policy and by vLLM: losses and evaluations must be equal until vLLM first samples, and rewards
within noise after it. Writes `bench/results/vllm_cpu.json`; exit code 1 where something does not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout runs without being installed

from tempsamp_fast.system.device import join_ranks, prepare_environment  # noqa: E402

prepare_environment()

import torch  # noqa: E402

from tempsamp_fast.arguments import parse_args  # noqa: E402
from tempsamp_fast.batch import Completion, Prompt, RolloutGroup  # noqa: E402
from tempsamp_fast.config import AlgorithmConfig  # noqa: E402
from tempsamp_fast.learning.loss import log_probs  # noqa: E402
from tempsamp_fast.model.packing import pack  # noqa: E402
from tempsamp_fast.rollout.answers import SampledAnswer  # noqa: E402
from tempsamp_fast.rollout.backends import PolicyBackend  # noqa: E402
from tempsamp_fast.rollout.generate import SamplingParams  # noqa: E402
from tempsamp_fast.run.run import Run  # noqa: E402
from tempsamp_fast.run.schedule import plan  # noqa: E402

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
NUM_SFT = 60
SETTINGS = {
    "phases": f"sft:{NUM_SFT}@2e-3,tempsamp:20@5e-4",
    "synthetic_videos": "24,2,4",
    "eval_modes": "answer",
    "max_eval_samples": "8",
    "prompts_per_device": "4",
    "sft_prompts_per_device": "8",
    "gradient_accumulation_steps": "1",
    "max_completion_length": "30",
    "seed": "7",
}
GREEDY = SamplingParams(temperature=0, max_completion_length=12)
SAMPLED = SamplingParams(temperature=0.9, max_completion_length=12)
LARGEST_GAP = 1e-5


def largest_gap(policy: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[SampledAnswer]]) -> float:
    """Between the log-probs that answers came with and those of the policy at temperature 1, over all their tokens."""
    gaps = []
    for prompt, group in zip(prompts, answers, strict=True):
        asked = RolloutGroup(prompt, [Completion(answer.ids, "") for answer in group])
        (row,) = pack([asked], config=policy.config, max_tokens_per_row=100_000)
        own = policy(row, log_probs(row, AlgorithmConfig(), 1.0))
        gaps.append((own - torch.cat([answer.logps for answer in group])).abs().max())
    return float(torch.stack(gaps).max())


def ids(answers: Sequence[Sequence[SampledAnswer]]) -> list[list[list[int]]]:
    return [[answer.ids.tolist() for answer in group] for group in answers]


@torch.no_grad()
def change_weights(engine: Any, by: float = 0.02) -> None:
    """What an optimizer step would do, at random."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn_like(parameter))
    engine.global_steps += 1


def agreement(engine: Any, chat: Any, backend: Any, prompts: Sequence[Prompt]) -> tuple[float, bool]:
    """The largest gap over greedy and sampled answers, and whether the greedy ones are the policy's."""
    own = PolicyBackend(engine, chat.end_token_ids, chat.banned_token_ids, 100_000)
    backend.sync_weights()
    greedy = backend.generate(prompts, 1, GREEDY, seed=(0,))
    sampled = backend.generate(prompts, 4, SAMPLED, seed=(0,))
    gap = max(largest_gap(engine.module, prompts, answers) for answers in (greedy, sampled))
    return gap, ids(greedy) == ids(own.generate(prompts, 1, GREEDY, seed=(0,)))


def compare_engines(family: str, work: Path) -> dict[str, Any]:
    """vLLM against the policy before and after a change of weights."""
    flags = {"phases": "sft:1", "tiny_family": family, "rollout_backend": "vllm", "max_eval_samples": "0"}
    flags |= {
        "synthetic_videos": "24,2,4",
        "synthetic_dir": str(work / "videos"),
        "output_dir": str(work / f"{family}"),
    }
    run = Run(parse_args([f"--{name}={value}" for name, value in flags.items()]))
    prompts = run.prompts(next(plan(run.phases)))
    torch.manual_seed(0)
    before, is_equal = agreement(run.engine, run.chat, run.backend, prompts)
    change_weights(run.engine)
    after, is_still_equal = agreement(run.engine, run.chat, run.backend, prompts)
    gaps = {"before": before, "after_a_weight_change": after}
    return {"logp_gap_max": gaps, "greedy_equal": is_equal and is_still_equal, "num_prompts": len(prompts)}


def train(backend: str, work: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Losses, rewards and gaps of a run by step, and its evaluations by name."""
    folder = work / backend
    flags = SETTINGS | {"rollout_backend": backend, "synthetic_dir": str(work / "videos"), "output_dir": str(folder)}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "tempsamp_fast/train.py", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"loss": "loss", "reward": "reward/on_policy_mean", "logp_gap": "rollout/logp_gap"}
    figures = {name: [row[key] for row in rows if key in row] for name, key in names.items()}
    return figures, {path.stem: path.read_text() for path in sorted((folder / "eval").glob("*.jsonl"))}


def main() -> int:
    join_ranks("gloo")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        engines = {family: compare_engines(family, work) for family in FAMILIES}
        runs, evaluations = {}, {}
        for backend in ("policy", "vllm"):
            runs[backend], evaluations[backend] = train(backend, work)
        machine = json.loads((work / "vllm/machine.json").read_text())
    own, other = runs["policy"], runs["vllm"]
    early = [name for name in evaluations["policy"] if name.startswith(("start", "1_sft"))]
    difference = fmean(other["reward"]) - fmean(own["reward"])
    noise = (sum(stdev(each["reward"]) ** 2 / len(each["reward"]) for each in (own, other))) ** 0.5
    holds = {
        "logp_gaps_within_limit": all(
            gap < LARGEST_GAP for each in engines.values() for gap in each["logp_gap_max"].values()
        ),
        "greedy_equal": all(each["greedy_equal"] for each in engines.values()),
        "sft_losses_equal": own["loss"][:NUM_SFT] == other["loss"][:NUM_SFT],
        "evaluations_equal_after_sft": all(evaluations["policy"][name] == evaluations["vllm"][name] for name in early),
        "rewards_within_noise": abs(difference) < 2 * noise,
    }
    packages = ("vllm-cpu", "torch", "transformers", "deepspeed")
    result = {
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
        "machine": machine,
        "settings": SETTINGS,
        "engines": engines,
        "runs": runs,
        "reward_difference": {"mean": difference, "standard_error": noise},
        "holds": holds,
    }
    (ROOT / "bench/results/vllm_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"engines": engines, "reward_difference": result["reward_difference"], "holds": holds}, indent=1))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
