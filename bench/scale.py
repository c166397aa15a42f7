"""Ranks against one, counted: `python bench/scale.py [--only WHAT]` -> bench/results/scale.json, on CPUs with gloo.

* `losses`: the recorded answers of a run of one rank, learned from by 2 and 4 ranks under every ZeRO stage.
* `traffic`: bytes that a step sends, counted, against what `tempsamp_fast.planning.network` foretells.
* `rollouts`: gathers of the weights in a rollout under ZeRO-3.
* `balance`: tokens of four ranks with very different videos.
* `sequence`: rows that ranks share, in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from bench.fault_campaign.children import World, fresh, start
from bench.traffic import Traffic
from tempsamp_fast import train
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Prompt, RolloutGroup
from tempsamp_fast.embedded.videos import SyntheticConfig, generate
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.plan import decided
from tempsamp_fast.planning.estimate import Work
from tempsamp_fast.planning.network import step_messages
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import PhaseStep
from tempsamp_fast.system.device import free_port
from tempsamp_fast.system.files import remove_any

RESULTS = Path(__file__).parent / "results/scale.json"
STEPS = {
    "phases": "sft:5,tempsamp:15",
    "shaping": "anchor",
    "learning_rate": 1e-4,
    "save_steps": 0,
    "eval_start": False,
}
COMPARED = ("loss", "policy/entropy", "policy/kl", "optim/grad_norm", "reward/on_policy_mean")
Cases = Iterator[tuple[str, Any]]
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


def run_ranks(number: int, run: Path, words: list[str], main: Callable[[list[str]], object]) -> None:
    """Raises RuntimeError with what they said when one fails."""
    port = free_port()
    logs = [run.with_suffix(f".{rank}.log") for rank in range(number)]
    children = [start(words, log, rank=rank, world_size=number, port=port, main=main) for rank, log in enumerate(logs)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError("\n".join(log.read_text()[-2000:] for log in logs))


def ranks(number: int, run: Path, words: list[str], main: Callable[[list[str]], object] = train.main) -> list[dict]:
    """The metrics of a run on so many ranks."""
    run_ranks(number, run, words, main)
    return read_metrics(run)


def distance(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each figure over all steps."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if "loss" in b]
    return {
        name: max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for a, b in pairs if name in b) for name in COMPARED
    }


def losses(world: World, work: Path, known: Container[str]) -> Cases:
    """Largest relative differences over twenty steps."""
    recorded, one = work / "answers.jsonl", work / "one"
    if not (one / "checkpoints").exists():
        for path in (one, recorded):
            remove_any(path)
        ranks(1, one, world.flags(one, **STEPS, gradient_accumulation_steps=PROMPTS, record_rollouts=recorded))
    expected = read_metrics(one)
    for number, together, stage in LOSS_CASES:
        name = f"{number} ranks, ZeRO {stage}, {together} for a row"
        if name not in known:
            run = fresh(work / name.replace(" ", "_").replace(",", ""))
            settings = STEPS | {"gradient_accumulation_steps": PROMPTS // number, "zero_stage": stage}
            settings |= {"sequence_parallel_size": together, "replay_rollouts": recorded}
            yield name, distance(ranks(number, run, world.flags(run, **settings)), expected)


LOSS_CASES = [
    (number, together, stage) for number, together in ((2, 1), (2, 2), (4, 1), (4, 2), (1, 1)) for stage in (2, 3, 0, 1)
]
"""Ranks, of which so many share each row, and ZeRO's stage."""
TRAFFIC_CASES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 2, in every row": {"zero_stage": 2, "reduce_gradients": "row"},
    "ZeRO 3": {"deepspeed_config": {"stage3_param_persistence_threshold": 0}},
    "ZeRO 3, no weight stays for the backward pass": {
        "deepspeed_config": {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    },
}


def traffic(world: World, work: Path, known: Container[str]) -> Cases:
    """Of the last of four steps: by then DeepSpeed has seen what a step reads."""
    for number in (2, 4):
        for kind, settings in TRAFFIC_CASES.items():
            name = f"{number} ranks, {kind}"
            if name in known:
                continue
            run, given = fresh(work / name.replace(" ", "_").replace(",", "")), dict(settings)
            if "deepspeed_config" in given:
                file = run.with_suffix(".deepspeed.json")
                file.write_text(json.dumps({"zero_optimization": {"stage": 3, **given["deepspeed_config"]}}))
                given["deepspeed_config"] = file
            steps = STEPS | {"phases": "grpo:4", "shaping": "grpo", "gradient_accumulation_steps": 3}
            words = world.flags(run, **steps, **given)
            ranks(number, run, words, counting)
            counted = [row for row in json.loads(Path(f"{run}_0.json").read_text()) if row["step"] == 3]
            sent = sum(row["sent"] for row in counted)
            config = decided(parse_args(words), number)
            prompt = Work((0, 0, 0), 0, config.rollout.max_completion_length, 3, 3)
            parameters = count_parameters(model_config(config.model), config.model)
            planned = sum(each.sent(number) for each in step_messages(prompt, parameters, config, 4, 3))
            by_phase = {row["phase"]: {"calls": row["calls"], "bytes": row["bytes"]} for row in counted}
            yield name, {"counted": sent, "planned": planned, "ratio": sent / planned, "by phase": by_phase}


def rollouts(world: World, work: Path, known: Container[str]) -> Cases:
    """Bytes gathered in the rollouts of three steps under ZeRO-3, in units of all weights."""
    for gather in ("rollout", "layer"):
        if gather not in known:
            run = fresh(work / f"rollouts_{gather}")
            steps = STEPS | {"phases": "grpo:3", "shaping": "grpo", "gradient_accumulation_steps": 1}
            words = world.flags(run, **steps, zero_stage=3, gather_weights=gather)
            ranks(2, run, words, counting)
            rows = [row for row in json.loads(Path(f"{run}_0.json").read_text()) if row["phase"] == "rollout"]
            config = parse_args(words)
            whole = 4 * count_parameters(model_config(config.model), config.model).total
            figures = [{"weights": row["bytes"].get("all_gather", 0) / whole, "calls": row["calls"]} for row in rows]
            yield gather, figures


def balance(world: World, work: Path, known: Container[str]) -> Cases:
    """Mean idle share of four ranks over six steps of clips of 3 to 60 s."""
    clips = work / "uneven"
    if not (clips / "annotations").exists():
        lengths = {"min_duration_s": 3.0, "max_duration_s": 60.0}
        generate(
            clips, SyntheticConfig(num_train=24, num_val=0, num_test=1, sizes=("64x48",), **lengths), num_workers=1
        )
    for per_device in (1, 2, 4):
        name = f"{per_device} prompts a rank"
        if name not in known:
            run = fresh(work / f"balance_{per_device}")
            given = {"annotations": clips / "annotations/train.json", "videos": clips / "videos"}
            given |= {"prompts_per_device": per_device, "gradient_accumulation_steps": 1, "max_frames": 60}
            steps = STEPS | {"phases": "grpo:6", "shaping": "grpo", "zero_stage": 2, "max_eval_samples": 0}
            words = [word for word in world.flags(run, **steps, **given) if not word.startswith("--eval_annotations")]
            yield name, fmean(row["batch/idle_share"] for row in ranks(4, run, words))


def sequence(world: World, work: Path, known: Container[str]) -> Cases:
    """Relative errors of loss and gradients in float64 of rows that two and four ranks share."""
    from tests.model.sequence_worker import main as worker

    for number in (2, 4):
        name = f"{number} ranks"
        if name not in known:
            file = work / f"sequence_{number}.json"
            run_ranks(number, file.with_suffix(""), [str(file), "qwen2_5_vl", "qwen3_vl"], worker)
            errors = json.loads(file.read_text())
            yield name, {case: {"loss": pair[0], "gradients": pair[1]} for case, pair in errors.items()}


SECTIONS: dict[str, Callable[[World, Path, Container[str]], Cases]] = {
    "rollouts": rollouts,
    "sequence": sequence,
    "traffic": traffic,
    "balance": balance,
    "losses": losses,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--work", type=Path, help="kept, and used again")
    parser.add_argument("--go_on", action="store_true", help="leave cases out that the results have")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    world = World(work / "world")
    if not (world.model / "tokenizer.json").exists():
        world.make()
    for section in options.only:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = results.setdefault(section, {}) if options.go_on else {}
        for name, figures in SECTIONS[section](world, work, set(found)):
            print(section, name, str(figures)[:300], flush=True)
            found[name] = figures
            RESULTS.write_text(json.dumps(results | {section: found}, indent=1) + "\n")
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
