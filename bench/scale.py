"""Ranks against one, counted: `python bench/scale.py [--only WHAT]` -> bench/results/scale.json, on CPUs with gloo.

* `losses`: the recorded answers of a run of one rank, learned from by 2 and 4 ranks under every ZeRO stage.
* `traffic`: bytes that a step sends, counted, against what `tempsamp_fast.planning.network` foretells.
* `rollouts`: gathers of the weights in a rollout under ZeRO-3.
* `balance`: tokens of four ranks with very different videos.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from bench.fault_campaign.children import World, start
from bench.traffic import Traffic
from tempsamp_fast import train
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Prompt, RolloutGroup
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.planning.estimate import Work
from tempsamp_fast.planning.network import step_messages
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import PhaseStep
from tempsamp_fast.system.device import free_port

RESULTS = Path(__file__).parent / "results/scale.json"
STEPS = {
    "phases": "sft:5,tempsamp:15",
    "shaping": "anchor",
    "learning_rate": 1e-4,
    "save_steps": 0,
    "eval_start": False,
}
COMPARED = ("loss", "policy/entropy", "policy/kl", "optim/grad_norm", "reward/on_policy_mean")
PROMPTS = 4
"""Of a step, of all ranks."""


def counting(words: list[str]) -> None:
    """The trainer, writing what each phase of each step said to other ranks to `<output_dir>_<rank>.json`."""
    seen: list[dict[str, Any]] = []

    def counted(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run_counted(run: Run, at: PhaseStep, given: Sequence[Prompt] | Sequence[RolloutGroup]) -> Any:
            with Traffic() as traffic:
                result = method(run, at, given)
            figures = {"calls": dict(traffic.calls), "bytes": dict(traffic.bytes), "sent": traffic.sent}
            seen.append({"step": at.step, "phase": phase, **figures})
            return result

        return run_counted

    Run.answer = counted("rollout", Run.answer)  # type: ignore[method-assign]
    Run.update = counted("update", Run.update)  # type: ignore[method-assign]
    train.main(words)
    folder = parse_args(words).train.output_dir
    Path(f"{folder}_{os.environ['RANK']}.json").write_text(json.dumps(seen))


def ranks(number: int, run: Path, words: list[str], main: Callable[[list[str]], object] = train.main) -> list[dict]:
    """The metrics of a run on so many ranks; raises RuntimeError with what they said when one fails."""
    port = free_port()
    logs = [run.with_suffix(f".{rank}.log") for rank in range(number)]
    children = [start(words, log, rank=rank, world_size=number, port=port, main=main) for rank, log in enumerate(logs)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError("\n".join(log.read_text()[-2000:] for log in logs))
    return read_metrics(run)


def distance(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each figure over all steps."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if "loss" in b]
    return {
        name: max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for a, b in pairs if name in b) for name in COMPARED
    }


def losses(world: World, work: Path) -> dict[str, Any]:
    recorded = work / "answers.jsonl"
    flags = world.flags(work / "one", **STEPS, gradient_accumulation_steps=PROMPTS, record_rollouts=recorded)
    expected = ranks(1, work / "one", flags)
    found = {}
    for number in (1, 2, 4):
        for stage in range(4):
            name = f"{number} ranks, ZeRO {stage}"
            run = work / name.replace(" ", "_")
            settings = STEPS | {"gradient_accumulation_steps": PROMPTS // number, "zero_stage": stage}
            rows = ranks(number, run, world.flags(run, **settings, replay_rollouts=recorded))
            found[name] = distance(rows, expected)
            print(name, found[name], flush=True)
    return {"steps": len(expected), "largest relative difference": found}


TRAFFIC_CASES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 2, in every row": {"zero_stage": 2, "reduce_gradients": "row"},
    "ZeRO 3": {"deepspeed_config": {"stage3_param_persistence_threshold": 0}},
    "ZeRO 3, no weight stays for the backward pass": {
        "deepspeed_config": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    },
}


def traffic(world: World, work: Path) -> dict[str, Any]:
    """Of the last of four steps: by then DeepSpeed has seen what a step reads."""
    found = {}
    for number in (2, 4):
        for name, settings in TRAFFIC_CASES.items():
            run = work / f"{number}_{name.replace(' ', '_').replace(',', '')}"
            given = dict(settings)
            if "deepspeed_config" in given:
                file = run.with_suffix(".deepspeed.json")
                file.write_text(json.dumps({"zero_optimization": {"stage": 3, **given["deepspeed_config"]}}))
                given["deepspeed_config"] = file
            steps = STEPS | {"phases": "grpo:4", "gradient_accumulation_steps": 3, "prompts_per_device": 1}
            words = world.flags(run, **(steps | {"shaping": "grpo"}), **given)
            ranks(number, run, words, counting)
            counted = [row for row in json.loads(Path(f"{run}_0.json").read_text()) if row["step"] == 3]
            sent = sum(row["sent"] for row in counted)
            config = parse_args(words)
            shape = model_config(config.model)
            prompt = Work((0, 0, 0), 0, int(world_settings(config)), 3, 3)
            messages = step_messages(prompt, count_parameters(shape, config.model), config, 4, 3)
            planned = sum(each.sent(number) for each in messages)
            case = found[f"{number} ranks, {name}"] = {
                "counted": sent,
                "planned": planned,
                "counted over planned": sent / planned,
                "by phase": {row["phase"]: {"calls": row["calls"], "bytes": row["bytes"]} for row in counted},
            }
            print(number, name, case["counted over planned"], flush=True)
    return found


def world_settings(config: Any) -> int:
    """Tokens of an answer."""
    return config.rollout.max_completion_length


def rollouts(world: World, work: Path) -> dict[str, Any]:
    """Bytes gathered in a rollout under ZeRO-3, in units of all weights."""
    found = {}
    for gather in ("rollout", "layer"):
        run = work / f"rollouts_{gather}"
        words = world.flags(run, **(STEPS | {"phases": "grpo:3", "zero_stage": 3, "gather_weights": gather}))
        ranks(2, run, words, counting)
        rows = [row for row in json.loads(Path(f"{run}_0.json").read_text()) if row["phase"] == "rollout"]
        config = parse_args(words)
        whole = 4 * count_parameters(model_config(config.model), config.model).total
        found[gather] = [
            {"weights gathered": row["bytes"].get("all_gather", 0) / whole, "calls": row["calls"]} for row in rows
        ]
    return found


def balance(world: World, work: Path) -> dict[str, Any]:
    """Idle share of four ranks over steps of clips of 2 to 60 s, and of the same steps undealt."""
    from tempsamp_fast.embedded.videos import SyntheticConfig, generate

    clips = generate(
        work / "uneven",
        SyntheticConfig(num_train=24, num_val=0, num_test=1, min_duration_s=3.0, max_duration_s=60.0, sizes=("64x48",)),
        num_workers=1,
    )
    found = {}
    for per_device in (1, 2, 4):
        run = work / f"balance_{per_device}"
        given = {"annotations": clips / "annotations/train.json", "videos": clips / "videos", "max_eval_samples": 0}
        steps = STEPS | {"phases": "grpo:6", "shaping": "grpo", "beta": 0.04, "zero_stage": 2, "max_frames": 60}
        words = world.flags(run, **(steps | given), prompts_per_device=per_device, gradient_accumulation_steps=1)
        rows = ranks(4, run, [word for word in words if not word.startswith("--eval_annotations")])
        found[f"{per_device} prompts a rank"] = fmean(row["batch/idle_share"] for row in rows)
    return found


SECTIONS: dict[str, Callable[[World, Path], dict[str, Any]]] = {
    "rollouts": rollouts,
    "traffic": traffic,
    "balance": balance,
    "losses": losses,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    world = World(work / "world")
    world.make()
    for name in options.only:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = SECTIONS[name](world, work)
        RESULTS.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
