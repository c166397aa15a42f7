"""Fused GRPO loss kernels: group log-prob, soft advantage and clipped objective in one call."""

from tempsamp_kernels.advantages import grouped_advantages
from tempsamp_kernels.grpo import fused_linear_grpo_loss
from tempsamp_kernels.liger import FusedLinearGRPOLoss, triton_grpo_loss
from tempsamp_kernels.logits import fused_selective_log_softmax, logits_logprob
from tempsamp_kernels.logprob import linear_logprob
from tempsamp_kernels.metrics import LossMetrics

__version__ = "0.1.0"
__all__ = [
    "FusedLinearGRPOLoss",
    "LossMetrics",
    "fused_linear_grpo_loss",
    "fused_selective_log_softmax",
    "grouped_advantages",
    "linear_logprob",
    "logits_logprob",
    "triton_grpo_loss",
]
