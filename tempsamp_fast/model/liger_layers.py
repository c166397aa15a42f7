"""Fused layers in the modules of one model: same parameters, same names, fewer kernels and activations.

Liger's RMSNorm and SwiGLU wherever the model has them, its rotary positions in the text layers. transformers lays the
three mrope axes into one pair of cosines and sines before the first layer, so that what is left to fuse per layer is
the plain rotation. The tower's rotation is our own. Only the given model changes: transformers' own classes and
functions stay as they are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from tempsamp_kernels.optional_triton import has_triton, triton
from torch import Tensor, nn
from transformers import PreTrainedModel

from tempsamp_fast.config import LigerLayers
from tempsamp_fast.model.attention import vision_attention
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.tower_rotation import RotatedInPlace

HAS_LIGER = has_triton and find_spec("liger_kernel") is not None
if HAS_LIGER:
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

logger = logging.getLogger(__name__)

SILU = ("SiLU", "SiLUActivation")
"""The names of torch's module and of transformers' own."""
ROTARY = "apply_rotary_pos_emb"
"""What transformers' text attention calls, by its global name."""
TOWER_ROTARY = "apply_rotary_pos_emb_vision"
"""What its tower's attention calls."""


def apply_liger_layers(model: PreTrainedModel, choice: LigerLayers) -> None:
    """Switch `model` to Liger's layers: "auto" does where they run, which is on CUDA, and warns if they are missing.

    Raises ValueError for "on" without liger-kernel or CUDA, naming an activation that is not SwiGLU's, and for
    attention that rotates in another way.
    """
    if choice == "off" or (choice == "auto" and not torch.cuda.is_available()):
        return
    if not HAS_LIGER:
        if choice == "on":
            raise ValueError("liger_layers='on' needs liger-kernel, not installed; choose auto or off")
        logger.warning("liger-kernel is not installed: transformers' own layers run, slower and with more memory")
        return
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        raise ValueError("liger_layers='on' needs a CUDA GPU, and there is none; choose auto or off")
    family = family_of(model.config)
    rms_norm = _fused_norm(family.norm_offset, family.norm_casting)
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)
        elif isinstance(getattr(module, "gate_proj", None), nn.Module):
            if type(module.act_fn).__name__ not in SILU:
                raise ValueError(
                    f"liger_layers={choice!r}: the activation {type(module.act_fn).__name__} of {name} is not "
                    "supported, only SiLU is; choose off"
                )
            module.forward = MethodType(_swiglu, module)
    for layer in model.model.language_model.layers:
        if (attention := getattr(layer, "self_attn", None)) is not None:
            attention.forward = MethodType(_with_fused_rotation(type(attention).forward), attention)
    for block in model.model.visual.blocks:
        _plain_forward(type(block.attn).forward, TOWER_ROTARY)
        block.attn.forward = MethodType(_tower_attention, block.attn)


def _fused_norm(offset: float, casting: str) -> Callable[[Any, Tensor], Tensor]:
    """RMSNorm whose weights are `offset` larger than the module's; `casting` as of `Family.norm_casting`."""

    def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype; the root mean square is taken in float32."""
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return LigerRMSNormFunction.apply(hidden, module.weight, epsilon, offset, casting, False, None)

    return _rms_norm


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden)))


def _tower_attention(
    module: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' contract: patches [N, hidden_size], in windows that begin at cu_seqlens [W + 1]."""
    cos, sin = (angles.float().contiguous() for angles in position_embeddings)
    qkv = module.qkv(hidden_states)
    if qkv._is_view():  # as a backward hook on the module gives it
        qkv = qkv.clone()
    qkv = RotatedInPlace.apply(qkv, cos, sin, module.num_heads)
    heads = qkv.view(len(qkv), 3, module.num_heads, -1).unbind(1)
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in heads)
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    output, _ = vision_attention(
        module, query, key, value, None, module.scaling, cu_seq_lens_q=cu_seqlens, max_length_q=longest
    )
    return module.proj(output.reshape(len(qkv), -1))


def _with_fused_rotation(forward: Callable[..., Any]) -> FunctionType:
    """transformers' attention forward over the same globals, save for the rotation it finds among them."""
    plain = _plain_forward(forward, ROTARY)
    namespace = {**plain.__globals__, ROTARY: LigerRopeFunction.apply}
    fused = FunctionType(plain.__code__, namespace, plain.__name__, plain.__defaults__, plain.__closure__)
    fused.__kwdefaults__ = plain.__kwdefaults__
    return fused


def _plain_forward(forward: Callable[..., Any], rotary: str) -> FunctionType:
    """`forward` without decorators. Raises ValueError unless it calls `rotary`."""
    plain = inspect.unwrap(forward)
    if not isinstance(plain, FunctionType) or rotary not in plain.__code__.co_names:
        raise ValueError(f"liger_layers: {forward.__qualname__} of this transformers release does not call {rotary}")
    return plain
