"""A checkpoint asked outside a run: with the frames and by the rules of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.batch import Completion
from tempsamp_fast.config import DataConfig, ModelConfig
from tempsamp_fast.data.frame_folder import duration_of
from tempsamp_fast.evaluation import answerer as answerer_module
from tempsamp_fast.evaluation.answerer import Answerer
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.sample import Sample


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "total_pixels"])
def test_frames_are_as_large_as_in_training(checkpoint: Path, name: str) -> None:
    params = SamplingParams(temperature=0.0)
    plain, other = (
        Answerer(str(checkpoint), DataConfig(**given), params).loader.geometry for given in ({}, {name: 50_176})
    )
    assert other != plain


def test_frames_and_room_are_those_of_a_protocol(checkpoint: Path) -> None:
    """Over those of the training, in the patches of the model."""
    shown = {"sampling": "qwen_utils", "fps": 4.0, "max_frames": 2048}
    frames_of = lambda geometry: shown | {"total_pixels": 40_000 * geometry.factor**2}
    given = DataConfig(fps=1.0, max_frames=8), SamplingParams(temperature=0.0)
    loader = Answerer(str(checkpoint), *given, frames_of=frames_of).loader
    assert (loader.sampling.mode, loader.sampling.fps, loader.sampling.max_frames) == (*shown.values(),)
    assert loader.geometry.total_pixels == 40_000 * loader.geometry.factor**2
    assert loader.max_prompt_tokens == 40_000 + answerer_module.TEXT_TOKENS


def test_it_asks_in_the_form_and_the_words_of_its_training(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = answerer_module.load_model(str(checkpoint), ModelConfig(model=str(checkpoint)), torch.float32)
    monkeypatch.setattr(answerer_module, "load_model", lambda *_: loaded)
    sample = Sample("s", Path("v.mp4"), "A dog.", 9.0, ((1.0, 2.0),))

    def asked(**given: Any) -> str:
        chat = Answerer(str(tmp_path), DataConfig(**given), SamplingParams(temperature=0.0)).loader.chat
        return chat.tokenizer.decode(chat.unexpanded(sample, "answer", "grounding"))

    assert "JSON list" in asked(answer_form="json") and "JSON list" not in asked()
    (tmp_path / "prompts.json").write_text(json.dumps({"answer": "say when {query} within {duration} s"}))
    assert "say when a dog within 9.0 s" in asked()


def test_what_ends_an_answer_and_what_it_never_holds_is_told_by_the_chat(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def generate(policy: Any, prompts: Any, number: int, params: SamplingParams, **options: Any) -> list[Any]:
        asked.update(options, params=params)
        return []

    monkeypatch.setattr(answerer_module, "generate", generate)
    params = SamplingParams(temperature=0.7, top_k=3)
    answerer = Answerer(str(checkpoint), DataConfig(), params, seed=5, max_tokens_per_row=777)
    assert answerer.answer([]) == []
    assert isinstance(asked.pop("decoder"), GraphDecoder if torch.cuda.is_available() else Decoder)
    chat = answerer._chat
    assert chat.end_token_ids and chat.banned_token_ids
    assert asked == {
        "params": params,
        "seed": (5, 0),
        "eos_token_ids": chat.end_token_ids,
        "banned_token_ids": chat.banned_token_ids,
        "max_tokens_per_row": 777,
    }


@pytest.mark.parametrize(
    ("form", "said", "words", "span"),
    [
        ("json", "[[1.0, 2.0]]", (), [1.0, 2.0]),
        ("text", "1.00 to 2.00", (), None),
        ("text", "1.00 to 2.00", ("--untagged",), [1.0, 2.0]),
    ],
)
def test_inference_reads_the_form_that_was_trained(
    checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, form: str, said: str, words: Any,
    span: Any,
) -> None:  # fmt: skip
    model, video = shutil.copytree(checkpoint, tmp_path / "model"), next((clips / "videos").glob("*.mp4"))
    frames = {"fps": 1.0, "min_pixels": 3136, "max_pixels": 3136}
    (model / "video.json").write_text(json.dumps({"answer_form": form, **frames}))
    monkeypatch.setattr(Answerer, "answer", lambda self, prompts: [Completion(prompts[0].input_ids, said)])
    capsys.readouterr()
    assert infer_main(["--model", str(model), "--video", str(video), "--query", "a square", *words]) == 0
    assert json.loads(capsys.readouterr().out)["span"] == span


def test_inference_asks_with_own_prompts_how_long_the_video_is(
    checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model, video = shutil.copytree(checkpoint, tmp_path / "model"), next((clips / "videos").glob("*.mp4"))
    (model / "prompts.json").write_text(json.dumps({"answer": "say when {query} within {duration} s"}))
    asked = []

    def noting(self: Answerer, prompts: Any) -> list[Completion]:
        asked.append(self.loader.chat.tokenizer.decode(prompts[0].input_ids))
        return [Completion(prompts[0].input_ids, "")]

    monkeypatch.setattr(Answerer, "answer", noting)
    assert infer_main(["--model", str(model), "--video", str(video), "--query", "a square"]) == 0
    assert f"say when a square within {duration_of(video):.1f} s" in asked[0]
