"""verl's fused head (`actor_rollout_ref.model.use_fused_kernels=True`, backend triton) on our log-prob."""

from importlib import import_module

import torch

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.logprob import linear_logprob


def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [..., H], weight [V, H], labels [...] -> (log-probs, entropy), flat float32 [N], as verl returns them."""
    if reduction != "none":
        raise ValueError(f"reduction={reduction!r} is not supported: verl's trainers use 'none'")
    if dist_process_group is not None:
        raise ValueError("dist_process_group (a head sharded over the vocabulary) is not supported: pass None")
    return linear_logprob(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature)


def patch_verl() -> Patch:
    """Rebind `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`, which verl's models import at each forward.

    Calls that ask for a reduction or for a vocabulary-parallel head raise ValueError naming the option.
    """
    module = import_module("verl.utils.kernel.linear_cross_entropy")
    return Patch(module, "linear_cross_entropy", _linear_cross_entropy)
