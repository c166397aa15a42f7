"""Tokens that depend on each other: ratios shared by a whole row (GSPO) and row weights (VESPO)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tempsamp_kernels.objectives import TokenLoss, Vespo
from tempsamp_kernels.reference import evaluate, token_log_ratio
from tempsamp_kernels.tokens import RowStatistics, Tokens


@dataclass(frozen=True)
class Sequences:
    """Which tokens make up a row, and what its tokens share."""

    row_ids: Tensor
    """[N] int64 below `num_row_ids`."""
    num_row_ids: int
    mask: Tensor
    """[N] bool: tokens that count in the row's ratio."""
    lengths: Tensor
    """[N] fp32: counted tokens of the token's row, at least 1."""
    vespo: Vespo | None = None
    """None: the geometric mean of a row's ratios replaces each of them (GSPO, arXiv 2507.18071)."""
    spreads_gradient: bool = True
    """False: a shared ratio has the gradient of each token's own log-prob (GSPO-token, section 4.3 there)."""

    def reordered(self, order: Tensor) -> Sequences:
        return replace(self, row_ids=self.row_ids[order], mask=self.mask[order], lengths=self.lengths[order])

    def row_sum(self, values: Tensor) -> Tensor:
        """[N] values to [B] sums, the same bits every time: on a GPU `index_add_` would vary the order."""
        sums = values.new_zeros(self.num_row_ids)
        if values.is_cuda:
            return sums.index_put_((self.row_ids,), values, accumulate=True)
        return sums.index_add_(0, self.row_ids, values)

    def terms(self, rows: RowStatistics, tokens: Tokens, loss: TokenLoss) -> tuple[Tensor, Tensor, Tensor | None]:
        """Terms [NUM_TERMS, N] of the loss, and its derivatives with respect to log-prob and entropy [N]."""
        log_ratio = token_log_ratio(rows.logp, tokens)
        if self.vespo is not None:
            row_log_ratio = self.row_sum(log_ratio.clamp(-20.0, 20.0) * self.mask) + self.vespo.log_weight
            weight = self.vespo.weight(row_log_ratio[self.row_ids], tokens.advantage)
            tokens = replace(tokens, advantage=tokens.advantage * weight)
        else:
            log_ratio = self.row_sum(log_ratio * self.mask)[self.row_ids] / self.lengths
        terms, d_logp, d_log_ratio, d_entropy = evaluate(rows, log_ratio, tokens, loss)
        if self.vespo is None and self.spreads_gradient:
            d_log_ratio = self.row_sum(d_log_ratio)[self.row_ids] / self.lengths * self.mask
        return terms, d_logp + d_log_ratio, d_entropy
