"""Write the tables of README and docs/ from the committed results: `python bench/readme_tables.py`.

`--check` only compares.

`--demo DEMO...` first takes the results of runs of `make demo`, and draws docs/demo.png from the first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout runs without being installed

from bench.paper.plan import METHODS  # noqa: E402
from bench.paper.results import read_results  # noqa: E402
from bench.paper.summary import final, paired, percent, points, records  # noqa: E402
from tempsamp_fast.arguments import parse_args  # noqa: E402
from tempsamp_fast.data.frame_folder import thumbnails  # noqa: E402
from tempsamp_fast.demo.__main__ import METRICS  # noqa: E402
from tempsamp_fast.plan import decided, describe_plan  # noqa: E402
from tempsamp_fast.planning.forecast import read_measured  # noqa: E402
from tempsamp_fast.planning.network import Network  # noqa: E402
from tempsamp_fast.planning.subject import peak_memory, with_stage  # noqa: E402
from tempsamp_fast.report.plots import eval_files, plot_timeline, read_rows  # noqa: E402
from tempsamp_fast.report.runs import interval  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = Path(__file__).parent / "results"
PLANNED = {
    "charades_qwen2_5_vl_7b": ["--config", "charades_qwen2_5_vl_7b"],
    "charades_qwen3_5_4b": ["--config", "charades_qwen3_5_4b"],
    "the same, Qwen3.5-9B": ["--config", "charades_qwen3_5_4b", "--model", "Qwen/Qwen3.5-9B"],
}


def demo_table() -> str:
    """What `make demo` prints with seed 0, and what its seeds come to together."""
    if not (RESULTS / "demo.json").exists():
        return "No run of it is committed yet."
    demo = json.loads((RESULTS / "demo.json").read_text())
    first, goals = demo["runs"][0], demo_goals(demo["runs"])
    lines = [f"| after | mode | {' | '.join(METRICS.values())} |", "|---|---|---|---|---|---|---|"]
    for row in first["rows"]:
        figures = " | ".join(f"{100 * row[name][0]:.1f} ± {100 * row[name][1]:.1f}" for name in METRICS)
        lines.append(f"| {row['after']} | {row['mode']} | {figures} |")
    seeds = ", ".join(str(run["seed"]) for run in demo["runs"])
    said = [f"{label} {100 * value:+.1f} (goal {100 * goal:+.1f})" for label, value, goal in goals]
    count = f"Seed {first['seed']}, {first['num_queries']} held-out queries, in per cent, ± 95 % over queries."
    return "\n".join([*lines, "", f"{count} In the mean of seeds {seeds}, points: {'; '.join(said)}."])


def demo_goals(runs: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """What the demo is to show, what it shows in the mean of the runs, and the least that was asked for."""

    def mean(first: str, over: str, metric: str) -> float:
        found = [
            row[metric][0] for run in runs for row in run["differences"] if (row["first"], row["over"]) == (first, over)
        ]
        return statistics.mean(found)

    parsed = [row["parse_rate"][0] for run in runs for row in run["rows"] if row["after"] == "TempSamp-R1, thinking"]
    return [
        ("mIoU of TempSamp-R1 over the constant", mean("TempSamp-R1", "constant", "miou"), 0.15),
        ("over GRPO", mean("TempSamp-R1", "GRPO", "miou"), 0.04),
        ("its R1@0.7 over GRPO's", mean("TempSamp-R1", "GRPO", "r1@0.7"), 0.08),
        ("thinking, mIoU over the start's", mean("TempSamp-R1, thinking", "start", "miou"), 0.05),
        ("answers that parse", statistics.mean(parsed), 0.97),
    ]


STEP_ROWS = {
    "update_packed_against_one_row_per_completion[P830-C48-G5]": "update, prompt 830, 5 answers of 48: one row each",
    "update_packed_against_one_row_per_completion[P2110-C64-G9]": "update, prompt 2110, 9 answers of 64: one row each",
    "tree_update_against_one_fork_per_question": "update, four questions about a video: one row a question",
    "tree_update_against_one_row_per_completion": "update, four questions about a video: one row an answer",
    "rollout_against_generate": "rollout: `generate(num_return_sequences=5)`",
    "tree_rollout_against_one_prefill_per_question": "rollout, four questions about a video: one prefill each",
    "tree_evaluation_against_one_prefill_per_question": "evaluation, four questions about a video: one prefill each",
    "hybrid_update_packed_against_one_row_per_completion[P830-C48-G5]": "Qwen3.5: update, prompt 830, 5 of 48",
    "hybrid_update_packed_against_one_row_per_completion[P2110-C64-G9]": "Qwen3.5: update, prompt 2110, 9 of 64",
    "hybrid_rollout_against_generate": "Qwen3.5: rollout: `generate(num_return_sequences=5)`",
    "step_against_a_plain_huggingface_step": "whole step: TimeZero-style, of Hugging Face parts",
    "step_against_trl": "whole step on text: TRL's `GRPOTrainer`",
}
VIDEO_ROWS = {
    "one_core[h264_360p]": "H.264 360p",
    "one_core[h264_720p]": "H.264 720p",
    "one_core[h264_1080p]": "H.264 1080p",
    "one_core[h264_1080p_coarse_grain]": "H.264 1080p, fewer B-frames",
    "one_core[h264_720p_no_b_frames]": "H.264 720p without B-frames",
    "one_core[hevc_720p]": "HEVC 720p",
    "one_core[vp9_720p]": "VP9 720p",
    "one_core[av1_720p]": "AV1 720p",
}


def _ratio_table(file: str, title: str, rows: dict[str, str]) -> str:
    results = json.loads((RESULTS / file).read_text())["results"]
    lines = [f"| {title} | times faster | spread | goal |", "|---|---|---|---|"]
    for name, label in rows.items():
        ratio, (least, most), goal = (results[name][key] for key in ("ratio", "spread", "goal"))
        lines.append(f"| {label} | {ratio:.2f} | {least:.2f} to {most:.2f} | {goal:.2f} |")
    return "\n".join(lines)


def step_table() -> str:
    """The parts of a step against what users run otherwise, on a CPU."""
    memory = json.loads((RESULTS / "step_cpu.json").read_text())["results"]["peak_memory_of_the_update"]["ratio"]
    table = _ratio_table("step_cpu.json", "against", STEP_ROWS)
    return table + f"\n\nAt 8 answers the update needs {100 * memory:.0f} % of the memory of one row for each."


def headline_table() -> str:
    """Three ratios, each with the command that makes it."""
    lines = ["| | times faster | spread | command |", "|---|---|---|---|"]
    for label, file, name in HEADLINES:
        result = json.loads((RESULTS / file).read_text())["results"][name]
        least, most = result["spread"]
        command = f"pytest bench/bench_{file.replace('_cpu.json', '.py')} -k {name.partition('[')[0]}"
        lines.append(f"| {label} | {result['ratio']:.1f} | {least:.1f} to {most:.1f} | `{command}` |")
    return "\n".join(lines)


HEADLINES = [
    ("a whole step, against one as TimeZero takes it", "step_cpu.json", "step_against_a_plain_huggingface_step"),
    (
        "four questions about a video, against a row an answer",
        "step_cpu.json",
        "tree_update_against_one_row_per_completion",
    ),
    ("file to frames (H.264), against the faster of torchcodec and decord", "video_cpu.json", "one_core[h264_360p]"),
]


def card_table() -> str:
    """What a card of 24 GB can train, by the plan."""
    lines = ["| on one card of 24 GB, videos of 3,500 tokens, by the plan (not measured) | memory |", "|---|---|"]
    for model in CARD_MODELS:
        config = parse_args(["--config", "own_videos", "--model", model, "--lora_rank", "16", "--zero_stage", "0"])
        total = peak_memory(config, 1).total / 2**30
        verdict = f"{total:.1f} GiB" + ("" if total < CARD_GIB else ": does not fit")
        lines.append(f"| `--model {model} --lora_rank 16` | {verdict} |")
    return "\n".join(lines)


CARD_MODELS = (
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)
CARD_GIB = 22
"""What such a card leaves to a program."""


def video_table() -> str:
    """File to patches on one core against the fastest of torchcodec and decord, and the corpus of hostile files."""
    corpus = json.loads((RESULTS / "video_corpus.json").read_text())
    solved = {"ours": corpus["solved"]["tempsamp_native"]}
    solved |= {name: number for name, number in corpus["solved"].items() if not name.startswith("tempsamp_")}
    count = f"Of {corpus['num_files']} damaged or odd files, returned right or refused with a reason: "
    count += ", ".join(f"{name} {number}" for name, number in solved.items()) + "."
    return _ratio_table("video_cpu.json", "file to patches, one core", VIDEO_ROWS) + f"\n\n{count}"


def paper_table() -> str:
    """Every method's scores on the embedded data, and what each differs from GRPO, paired by seed."""
    results = read_results(RESULTS / "paper_in_small.json")
    grpo = records(results, "core", "grpo")
    lines = ["| method | seeds | mIoU | R1@0.7 | mIoU over GRPO, points |", "|---|---|---|---|---|"]
    for method in METHODS:
        found = records(results, "core", method)
        scores = [percent(interval([final(run, metric) for run in found.values()])) for metric in ("miou", "r1@0.7")]
        over = "-" if method == "grpo" else points(paired(found, grpo, lambda run: final(run, "miou")))
        lines.append(f"| {method} | {len(found)} | {' | '.join(scores)} | {over} |")
    count = (
        f"{results['num_queries']} held-out queries, 95 % intervals over seeds; {results['done']} of the campaign's "
    )
    return "\n".join([*lines, "", f"{count}{results['planned']} runs are in (`bench/results/paper_in_small.md`)."])


def plan_table() -> str:
    """Estimated memory of recipes, by number of GPUs and ZeRO stage."""
    lines = ["| recipe | GPUs | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 |", "|---|---|---|---|---|---|"]
    for name, words in PLANNED.items():
        for num_gpus in (1, 4, 8, 64):
            config = decided(parse_args(words), num_gpus)
            totals = [peak_memory(with_stage(config, stage), num_gpus).total / 2**30 for stage in range(4)]
            lines.append(f"| {name} | {num_gpus} | " + " | ".join(f"{total:.0f} GiB" for total in totals) + " |")
    note = (
        "Estimates with answers as long as they may be, gradients summed once a step (`--reduce_gradients row` shares "
    )
    return "\n".join([*lines, "", f"{note}those of ZeRO-2 out), not measured."])


def scale_table() -> str:
    """What steps are predicted to take on many GPUs, from the figures of a simulated one."""
    lines = ["| GPUs | ZeRO | rollout s | update s | waiting s | network s | step s | efficiency |", "|---" * 8 + "|"]
    measured = read_measured(RESULTS / "rehearsal.json")
    for name, network in (("", Network()), (", network of 3 GB/s a GPU", Network(network_gbs=3.0))):
        for stage in ("2", "3"):
            config = decided(parse_args(["--config", "charades_qwen2_5_vl_7b", "--zero_stage", stage]), MOST_GPUS)
            plan = describe_plan(config, MOST_GPUS, measured=measured, network=network)
            answering = plan.partition("phase    tempsamp/think")[0]
            table = re.findall(r"^ +(\d+)" + r" +([\d.]+)" * 5 + r" +(\d+ %)$", answering, re.MULTILINE)
            for gpus, *figures in table[-1:] if name else table:
                lines.append(f"| {gpus}{name} | {stage} | {' | '.join(figures)} |")
    return "\n".join(lines)


MOST_GPUS = 512


def gpu_table(results: Path = RESULTS) -> str:
    """What reached its goal or missed it on each GPU, by the files that bench/gpu.py leaves in `results`."""
    lines = []
    for file in sorted(results.glob("nvidia_*.json")):
        document = json.loads(file.read_text())
        lines += [f"| {document['gpu']} | figure | goal | commit |", "|---|---|---|---|"]
        for name, section in document["sections"].items():
            commit = (section["commit"] or "unknown")[:7]
            lines += [
                f"| {name}: {row['label']} | {figure} {_shown(row[figure])} | {kind} {_shown(bound)} | {commit} |"
                for row in section["rows"]
                for figure, (kind, bound) in row.get("goals", {}).items()
            ]
        failed = [name for name, section in document["sections"].items() if section["error"]]
        lines += ["", f"Parts of {', '.join(failed)} failed there: the file says which.", ""] if failed else [""]
    return "\n".join(lines[:-1]) if lines else NO_GPU


NO_GPU = "No figure of a GPU exists yet: `bench/GPU_TODO.md` lists the commands that will make them."


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


Place = tuple[str, str, str]
"""Section, label and figure of a row that bench/gpu.py leaves."""
UPDATE = "C=32 G=8 packed"
REHEARSED: dict[str, tuple[tuple[str, ...], Place | None]] = {
    "update 3B, one prompt, 8 answers of 32: MFU": (
        ("3B", "update", UPDATE, "mfu_cautious"), ("update", f"3B {UPDATE}", "mfu"),
    ),
    "the same, times one row per answer": (
        ("3B", "update", UPDATE, "over_unpacked"), ("update", f"3B {UPDATE}", "over_unpacked"),
    ),
    "update 3B, 8 answers of 256: MFU": (
        ("3B", "update", "C=256 G=8 packed", "mfu_cautious"), ("update", "3B C=256 G=8 packed", "mfu"),
    ),
    "update 7B, 8 answers of 32: MFU": (
        ("7B", "update", UPDATE, "mfu_cautious"), ("update", f"7B {UPDATE}", "mfu"),
    ),
    "update Qwen3-VL-8B, 8 answers of 32: MFU": (("Qwen3-VL-8B", "update", UPDATE, "mfu_cautious"), None),
    **{
        f"decoding 3B, {name} x 8, ms a token": (
            ("3B", "rollout", f"{number} prompts, graphs", "decode_ms_per_token"),
            ("rollout", f"{number} prompts ours, graphs", "decode_ms_per_token"),
        )
        for number, name in ((1, "1 prompt"), (8, "8 prompts"), (32, "32 prompts"))
    },
    "step 3B, one prompt, 8 answers of 32: rollouts a second": (
        ("3B", "step C=32", "rollouts_per_s"), ("step", "video, G=8, ours", "rollouts_per_s"),
    ),
    "the same: times a TimeZero-style step": (
        ("3B", "step C=32", "step_over_timezero"), ("step", "video, G=8, ours", "over_plain_step"),
    ),
    "step 3B, 8 answers of 128: times a TimeZero-style step": (("3B", "step C=128", "step_over_timezero"), None),
    "3B, a row of 100,276 tokens on one GPU: GiB of weights, gradients and activations": (
        ("3B", "long row, 1 ranks", "peak_gib"), None,
    ),
    "the same row shared by 8 GPUs: GiB on each": (("3B", "long row, 8 ranks", "peak_gib"), None),
}  # fmt: skip
"""Where each figure stands in a rehearsal's results, and in those of a card if it is measured there."""


def rehearsal_table(results: Path = RESULTS) -> str:
    """What the rehearsal of the GPU path says, beside what the cards said whose files lie in `results`."""
    models = json.loads((RESULTS / "rehearsal.json").read_text())["models"]
    cards = [json.loads(file.read_text()) for file in sorted(results.glob("nvidia_*.json"))]
    names = [card["gpu"] for card in cards] or ["a card"]
    lines = [f"| figure | what the simulation says | {' | '.join(f'what {name} said' for name in names)} |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for label, (path, place) in REHEARSED.items():
        value: Any = models
        for name in path:
            value = value.get(name, {})
        said = [_said(card, place) for card in cards] or ["-"]
        lines.append(f"| {label} | {value if value else 'not played'} | {' | '.join(said)} |")
    return "\n".join([*lines, "", "Simulated for an H100 by `make rehearse` at cautious rates, not measured."])


def _said(card: dict[str, Any], place: Place | None) -> str:
    """A figure of a card's results; `-` for one that is not there."""
    section, label, figure = place or ("", "", "")
    rows = card["sections"].get(section, {"rows": []})["rows"]
    return next((_shown(row[figure]) for row in rows if row["label"] == label and figure in row), "-")


TABLES = {
    "headline": headline_table,
    "card": card_table,
    "demo": demo_table,
    "paper": paper_table,
    "step": step_table,
    "video": video_table,
    "plan": plan_table,
    "scale": scale_table,
    "gpu": gpu_table,
    "rehearsal": rehearsal_table,
}


def take_demo(demos: Sequence[Path]) -> None:
    """Keep what runs of `make demo` measured, and on what."""
    found = [json.loads((demo / "demo.json").read_text()) for demo in demos]
    machine = json.loads((demos[0] / "tempsamp/machine.json").read_text())
    kept = {"runs": found, **{name: machine[name] for name in ("versions", "platform", "devices", "commit")}}
    (RESULTS / "demo.json").write_text(json.dumps(kept, indent=1) + "\n")


def draw_demo(demo: Path) -> None:
    """Frames of the held-out video at the 95th percentile of TempSamp-R1's gain over GRPO, and what both answered."""
    by_arm = {arm: read_rows(eval_files(demo / arm, "answer")[1]) for arm in ("grpo", "tempsamp")}
    pairs = sorted(zip(*by_arm.values(), strict=True), key=lambda pair: pair[1]["iou"] - pair[0]["iou"])
    grpo, tempsamp = pairs[95 * len(pairs) // 100]
    duration_s = grpo["duration_s"]
    times_s = [duration_s * (index + 0.5) / 10 for index in range(10)]
    spans = {"true": grpo["windows"][0], "GRPO": grpo["span"], "TempSamp-R1": tempsamp["span"]}
    pictures = thumbnails(grpo["video"], times_s, height=96)
    plot_timeline(pictures, times_s, duration_s, spans, grpo["query"], ROOT / "docs/demo.png")


def filled(text: str) -> str:
    """A page with every `<!-- NAME table -->` ... `<!-- end -->` block of it made anew."""
    block = re.compile(r"(<!-- (\w+) table -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    parser.add_argument("--demo", type=Path, nargs="+", metavar="DEMO")
    options = parser.parse_args()
    if options.demo:
        take_demo(options.demo)
        draw_demo(options.demo[0])
    texts = {page: page.read_text() for page in PAGES}
    stale = {page: wanted for page, text in texts.items() if (wanted := filled(text)) != text}
    if options.check:
        print(*stale, sep="\n")
        return int(bool(stale))
    for page, wanted in stale.items():
        page.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
