"""The nouns of a training step: what is asked, what is answered, and a group of answers to one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempsamp_fast.sample import Mode, Sample


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower gives the language model for one video, or for several one after the other."""

    embeds: Tensor
    """[num_placeholders, hidden_size]."""
    deepstack: tuple[Tensor, ...] = ()
    """One [num_placeholders, hidden_size] per early decoder layer; empty for Qwen2.5-VL."""

    def to(self, device: torch.device | str) -> VisionFeatures:
        """The same features on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> VisionFeatures:
        """Features of which every tensor has been through `change`."""
        return VisionFeatures(change(self.embeds), tuple(map(change, self.deepstack)))


@dataclass(frozen=True)
class VideoPatches:
    """One video, ready for the vision tower."""

    pixel_values: Tensor
    """[num_patches, channels * temporal_patch * patch * patch], rows in the vision tower's order: normalised, or uint8
    as `video.normalise_rows` takes them."""
    grid_thw: tuple[int, int, int]
    """Patches along time, height and width, before spatial merging."""
    second_per_grid: float
    """Seconds between two neighbours along the time axis of the grid."""
    timestamps_s: Tensor
    """[grid_t] float64: mean time of the frames of each temporal patch."""
    features: VisionFeatures | None = None
    """Of a frozen tower, computed once; `pixel_values` are not read then."""
    is_whole: bool = True
    """Whether this is all that is sampled of the file, not a stretch of it."""

    @property
    def nbytes(self) -> int:
        """Memory of pixels and features."""
        features = () if self.features is None else (self.features.embeds, *self.features.deepstack)
        return sum(tensor.nbytes for tensor in (self.pixel_values, *features))


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it."""

    sample: Sample
    mode: Mode
    input_ids: Tensor
    """[prompt_len] int64, video placeholders already expanded to one id per merged patch."""
    video: VideoPatches
    opening: str = ""
    """What the chat template has written of the answer already: `<think>` and a line break, or nothing."""
    is_replacement: bool = False
    """Whether it takes the place of a sample whose video is bad."""


@dataclass
class Completion:
    """One answer; `ids` end with the end-of-sequence id unless generation was cut off."""

    ids: Tensor
    """[completion_len] int64."""
    text: str
    is_off_policy: bool = False
    sampled_logps: Tensor | None = None
    """[completion_len] float32 at the sampling temperature; of which distribution, the rollout backend says.

    None for answers that were not sampled just now: off-policy and replayed ones.
    """
    rewards: dict[str, float] = field(default_factory=dict)
    """Raw reward by name; filled by scoring."""
    is_cut: bool = False
    """Whether it was sampled up to the limit and has no end."""


@dataclass
class RolloutGroup:
    """All answers to one prompt; the unit that advantages are normalised over."""

    prompt: Prompt
    completions: list[Completion]
    advantages: Tensor | None = None
    """[num_generations] float32; filled by `advantage.assign_advantages`."""

    @property
    def num_tokens(self) -> int:
        """Of the prompt, once, and of all answers."""
        return len(self.prompt.input_ids) + self.num_answer_tokens

    @property
    def num_answer_tokens(self) -> int:
        return sum(len(completion.ids) for completion in self.completions)

    def is_off_policy(self) -> Tensor:
        """[num_generations] bool."""
        return torch.tensor([completion.is_off_policy for completion in self.completions])
