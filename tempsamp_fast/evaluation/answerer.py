"""A checkpoint that answers prompts, without an engine around it: what inference and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tempsamp_fast.batch import Completion, Prompt
from tempsamp_fast.config import DataConfig, ModelConfig
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.data.prefetch import Prefetch
from tempsamp_fast.data.prompt_file import saved_templates
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.model.loading import load_model, resolve_dtype
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.system.device import training_device
from tempsamp_fast.video import Geometry

TEXT_TOKENS = 8192
"""For the time stamps and the question beside a video that a protocol allows to be longer than a usual row."""


class Answerer:
    """A model on this rank's device and the loader of its prompts.

    checkpoint: a Hugging Face folder or hub name.
    base: the hub name to fetch where `checkpoint` holds adapters on it; otherwise the hub's cache must have it.
    data: how frames are taken, and the task.
    params: how answers are drawn; temperature 0 is greedy.
    frames_of: settings over `data` that depend on the model's patches.
    seed: of sampled answers; each depends on it, its sample and its mode alone.
    Raises ValueError for a checkpoint that cannot be used.
    """

    def __init__(
        self,
        checkpoint: str,
        data: DataConfig,
        params: SamplingParams,
        seed: int = 0,
        max_tokens_per_row: int = 32_768,
        base: str | None = None,
        frames_of: Callable[[Geometry], Mapping[str, Any]] | None = None,
    ) -> None:
        device = training_device()
        model, self._chat = load_model(checkpoint, ModelConfig(model=base or checkpoint), resolve_dtype("auto", device))
        self._chat.templates = saved_templates(checkpoint)
        self._chat.answer_form = data.answer_form
        if frames_of:
            data = replace(data, **frames_of(geometry_of(model.config)))
            longest = (data.total_pixels or 0) // geometry_of(model.config).factor ** 2
            max_tokens_per_row = max(max_tokens_per_row, longest + TEXT_TOKENS)
        geometry = geometry_of(model.config, data.min_pixels, data.max_pixels, data.total_pixels)
        self.loader = PromptLoader(self._chat, geometry, data, max_prompt_tokens=max_tokens_per_row)
        self._policy = Policy(model).eval().to(device)
        self._decoder = GraphDecoder() if device.type == "cuda" else Decoder()
        self._params, self._seed, self._max_tokens_per_row = params, seed, max_tokens_per_row

    def answer(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """One completion per prompt."""
        answers = generate(
            self._policy,
            prompts,
            1,
            self._params,
            seed=(self._seed, 0),
            eos_token_ids=self._chat.end_token_ids,
            banned_token_ids=self._chat.banned_token_ids,
            max_tokens_per_row=self._max_tokens_per_row,
            decoder=self._decoder,
        )
        return [
            self._chat.completion(answer.ids, opening=prompt.opening)
            for prompt, (answer,) in zip(prompts, answers, strict=True)
        ]

    def answer_all(self, samples: Sequence[Sample], mode: Mode, batch_size: int) -> Iterator[dict[Sample, str]]:
        """Texts by sample, batch after batch, the next batch's videos decoded meanwhile.

        A sample whose video had to be skipped is not among them.
        """
        batches = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
        prompts = (self.loader.prompts(batch, [mode] * len(batch)) for batch in batches)
        with Prefetch(prompts, depth=1) as ahead:
            for asked in ahead:
                completions = self.answer(asked) if asked else []
                yield {p.sample: completion.text for p, completion in zip(asked, completions, strict=True)}
