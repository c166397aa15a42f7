"""Fused GRPO loss kernels: group log-prob, soft advantage and clipped objective in one call."""

from tempsamp_kernels.advantages import grouped_advantages
from tempsamp_kernels.grpo import fused_linear_grpo_loss
from tempsamp_kernels.logprob import linear_logprob
from tempsamp_kernels.metrics import LossMetrics

__all__ = ["LossMetrics", "fused_linear_grpo_loss", "grouped_advantages", "linear_logprob"]
