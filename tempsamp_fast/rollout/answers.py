"""The answers of a rollout while they are drawn: one slot a row, written token by token on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from tempsamp_fast.rollout.rooms import Rooms
from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams


@dataclass(frozen=True)
class SampledAnswer:
    """One answer; `ids` end with an end-of-sequence id unless the length limit cut it off."""

    ids: Tensor
    """[completion_len] int64."""
    logps: Tensor
    """[completion_len] float32; of which distribution, `choose_tokens` says."""


class Answers:
    """S rows of at most L tokens; `sampler.draw` writes the next token of those that still run.

    What is drawn of a row after its end lies beyond its length and is never read.
    """

    def __init__(
        self,
        rooms: Rooms,
        noise: SampleNoise,
        params: SamplingParams,
        starts: Tensor,
        step: Tensor,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        banned_token_ids: Sequence[int],
    ) -> None:
        """starts: [S] int64: the position of each answer's first token. step: [1] int64: which token is drawn next.

        banned_token_ids: never drawn.
        """
        device, num_rows, max_length = starts.device, len(starts), params.max_completion_length

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
            return rooms.take(name, shape, dtype, device)

        self.params, self.step = params, step
        self.starts = take("starts", (num_rows,)).copy_(starts)
        self.noise = take("noise", (num_rows, max_length))
        """[S, L] int64 in [0, 2**32)."""
        self.noise.copy_(noise.bits(max_length), non_blocking=True)
        self.tokens = take("tokens", (num_rows,))
        """[S]: the newest of every row."""
        self.ids = take("ids", (num_rows, max_length))
        self.logps = take("logps", (num_rows, max_length), torch.float32)
        self.lengths = take("lengths", (num_rows,)).fill_(max_length)
        self.is_finished = take("is finished", (num_rows,), torch.bool).zero_()
        self.ends, self.banned = (
            take(name, (vocab_size,), torch.bool).copy_(_marked(vocab_size, ids), non_blocking=True)
            for name, ids in (("ends", eos_token_ids), ("banned", banned_token_ids))
        )

    def changing(self) -> list[Tensor]:
        """All that drawing changes but places in `ids` and `logps`."""
        return [self.tokens, self.lengths, self.is_finished]

    def finished(self) -> list[bool]:
        """By slot, whether the answer has ended: the only wait of a token."""
        found: list[bool] = self.is_finished.tolist()
        return found

    def by_prompt(self, counts: Sequence[int]) -> list[list[SampledAnswer]]:
        """`counts` of each prompt, on the CPU."""
        ids, logps, lengths = self.ids.cpu(), self.logps.cpu(), self.lengths.tolist()
        answers = iter([SampledAnswer(ids[row, :n].clone(), logps[row, :n].clone()) for row, n in enumerate(lengths)])
        return [list(islice(answers, count)) for count in counts]


def _marked(vocab_size: int, ids: Sequence[int]) -> Tensor:
    """[vocab_size] bool, true at the ids that the vocabulary has."""
    is_marked = torch.zeros(vocab_size, dtype=torch.bool)
    is_marked[[index for index in ids if index < vocab_size]] = True
    return is_marked
