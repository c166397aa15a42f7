"""TRL's GRPO on our log-prob (TRL with a fused head) or our loss (older TRL with Liger's class)."""

from importlib import import_module

import torch

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.liger import FusedLinearGRPOLoss
from tempsamp_kernels.logprob import linear_logprob

SUPPORTED_OUTPUTS = ("log_probs", "entropy")


class _FusedLogProb:
    """What TRL calls as `_ChunkedLogProbFunction.apply`."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = SUPPORTED_OUTPUTS,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        """hidden [N, H], weight [V, H], targets [N] -> (log-probs, entropy or None, None, None, None), float32 [N].

        `chunk_size` is TRL's tile width in columns; our chunks are rows over the whole vocabulary, so it says nothing.
        """
        unsupported = set(outputs) - set(SUPPORTED_OUTPUTS)
        if unsupported:
            raise ValueError(f"outputs {sorted(unsupported)} are not computed here, only {SUPPORTED_OUTPUTS}")
        gather = import_module("trl.trainer.utils").maybe_gather_lm_head_ctx
        logp, entropy = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            gather=gather,
        )
        return logp, entropy if "entropy" in outputs else None, None, None, None


def patch_trl() -> Patch:
    """Make `trl.GRPOTrainer` use these kernels, whichever of TRL's two interfaces the installed version has.

    With a fused head (`trl.trainer.utils.add_fused_lm_head`) the log-prob function is rebound, for trainers that exist
    already too; those that ask it for more than log-probs and entropy (SFT, DPO) get a ValueError naming the output.
    Older versions with `use_liger_kernel=True` take Liger's class from `trl.trainer.grpo_trainer` when a trainer is
    constructed, so patch before. Raises ValueError where TRL has neither.
    """
    utils = import_module("trl.trainer.utils")
    if hasattr(utils, "add_fused_lm_head"):
        return Patch(utils, "_ChunkedLogProbFunction", _FusedLogProb)
    grpo_trainer = import_module("trl.trainer.grpo_trainer")
    if hasattr(grpo_trainer, "LigerFusedLinearGRPOLoss"):
        return Patch(grpo_trainer, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss)
    version = import_module("trl").__version__
    raise ValueError(f"trl {version} has neither a fused head nor, with liger-kernel installed, Liger's GRPO loss")
