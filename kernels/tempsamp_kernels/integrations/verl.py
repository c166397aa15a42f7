"""verl's fused head (`actor_rollout_ref.model.use_fused_kernels=True`), either backend, on our log-prob."""

import logging
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.logprob import linear_logprob

logger = logging.getLogger(__name__)
TRITON, TORCH = "verl.utils.kernel.linear_cross_entropy", "verl.utils.experimental.torch_functional"
MEGATRON = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")
"""Modules that keep the Triton function under its name from their import on."""


def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [..., H], weight [V, H], labels [...] -> (log-probs, entropy), flat float32 [N], as verl returns them."""
    if reduction != "none":
        raise ValueError(f"reduction={reduction!r} is not supported: verl's trainers use 'none'")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError("dist_process_group of several ranks (tensor parallel head) is not supported: use one rank")
    ids = labels.reshape(-1).to(torch.int64)
    return linear_logprob(hidden.reshape(-1, hidden.shape[-1]), weight, ids, temperature=temperature, impl=impl)


class _FusedLinearForPPO(torch.nn.Module):
    """In place of verl's class for `impl_backend: torch`, its default; `chunk_size` steers verl's own chunking."""

    def __init__(self, chunk_size: int = 512, impl: str | None = None) -> None:
        super().__init__()
        self.impl = impl

    def forward(
        self,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [..., H], input_ids [...] -> (log-probs, entropy), float32 [...]."""
        ids = input_ids.to(torch.int64)
        return linear_logprob(hidden_states, vocab_weights, ids, temperature=temperature, impl=self.impl)


def patch_verl(impl: str | None = None) -> Patch:
    """Rebind what verl's models call for log-probs: both backends of its fused head, and in its Megatron modules.

    FSDP models import either backend at each forward; Megatron modules that are imported already are rebound, too.
    Calls that ask for a reduction or for a head split over ranks raise ValueError naming the option. What applies is
    logged and `applies_to` of the result. Raises ValueError where verl has no fused head.
    """
    function, layer = partial(_linear_cross_entropy, impl=impl), partial(_FusedLinearForPPO, impl=impl)
    found = [name for name in (TRITON, TORCH) if name in sys.modules or _exists(name)]
    if not found:
        raise ValueError(f"this verl has neither {TRITON} nor {TORCH}: there is no fused head to patch")
    replacements = {TRITON: ("linear_cross_entropy", function), TORCH: ("FusedLinearForPPO", layer)}
    changes = [(import_module(name), *replacements[name]) for name in found]
    loaded = [sys.modules[name] for name in MEGATRON if name in sys.modules]
    changes += [(module, "linear_cross_entropy", function) for module in loaded]
    backends = " and ".join({TRITON: "triton", TORCH: "torch"}[name] for name in found)
    patch = Patch(
        f"log-probs and entropy of verl's fused head run on tempsamp_kernels for impl_backend {backends}, only with "
        f"actor_rollout_ref.model.use_fused_kernels=True; {len(loaded)} Megatron modules were rebound",
        *changes,
    )
    logger.warning(patch.applies_to)
    return patch


def _exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
