"""The sizes of a decoder that FLOPs and memory are counted from, by transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tempsamp_fast.model.families import family_of


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text model's layers; those of linear layers and experts are 0 where it has none."""

    hidden: int
    query: int
    """Of all heads together, as all sizes here."""
    key: int
    num_attending: int
    """Layers that attend."""
    num_linear: int
    linear_key: int
    linear_value: int
    linear_heads: int
    """Of the values."""
    state: int
    """Elements of what a linear layer remembers of one sequence, its convolution's last inputs not among them."""
    kernel: int
    """Of the convolution."""
    output_gate: int
    """Of what scales an attending layer's output."""
    mlp_products: int
    """Multiply-adds per token of all MLPs together, routers and the experts that a token passes among them."""
    intermediate: int
    """Of the MLPs that a token passes in a layer, on average."""

    @property
    def num_layers(self) -> int:
        return self.num_attending + self.num_linear

    @property
    def channels(self) -> int:
        """Of a linear layer's convolution: queries, keys and values."""
        return 2 * self.linear_key + self.linear_value

    @property
    def products(self) -> int:
        """Multiply-adds per token of all layers together, but for attention itself."""
        attending = self.hidden * (2 * self.query + self.output_gate + 2 * self.key)
        projected = self.channels + 2 * self.linear_value + 2 * self.linear_heads
        # A state is read, corrected and read again for every token.
        linear = self.hidden * projected + self.kernel * self.channels + 3 * self.state
        return self.num_attending * attending + self.num_linear * linear + self.mlp_products


def text_shape(config: Any) -> TextShape:
    """The shape of a model's decoder. Raises ValueError for a type that is not supported."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query = text.num_attention_heads * head_dim
    num_linear = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
    linear = dict.fromkeys(("linear_key", "linear_value", "linear_heads", "state", "kernel"), 0)
    if num_linear:
        heads, value_dim = text.linear_num_value_heads, text.linear_value_head_dim
        linear = {
            "linear_key": text.linear_num_key_heads * text.linear_key_head_dim,
            "linear_value": heads * value_dim,
            "linear_heads": heads,
            "state": heads * text.linear_key_head_dim * value_dim,
            "kernel": text.linear_conv_kernel_dim,
        }
    widths = [_mlp_width(text, layer) for layer in range(text.num_hidden_layers)]
    return TextShape(
        hidden=text.hidden_size,
        query=query,
        key=text.num_key_value_heads * head_dim,
        num_attending=text.num_hidden_layers - num_linear,
        num_linear=num_linear,
        output_gate=query if family_of(config).has_output_gate else 0,
        mlp_products=text.hidden_size * sum(3 * width + routed for width, routed in widths),
        intermediate=round(sum(width for width, _ in widths) / len(widths)),
        **linear,
    )


def _mlp_width(text: Any, layer: int) -> tuple[int, int]:
    """Of the MLPs that a token passes in a layer, their intermediate size; outputs of what routes it there."""
    num_experts = getattr(text, "num_experts", None) or 0
    every = getattr(text, "decoder_sparse_step", 1)
    if not num_experts or layer in (getattr(text, "mlp_only_layers", None) or ()) or (layer + 1) % every:
        return text.intermediate_size, 0
    shared = getattr(text, "shared_expert_intermediate_size", 0)
    return text.num_experts_per_tok * text.moe_intermediate_size + shared, num_experts + bool(shared)
