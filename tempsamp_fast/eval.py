"""Evaluate a checkpoint on a data set and print its scores beside the published ones.

`python -m tempsamp_fast.eval --model RUN --annotations charades-test --videos DIR --output FOLDER`; on several GPUs
`torchrun --nproc-per-node N -m tempsamp_fast.eval ...` with the same words. Answers are kept as they come: an
evaluation that was interrupted continues when it is started again, on any number of GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tempsamp_fast.config import MODES, DataConfig
from tempsamp_fast.data.catalogue import DATASETS, dataset_name, load_samples, require_clip_scores
from tempsamp_fast.data.formats import FORMATS
from tempsamp_fast.evaluation.answer_files import AnswerFiles
from tempsamp_fast.evaluation.protocols import OWN, PROTOCOLS, Protocol, protocol_for
from tempsamp_fast.evaluation.published import DEFAULT_TABLES, MIXED, comparison
from tempsamp_fast.evaluation.scoring import answered_ious, grounding_scores, oracle_ious, score_rows
from tempsamp_fast.run.log import write_json
from tempsamp_fast.sample import Mode, Sample, Task, by_video
from tempsamp_fast.system.device import join_ranks, prepare_environment
from tempsamp_fast.system.files import log_printably, one_line, own_folder, read_json
from tempsamp_fast.video import Geometry

HOW_FRAMES_ARE_TAKEN = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "sampling")
HOW_THEY_ARE_READ = ("video_backend", "video_device", "patch_cache")


def fingerprint(model: str) -> str:
    """Tells checkpoints apart: a digest of the weight files' sizes and of 64 stretches of each; the name off disk."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return model
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for index in range(64):
                file.seek(size * index // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep `settings` in FOLDER/settings.json; raise ValueError listing those its answers were given with others."""
    path = folder / "settings.json"
    if not path.exists() or not any(folder.glob("*.jsonl")):
        write_json(path, settings)
        return
    begun = read_json(path)
    changed = [
        f"{name} {begun.get(name)!r}, now {value!r}" for name, value in settings.items() if begun.get(name) != value
    ]
    if changed:
        raise ValueError(f"--output {folder}: began with {'; '.join(changed)}; choose another folder")


def evaluate(options: argparse.Namespace) -> str:
    """Ask, score and compare as the command line says; the table on rank 0, nothing on the others."""
    from tempsamp_fast.evaluation.answerer import Answerer
    from tempsamp_fast.evaluation.asking import answer_row
    from tempsamp_fast.planning.look import look_for_videos
    from tempsamp_fast.rollout.generate import SamplingParams
    from tempsamp_fast.run.checkpoint import model_folder, read_video_settings
    from tempsamp_fast.system.ranks import barrier, of_all_ranks

    options.model = model_folder(options.model)
    modes: list[Any] = options.mode.split("+")
    samples = load_samples(options.annotations, options.videos, options.format, options.skip_bad_videos)
    samples = samples[: options.max_samples]
    overridable = (*HOW_FRAMES_ARE_TAKEN, *HOW_THEY_ARE_READ, "task")
    given = {name: value for name in overridable if (value := getattr(options, name)) is not None}
    protocol = protocol_for(options.protocol, dataset_name(options.annotations)) if options.protocol else None
    if protocol:
        given |= {"answer_form": protocol.answer_form, "task": "grounding"}
    data = dataclasses.replace(
        read_video_settings(Path(options.model)),
        **given,
        on_bad_sample="skip" if options.skip_bad_videos else "raise",
    )
    _check(options, modes, data.task, samples)
    look_for_videos(samples, options.videos, data.on_bad_sample)
    longest = options.max_completion_length or (protocol.max_completion_length if protocol else 2048)
    options.max_completion_length = longest
    params = SamplingParams(options.temperature, options.top_p, options.top_k, longest)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        join_ranks("gloo", timedelta(days=7))
    if rank == 0:
        own_folder(options.output, may_be_link=True)
        frames = {name: getattr(data, name) for name in HOW_FRAMES_ARE_TAKEN}
        settings = {"model": fingerprint(options.model), "annotations": options.annotations, "task": data.task}
        settings |= {"protocol": options.protocol or OWN, "answer_form": data.answer_form}
        frames |= {"budget": str(protocol.budget)} if protocol and protocol.budget else {}
        require_same_settings(options.output, settings | frames | dataclasses.asdict(params) | {"seed": options.seed})
    barrier()
    frames_of = _frames_of(protocol, given) if protocol and protocol.budget else None
    answerer = Answerer(options.model, data, params, options.seed, base=options.base, frames_of=frames_of)
    row_of = lambda sample, text: answer_row(sample, text, not options.untagged, data.answer_form, protocol)
    rows_by_mode = {}
    for mode in modes:
        files = AnswerFiles(options.output, mode, rank)
        texts = files.read(samples)
        barrier()
        done = len(texts)
        own = _share([sample for sample in samples if sample.sample_id not in texts], rank, world_size)
        for answers in answerer.answer_all(own, mode, options.batch_size):
            files.append([row_of(sample, text) for sample, text in answers.items()])
            done += len(answers) * world_size
            if rank == 0:
                print(f"{mode}: {min(done, len(samples))} of {len(samples)}", file=sys.stderr, flush=True)
        skipped = of_all_ranks({str(path): reason for path, reason in answerer.loader.skipped.items()})
        if rank == 0:
            reasons = {path: reason for part in skipped for path, reason in part.items()}
            rows_by_mode[mode] = _all_rows(samples, files.read(samples), reasons, row_of)
            files.merge(rows_by_mode[mode])
        barrier()
    return _report(options, samples, rows_by_mode, data, protocol) if rank == 0 else ""


def _frames_of(protocol: Protocol, given: dict[str, Any]) -> Callable[[Geometry], dict[str, Any]]:
    """What the protocol shows of a video, in the patches of a model; what was typed counts in its place."""
    assert protocol.budget
    budget, typed = protocol.budget, {name: given[name] for name in HOW_FRAMES_ARE_TAKEN if name in given}
    return lambda geometry: budget.frames(geometry.factor, geometry.counts_every_frame) | typed


def _check(options: argparse.Namespace, modes: Sequence[str], task: Task, samples: Sequence[Sample]) -> None:
    if options.protocol and (options.task not in (None, "grounding") or options.untagged):
        raise ValueError(
            f"--protocol {options.protocol} says itself what is asked and read: leave out --task, --untagged"
        )
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"--mode {options.mode}: choose answer, think or answer+think")
    if options.mixed_cot and (set(modes) != set(MODES) or task != "grounding"):
        raise ValueError(f"--mixed_cot needs --mode answer+think and the task grounding, not {options.mode} and {task}")
    if task == "highlight":
        require_clip_scores(options.annotations, samples)


def _share(samples: Sequence[Sample], rank: int, world_size: int) -> list[Sample]:
    """Whole videos, whose queries follow each other: each is decoded and prefilled once, by one rank."""
    return [sample for queries in by_video(samples)[rank::world_size] for sample in queries]


def _all_rows(
    samples: Sequence[Sample],
    texts: dict[str, str],
    skipped: dict[str, str],
    row_of: Callable[[Sample, str], dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row per sample; one whose video was skipped says why, counts as unparsed and is asked again next time."""
    rows = []
    for sample in samples:
        row = row_of(sample, texts.get(sample.sample_id, ""))
        if sample.sample_id not in texts:
            row["skipped"] = skipped[str(sample.video)]
        rows.append(row)
    return rows


def _other_modes(path: Path, asked: set[str], counted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an earlier call left in `path` of other modes than those `asked`, if it counted the same in the same way."""
    earlier: Any = read_json(path) if path.is_file() else {}
    rows = earlier["rows"] if earlier.items() >= counted.items() else ()
    return [row for row in rows if row["mode"] not in {MIXED, *asked}]


def _report(
    options: argparse.Namespace,
    samples: Sequence[Sample],
    rows_by_mode: dict[Mode, list[dict[str, Any]]],
    data: DataConfig,
    protocol: Protocol | None,
) -> str:
    followed = {"protocol": options.protocol or OWN}
    score = lambda rows: (
        protocol.scores(samples, rows)
        if protocol
        else score_rows(samples, rows, data.task, not options.untagged, data.answer_form)
    )
    scores: list[dict[str, Any]] = [
        {
            "mode": mode,
            **followed,
            **score(rows),
            "outside_video": sum(row["outside_video"] for row in rows),
        }
        for mode, rows in rows_by_mode.items()
    ]
    if options.mixed_cot:
        ious = oracle_ious([answered_ious(rows) for rows in rows_by_mode.values()])
        scores.append({"mode": MIXED, **followed, **grounding_scores(ious)})
    counted = {"num_queries": len(samples), "untagged": options.untagged, **followed}
    written = scores + _other_modes(options.output / "scores.json", set(rows_by_mode), counted)
    num_skipped = sum("skipped" in row for rows in rows_by_mode.values() for row in rows)
    write_json(
        options.output / "scores.json",
        {**counted, "num_skipped": num_skipped, "rows": written},
    )
    test = dataset_name(options.annotations)
    text = comparison(scores, len(samples), test, None if options.all_published else DEFAULT_TABLES)
    text += f"\nprotocol {protocol or f'{OWN}: frames, prompt and parser of the checkpoint'}"
    text += f"; answers of at most {options.max_completion_length} tokens"
    if test and options.max_samples and DATASETS[test].num_queries not in (None, len(samples)):
        text += f"\nours: the first {len(samples)} of {DATASETS[test].num_queries} queries only"
    if num_skipped:
        text += f"\nskipped for a bad video and counted as not read: {num_skipped}; {options.output} says why"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 and one line on stderr for bad input."""
    log_printably()
    parser = argparse.ArgumentParser(
        prog="python -m tempsamp_fast.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="run folder (RUN/best: of its best evaluation), checkpoint folder or hub name")
    add("--base", help="hub name of the model that adapters belong on, where the hub's cache lacks it")
    add("--annotations", required=True, help=f"file or data set: {', '.join(DATASETS)}")
    add("--format", default="auto", choices=["auto", *FORMATS], help="of the annotation file")
    add("--videos", required=True, type=Path, help="folder of <video id>.{mp4,mkv,webm,avi,mov,m4v}")
    add("--output", required=True, type=Path, help="folder of answers and scores; one that has some is continued")
    add("--mode", default="answer", help="answer, think or answer+think")
    add("--mixed_cot", action="store_true", help="also the better mode of each query: an upper bound, needs both modes")
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="published way to ask, show, read and count; default: the checkpoint's own",
    )
    add("--task", choices=get_args(Task), help="default: as the checkpoint was trained")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top_p", type=float, default=1.0)
    add("--top_k", type=int, default=0, help="0: off")
    add("--seed", type=int, default=0, help="of sampled answers")
    add("--max_completion_length", type=int, help="default: the protocol's, else 2048")
    add("--batch_size", type=int, default=16, help="queries answered together, per GPU")
    add("--max_samples", type=int, help="the first N queries only")
    add("--untagged", action="store_true", help="read answers without <answer> tags too")
    add("--skip_bad_videos", action="store_true", help="count their queries as not read instead of stopping")
    add("--all_published", action="store_true", help="show published ablations and few-shot runs too")
    frames = parser.add_argument_group("frames", "default: as the checkpoint was trained")
    hints = get_type_hints(DataConfig)
    for name in (*HOW_FRAMES_ARE_TAKEN, *HOW_THEY_ARE_READ):
        kinds = [kind for kind in (get_args(hints[name]) or (hints[name],)) if kind is not type(None)]
        is_choice = isinstance(kinds[0], str)
        frames.add_argument(f"--{name}", type=str if is_choice else kinds[0], choices=kinds if is_choice else None)
    options = parser.parse_args(arguments)
    prepare_environment()
    try:
        for name in ("batch_size", "max_samples"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        text = evaluate(options)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"error: Ctrl-C; the same words go on with the answers in {options.output}\n")
        return 128 + signal.SIGINT
    if text:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
