"""The card of an exported model: what it is, how it is asked, what it learned from by which settings, its scores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tempsamp_fast
from tempsamp_fast.data.prompt_file import saved_templates
from tempsamp_fast.data.prompts import QUESTION_FORMS, question
from tempsamp_fast.evaluation.published import METRICS
from tempsamp_fast.sample import Mode
from tempsamp_fast.system.files import one_line, read_json

HUB_NAME = r"[\w.-]+/[\w.-]+"
LEFT_OUT = ("output_dir", "resume", "local_rank", "dry_run", "record_rollouts", "replay_rollouts", "patch_cache")
"""Settings that say nothing of a model."""
PATHS = ("annotations", "eval_annotations", "videos", "eval_videos", "synthetic_dir", "prompt_file", "deepspeed_config")
"""Settings of which the last part is told: where files lay is nobody's business."""
MOST_CHARACTERS = 200
"""Of a value: it may be a stranger's."""


def model_card(name: str, model: Path, defaults: Mapping[str, Any]) -> str:
    """Markdown, from what lies beside the weights in the folder `model` and, where it is of a run, in that.

    defaults: of every setting by name; those that differ are listed, paths by their last part.
    """
    state, results = _records(model)
    config = {name: value for section in state.get("config", {}).values() for name, value in section.items()}
    base = str(config.get("model", ""))
    header = ["---", "library_name: transformers", "pipeline_tag: video-text-to-text"]
    header += [f"base_model: {base}"] if re.fullmatch(HUB_NAME, base) and not os.path.exists(base) else []
    header += ["tags: [temporal-grounding, tempsamp-r1]", "---"]
    asked = [f"- {mode}: {text}" for mode, text in _questions(model, config).items()]
    lines = [
        *header,
        f"# {name}",
        "",
        "It answers when something happens in a video. Trained with tempsamp-fast "
        f"{tempsamp_fast.__version__} (the method: TempSamp-R1, arXiv 2509.18056).",
        "",
        "    tempsamp infer --model THIS_FOLDER --video clip.mp4 --query 'the door opens'",
        "",
        "The video comes first, then one of these texts; how frames are taken stands in `video.json`.",
        "",
        *asked,
    ]
    if config:
        shown = {name: value for name, value in config.items() if name not in LEFT_OUT and value != defaults.get(name)}
        lines += ["", "## Data and settings", "", f"After {int(state.get('step', 0))} optimizer steps.", ""]
        lines += _table(["setting", "value"], [[name, _setting(name, value)] for name, value in sorted(shown.items())])
    if results:
        names = [metric for metric in METRICS if metric in results[0]]
        figures = [[f"{100 * float(row.get(name, 0)):.1f}" for name in names] for row in results]
        heads = [[_cell(row.get("stage")), _cell(row.get("mode"))] for row in results]
        rows = [[*head, *cells] for head, cells in zip(heads, figures, strict=True)]
        lines += [
            "",
            "## Scores",
            "",
            f"On {_setting('eval_annotations', config.get('eval_annotations'))}, held out, in per cent.",
            "",
        ]
        lines += _table(["after", "mode", *(METRICS[name] for name in names)], rows)
    return "\n".join(lines) + "\n"


def _records(model: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The checkpoint's `state.json`, and of its run's results the last ones up to its step; empty for other folders."""
    path = model.parent / "state.json"
    if not path.is_file():
        return {}, []
    state = read_json(path)
    results = model.parents[2] / "results.json"
    rows = read_json(results) if results.is_file() else []
    try:
        last = max((row["num_steps"] for row in rows if row["num_steps"] <= state["step"]), default=None)
        return state, [row for row in rows if row["num_steps"] == last]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{results}: cannot be read: {error!r}") from error


def _questions(model: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates = saved_templates(str(model))
    if templates:
        return {mode: _cell(text) for mode, text in templates.items()}
    form, task = config.get("answer_form", "text"), config.get("task", "grounding")
    if form not in QUESTION_FORMS or task not in QUESTION_FORMS[form].ask:
        return {}
    modes = [mode for mode in get_args(Mode) if mode == "answer" or QUESTION_FORMS[form].thinks]
    return {mode: question("{query}", mode, task, form) for mode in modes}


def _setting(name: str, value: Any) -> str:
    text = str(value)
    is_path = name in PATHS or (name == "model" and os.path.exists(text))
    terms = [term.rpartition("/")[2] for term in text.split(",")] if name == "rewards" else []
    return _cell(Path(text).name if is_path else ",".join(terms) or text)


def _cell(value: Any) -> str:
    """A value on one line of a table, cut, without what Markdown would obey."""
    text = one_line(value)
    return re.sub(r"([|<>`\[\]*_\\])", r"\\\1", text[:MOST_CHARACTERS])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
