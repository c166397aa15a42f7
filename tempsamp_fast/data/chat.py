"""From a sample and its video to the token ids that the model reads, and back from ids to text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tempsamp_fast.batch import Completion, Prompt, VideoPatches
from tempsamp_fast.data.prompts import question
from tempsamp_fast.model.families import family_of
from tempsamp_fast.sample import Mode, Sample, Task
from tempsamp_fast.system.bounded import bounded

VIDEO_MARKER = "<|vision_start|><|video_pad|><|vision_end|>"
QUESTION = "[the question]"
"""Stands for it while the chat template is rendered."""


class Chat:
    """A tokenizer with its chat template, for one model configuration.

    preprocessor_files: texts by name of the checkpoint's image and video processor settings. They are not read here,
        only written beside the weights of checkpoints made from it.
    Raises ValueError when the tokenizer has no chat template that can be used, or lacks the vision tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_config: Any,
        preprocessor_files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer of {tokenizer.name_or_path!r} has no chat template")
        if tokenizer.convert_tokens_to_ids("<|video_pad|>") != model_config.video_token_id:
            raise ValueError(
                f"tokenizer of {tokenizer.name_or_path!r} does not map <|video_pad|> to the model's "
                f"video_token_id={model_config.video_token_id}"
            )
        self.tokenizer: Any = tokenizer
        self._rendered: tuple[Any, str, str] | None = None
        self._template()
        self.preprocessor_files = preprocessor_files
        self.timestamps_in_text = family_of(model_config).has_timestamps
        self.merged_patch = model_config.vision_config.spatial_merge_size**2
        self.eos_token_id: int = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        # Qwen3's <think> is an added token too, but not a special one.
        special = [token for token in added if added[token].special and token != self.eos_token_id]
        padding = range(len(tokenizer), model_config.text_config.vocab_size)  # checkpoints round the vocabulary up
        self.banned_token_ids = [*special, *padding]

    def prompt(self, sample: Sample, mode: Mode, task: Task, video: VideoPatches) -> Prompt:
        """The question about `video` in the model's chat format, placeholders expanded to one id per merged patch."""
        text = self._question(sample, mode, task).replace(VIDEO_MARKER, self._video_text(video))
        return Prompt(sample, mode, self.encode(text), video)

    def unexpanded(self, sample: Sample, mode: Mode, task: Task) -> Tensor:
        """[num_tokens] int64: the same question with one placeholder for the video, for engines that expand it."""
        return self.encode(self._question(sample, mode, task))

    def _question(self, sample: Sample, mode: Mode, task: Task) -> str:
        text = question(sample.query, mode, task).join(self._template())
        if text.count(VIDEO_MARKER) != 1:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} renders a video as {text!r}; "
                f"expected one {VIDEO_MARKER}"
            )
        return text

    def _template(self) -> tuple[str, str]:
        """What the chat template puts before and after a question; rendered once, as it is a program of a stranger's.

        Raises ValueError for one that fails, repeats or drops the question, takes over 10 s or 512 MiB.
        """
        template = self.tokenizer.chat_template
        if self._rendered and self._rendered[0] == template:
            return self._rendered[1:]
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        asked = [{"role": "user", "content": content}]
        render = lambda: self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        try:
            before, after = bounded(render, seconds=10, num_bytes=512 << 20).split(QUESTION)
        except ValueError as error:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot be used: it must render a question once "
                f"({error})"
            ) from error
        self._rendered = template, before, after
        return before, after

    def _video_text(self, video: VideoPatches) -> str:
        frames, height, width = video.grid_thw
        pads = "<|video_pad|>" * (height * width // self.merged_patch)
        if not self.timestamps_in_text:
            return f"<|vision_start|>{pads * frames}<|vision_end|>"
        return "".join(f"<{t:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for t in video.timestamps_s.tolist())

    def encode(self, text: str) -> Tensor:
        """[num_tokens] int64, nothing added."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    def completion(self, ids: Tensor, sampled_logps: Tensor | None = None) -> Completion:
        """A sampled answer with its text."""
        return Completion(ids, self.tokenizer.decode(ids, skip_special_tokens=True), sampled_logps=sampled_logps)

    def off_policy_completion(self, text: str) -> Completion:
        """A given answer, tokenised without special tokens and ended by the end-of-sequence id (paper section 3.2)."""
        ids = torch.cat([self.encode(text), torch.tensor([self.eos_token_id])])
        return Completion(ids, text, is_off_policy=True)
