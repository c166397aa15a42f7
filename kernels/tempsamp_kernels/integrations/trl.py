"""TRL's trainers on our log-prob (TRL with a fused head) or our loss (older TRL with Liger's class)."""

import logging
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import torch

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.liger import FusedLinearGRPOLoss
from tempsamp_kernels.logprob import linear_logprob

logger = logging.getLogger(__name__)
SUPPORTED_OUTPUTS = ("log_probs", "entropy")
FUSED_HEAD = (
    "log-probs and entropy of TRL's fused head (GRPO, RLOO) run on tempsamp_kernels, at 8NHV FLOPs, 6NHV where one "
    "chunk of logits holds the batch; calls for other outputs (SFT, DPO, KTO: is_top1, mean_logits) stay TRL's own"
)
LIGER_LOSS = "the GRPO loss of trainers made from now on with use_liger_kernel=True runs on tempsamp_kernels, at 6NHV"


def fused_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = SUPPORTED_OUTPUTS,
    impl: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """What TRL calls as `_ChunkedLogProbFunction.apply`.

    hidden [N, H], weight [V, H], targets [N] -> (log-probs, entropy or None, None, None, None), float32 [N].
    `chunk_size` is TRL's tile width in columns; our chunks are rows over the whole vocabulary, so it says nothing.
    """
    if set(outputs) - set(SUPPORTED_OUTPUTS):
        theirs = import_module("trl.kernels").ChunkedLogProbFunction.apply
        arguments = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
        return theirs(*arguments, outputs)
    logp, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        gather=import_module("trl.trainer.utils").maybe_gather_lm_head_ctx,
        impl=impl,
    )
    return logp, entropy if "entropy" in outputs else None, None, None, None


def patch_trl(impl: str | None = None) -> Patch:
    """Make TRL's trainers use these kernels, whichever of its two interfaces the installed version has.

    With a fused head (`trl.trainer.utils.add_fused_lm_head`) the log-prob function is rebound, for trainers that exist
    already too; those that ask it for more than log-probs and entropy (SFT, DPO, KTO) keep TRL's own for it.
    Older versions with `use_liger_kernel=True` take Liger's class from `trl.trainer.grpo_trainer` when a trainer is
    constructed, so patch before. What applies is logged and `applies_to` of the result. Raises ValueError where TRL has
    neither.
    """
    utils = import_module("trl.trainer.utils")
    if hasattr(utils, "add_fused_lm_head"):
        function = SimpleNamespace(apply=partial(fused_logprob, impl=impl))
        patch = Patch(FUSED_HEAD, (utils, "_ChunkedLogProbFunction", function))
    else:
        grpo_trainer = import_module("trl.trainer.grpo_trainer")
        if not hasattr(grpo_trainer, "LigerFusedLinearGRPOLoss"):
            version = import_module("trl").__version__
            raise ValueError(f"trl {version} has neither a fused head nor, with liger-kernel installed, Liger's loss")
        loss = FusedLinearGRPOLoss if impl is None else partial(FusedLinearGRPOLoss, impl=impl)
        patch = Patch(LIGER_LOSS, (grpo_trainer, "LigerFusedLinearGRPOLoss", loss))
    logger.info(patch.applies_to)
    return patch
