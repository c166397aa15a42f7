"""From a sample and its video to the token ids that the model reads, and back from ids to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tempsamp_fast.batch import Completion, Prompt, VideoPatches
from tempsamp_fast.data.prompt_file import Templates
from tempsamp_fast.data.prompts import QUESTION_FORMS, question
from tempsamp_fast.data.text_files import shown
from tempsamp_fast.model.families import family_of
from tempsamp_fast.sample import AnswerForm, Mode, Sample, Task
from tempsamp_fast.system.bounded import bounded

VIDEO_PAD = "<|video_pad|>"
VIDEO_MARKER = f"<|vision_start|>{VIDEO_PAD}<|vision_end|>"
QUESTION = "[the question]"
"""Stands for it while the chat template is rendered."""
_RENDERED: dict[str, str] = {}
"""What chat templates have made of turns, by all that it depends on."""


class Chat:
    """A tokenizer with its chat template, for one model configuration.

    preprocessor_files: texts by name of the checkpoint's image and video processor settings. They are not read here,
        only written beside the weights of checkpoints made from it.
    generation_eos: `eos_token_id` of the checkpoint's generation_config: an id or several; what is none is left aside.
    Raises ValueError when the tokenizer has no chat template that can be used, no end of sequence, or lacks the vision
    tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_config: Any,
        preprocessor_files: Mapping[str, str] = MappingProxyType({}),
        generation_eos: Any = None,
    ) -> None:
        if isinstance(tokenizer.chat_template, dict):  # by names, of which files are made where it is saved
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer of {tokenizer.name_or_path!r} has no chat template")
        if tokenizer.convert_tokens_to_ids(VIDEO_PAD) != model_config.video_token_id:
            raise ValueError(
                f"tokenizer of {tokenizer.name_or_path!r} does not map <|video_pad|> to the model's "
                f"video_token_id={model_config.video_token_id}"
            )
        self.tokenizer: Any = tokenizer
        self.answer_form: AnswerForm = "text"
        """How everything is asked from now on."""
        self._template("answer")
        self.preprocessor_files = preprocessor_files
        self.templates: Templates | None = None
        """Questions of one's own by mode, in place of those of `prompts`; set before the first prompt."""
        self.timestamps_in_text = family_of(model_config).has_timestamps
        self.merged_patch = model_config.vision_config.spatial_merge_size**2
        self._num_embeddings: int = model_config.text_config.vocab_size
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        # Qwen3's <think> is an added token too, but not a special one.
        special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
        self._special = {*special}
        self.end_token_ids = self._ends(generation_eos, special)
        """What ends an answer."""
        self.eos_token_id = self.end_token_ids[0]
        padding = range(len(tokenizer), self._num_embeddings)  # checkpoints round the vocabulary up
        never = {*special, *padding} - {*self.end_token_ids}
        self.banned_token_ids = sorted(token for token in never if token < self._num_embeddings)

    def _ends(self, generation_eos: Any, special: Sequence[int]) -> list[int]:
        """The special token behind an assistant's turn, that of the tokenizer, those of the generation_config."""
        name, eos = self.tokenizer.name_or_path, self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(f"tokenizer of {name!r} has no eos_token: set it, or no answer would ever end")
        said = "an answer"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
        try:
            _, _, behind = self._render(turns).rpartition(said)
        except ValueError:  # a template that takes no such turns
            behind = ""
        first = self.tokenizer(behind.strip(), add_special_tokens=False).input_ids[:1]
        ours = [token for token in first if token in special]
        theirs = generation_eos if isinstance(generation_eos, (list, tuple)) else [generation_eos]
        known = [token for token in theirs if type(token) is int]
        ends = [token for token in dict.fromkeys([*ours, eos, *known]) if 0 <= token < self._num_embeddings]
        if not ends:
            raise ValueError(f"tokenizer of {name!r}: eos_token {eos} is beyond the model's {self._num_embeddings} ids")
        return ends

    def prompt(self, sample: Sample, mode: Mode, task: Task, video: VideoPatches) -> Prompt:
        """The question about `video` in the model's chat format, placeholders expanded to one id per merged patch."""
        text, opening = self._question(sample, mode, task)
        ids = self.encode(text.replace(VIDEO_MARKER, self._video_text(video)))
        return Prompt(sample, mode, ids, video, opening)

    def unexpanded(self, sample: Sample, mode: Mode, task: Task) -> Tensor:
        """[num_tokens] int64: the same question with one placeholder for the video, for engines that expand it.

        Without the markers around it where they stand around every frame: an engine writes those of the frames.
        """
        text = self._question(sample, mode, task)[0]
        return self.encode(text.replace(VIDEO_MARKER, VIDEO_PAD) if self.timestamps_in_text else text)

    def check(self, modes: Iterable[Mode]) -> None:
        """Raise ValueError, naming the template, for a mode that it cannot be asked in."""
        for mode in modes:
            self._question(Sample("", Path(), "a query", 1.0, ()), mode, "grounding")

    def check_templates(self, modes: Iterable[Mode], where: str) -> None:
        """Raise ValueError that begins with `where` unless `templates` has one for each mode, of plain text."""
        assert self.templates is not None
        for mode in modes:
            if mode not in self.templates:
                raise ValueError(f"{where}: no template for the mode {mode}, only {', '.join(self.templates)}")
            ids = self.tokenizer(self.templates[mode], add_special_tokens=False).input_ids
            for token in self._special.intersection(ids):
                raise ValueError(
                    f"{where}: the template of {mode} holds {self._added[token]!r}, a token that the chat template "
                    "writes itself: leave it out"
                )

    def _question(self, sample: Sample, mode: Mode, task: Task) -> tuple[str, str]:
        """The prompt as text, and what of the answer stands at its end already."""
        if self.templates is not None and mode not in self.templates:
            raise ValueError(f"the prompt file has no template for the mode {mode}, only {', '.join(self.templates)}")
        template = self.templates[mode] if self.templates is not None else None
        asked = question(self._as_text(sample), mode, task, self.answer_form, template, sample.duration_s)
        text = asked.join(self._template(mode))
        name = self.tokenizer.name_or_path
        if text.count(VIDEO_MARKER) != 1:
            raise ValueError(
                f"the chat template of {name!r} renders a video and a question as {shown(text)}; "
                f"expected one {VIDEO_MARKER} and the question"
            )
        _, think, opening = text.rpartition(asked)[2].rpartition("<think>")
        is_open = bool(think) and "</think>" not in opening
        if is_open and mode == "answer":
            raise ValueError(
                f"the chat template of {name!r} opens <think> whatever it is told, so that the mode answer cannot be "
                "asked; choose the mode think, or a checkpoint that can answer directly"
            )
        if think and not is_open and mode == "think":
            raise ValueError(
                f"the chat template of {name!r} closes </think> whatever it is told, so that the mode think cannot be "
                "asked; choose the mode answer, or a checkpoint that can think"
            )
        return text, think + opening if is_open else ""

    def _as_text(self, sample: Sample) -> str:
        """The query, in which no token of the tokenizer's own is left: those are broken by a space."""
        query = QUESTION_FORMS[self.answer_form].clean(sample.query)
        for token in sorted(self._added.values(), key=len, reverse=True):
            if len(token) > 1:
                query = query.replace(token, f"{token[0]} {token[1:]}")
        try:
            left = set(self.tokenizer(query, add_special_tokens=False).input_ids) & self._added.keys()
        except (TypeError, UnicodeEncodeError):
            left = {-1}
        if left:
            raise ValueError(f"sample {shown(sample.sample_id)}: query {shown(query)} cannot be asked as plain text")
        return query

    def _template(self, mode: Mode) -> tuple[str, str]:
        """What the chat template puts before and after a question.

        Raises ValueError for one that fails, repeats or drops the question, takes over 10 s or 512 MiB.
        """
        asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
        try:
            text = self._render(asked, add_generation_prompt=True, enable_thinking=mode == "think")
            before, after = text.split(QUESTION)
        except ValueError as error:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot be used: it must render a question once "
                f"({error})"
            ) from error
        return before, after

    def _render(self, turns: list[Any], **options: bool) -> str:
        """What the chat template, a stranger's program, makes of `turns`; asked once in a process.

        Raises ValueError for one that fails, takes over 10 s or 512 MiB.
        """
        words = self.tokenizer
        key = repr((type(words), words.chat_template, words.special_tokens_map, turns, options))
        if key not in _RENDERED:
            render = lambda: words.apply_chat_template(turns, tokenize=False, **options)
            _RENDERED[key] = bounded(render, seconds=10, num_bytes=512 << 20)
        return _RENDERED[key]

    def _video_text(self, video: VideoPatches) -> str:
        frames, height, width = video.grid_thw
        pads = VIDEO_PAD * (height * width // self.merged_patch)
        if not self.timestamps_in_text:
            return f"<|vision_start|>{pads * frames}<|vision_end|>"
        return "".join(f"<{t:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for t in video.timestamps_s.tolist())

    def encode(self, text: str) -> Tensor:
        """[num_tokens] int64, nothing added. Raises ValueError for a token that the model has no embedding of."""
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
        for token in ids[ids >= self._num_embeddings][:1].tolist():
            raise ValueError(
                f"tokenizer of {self.tokenizer.name_or_path!r}: {self.tokenizer.decode([token])!r} has the id {token} "
                f"and the model {self._num_embeddings} embeddings; resize them to {len(self.tokenizer)}"
            )
        return ids

    def are_answers(self, ids: Any) -> bool:
        """Whether this is a list of lists of the model's token ids."""
        return isinstance(ids, list) and all(
            isinstance(answer, list) and all(type(i) is int and 0 <= i < self._num_embeddings for i in answer)
            for answer in ids
        )

    def completion(self, ids: Tensor, sampled_logps: Tensor | None = None, opening: str = "") -> Completion:
        """A sampled answer with its text, that which the prompt had written of it included."""
        has_end = len(ids) > 0 and int(ids[-1]) in self.end_token_ids
        said = ids[:-1] if has_end else ids
        text = opening + self.tokenizer.decode(said, skip_special_tokens=True)
        return Completion(ids, text, sampled_logps=sampled_logps, is_cut=not has_end)

    def off_policy_completion(self, text: str, opening: str = "") -> Completion:
        """A given answer, tokenised without special tokens and ended by the end-of-sequence id (paper section 3.2).

        Of an answer that the prompt has opened, the ids hold the rest; one without thoughts closes them first.
        """
        if opening:
            text = text.removeprefix("<think>").lstrip() if text.startswith("<think>") else f"</think> {text}"
        ids = torch.cat([self.encode(text), torch.tensor([self.eos_token_id])])
        return Completion(ids, opening + text, is_off_policy=True)
