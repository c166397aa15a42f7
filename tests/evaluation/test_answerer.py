"""A checkpoint asked outside a run: with the frames and by the rules of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.config import DataConfig
from tempsamp_fast.evaluation import answerer as answerer_module
from tempsamp_fast.evaluation.answerer import Answerer
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "total_pixels"])
def test_frames_are_as_large_as_in_training(checkpoint: Path, name: str) -> None:
    params = SamplingParams(temperature=0.0)
    plain, other = (
        Answerer(str(checkpoint), DataConfig(**given), params).loader.geometry for given in ({}, {name: 50_176})
    )
    assert other != plain


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
