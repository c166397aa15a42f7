"""Liger's fused layers, in Triton's interpreter: the same logits and gradients, in packed rows and in decoding."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from triton.runtime import interpreter

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.model import tower_rotation
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.generate import SamplingParams, generate

PARAMS = SamplingParams(max_completion_length=6)


class Scalar(float):
    """A float argument of a kernel, which the interpreter leaves without the methods that compiled code has."""

    def to(self, dtype: object) -> Scalar:
        return self


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels, Liger's made to run in the interpreter; the names of the launches so far."""
    names: list[str] = []
    for layer in ("rms_norm", "swiglu", "rope"):
        module = import_module(f"liger_kernel.ops.{layer}")
        for way in ("forward", "backward"):
            name, launch = f"{layer}_{way}", getattr(module, f"{layer}_{way}")
            note = lambda *args, _name=name, _launch=launch, **kw: names.append(_name) or _launch(*args, **kw)
            monkeypatch.setattr(module, name, note)
    turn = tower_rotation._rotate
    monkeypatch.setattr(
        tower_rotation,
        "_rotate",
        lambda *args: names.append(f"tower_{'backward' if args[-1] else 'forward'}") or turn(*args),
    )
    monkeypatch.setattr(import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: tl.rsqrt(x))
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: Scalar(x) if type(x) is float else convert(x))
    return names


def fused_model(tiny):
    model = tiny.model()
    apply_liger_layers(model, "on")
    return model


def small_group(tiny) -> RolloutGroup:
    """The interpreter takes milliseconds per token and layer."""
    return tiny.group(tiny.prompt((1, 4, 4), num_text=2), [2, 1])


def test_packed_rows_of_fused_layers_equal_plain(oracle, tiny, launches) -> None:
    """Under checkpointing, which runs every layer forward twice and backward once."""
    oracle.rtol = 5e-5  # kernels round once more than the plain layers
    groups = [small_group(tiny)]
    rows = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    policy = Policy(fused_model(tiny), gradient_checkpointing=True)
    oracle.assert_same(oracle.packed_pass(policy, rows), oracle.plain_pass(tiny, groups))
    layers = ("rms_norm", "swiglu", "rope", "tower")
    assert {f"{layer}_{way}" for layer in layers for way in ("forward", "backward")} == set(launches)


def test_fused_layers_sample_the_same_answers(tiny, launches) -> None:
    prompts = [small_group(tiny).prompt]
    draw = lambda model: generate(Policy(model), prompts, 2, PARAMS, seed=(0,), eos_token_ids=[7])
    fused, plain = draw(fused_model(tiny)), draw(tiny.model())
    assert launches
    assert [a.ids.tolist() for a in fused[0]] == [a.ids.tolist() for a in plain[0]]


def test_a_copy_of_a_fused_model_uses_its_own_weights(tiny, launches) -> None:
    """The reference is a deep copy of the policy."""
    model = fused_model(tiny)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert copied.model.language_model.norm(torch.ones(1, 32)).abs().sum() > 0


def test_other_models_keep_their_layers(tiny, launches) -> None:
    fused_model(tiny)
    (row,) = pack(tiny.groups()[:1], config=tiny.model().config, max_tokens_per_row=10_000)
    Policy(tiny.model())(row).sum().backward()
    assert launches == []


@pytest.mark.parametrize(
    ("choice", "has_cuda", "is_fused"), [("auto", False, False), ("auto", True, True), ("off", True, False)]
)
def test_auto_is_on_with_cuda(
    tiny, monkeypatch: pytest.MonkeyPatch, choice: str, has_cuda: bool, is_fused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    model = tiny.model()
    apply_liger_layers(model, choice)
    assert ("forward" in vars(model.model.language_model.norm)) == is_fused


def test_on_without_a_gpu_is_refused(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"liger_layers='on'.*auto or off"):
        apply_liger_layers(tiny.model(), "on")


def test_another_activation_is_refused_by_name(tiny) -> None:
    model = tiny.model()
    model.model.language_model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match=r"GELU of model\.language_model\.layers\.1\.mlp.*choose off"):
        apply_liger_layers(model, "on")


def test_attention_that_rotates_elsewhere_is_refused(tiny) -> None:
    model = tiny.model()

    attention = next(layer.self_attn for layer in model.model.language_model.layers if hasattr(layer, "self_attn"))

    class OtherAttention(type(attention)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    attention.__class__ = OtherAttention
    with pytest.raises(ValueError, match=r"OtherAttention.*apply_rotary_pos_emb"):
        apply_liger_layers(model, "on")


def test_a_tower_that_rotates_elsewhere_is_refused(tiny) -> None:
    model = tiny.model()
    attention = model.model.visual.blocks[0].attn

    class OtherAttention(type(attention)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    attention.__class__ = OtherAttention
    with pytest.raises(ValueError, match=r"OtherAttention.*apply_rotary_pos_emb_vision"):
        apply_liger_layers(model, "on")


def test_a_plain_forward_and_a_hooked_projection_go_through_the_fused_tower(tiny, launches) -> None:
    """Two frames, transformers' own call, which says nothing of the longest one, and a hook whose output is a view."""
    outputs = []
    for model in (tiny.model(), fused_model(tiny)):
        visual = model.model.visual
        visual.blocks[0].attn.qkv.register_full_backward_hook(lambda *_: None)
        video = tiny.prompt((2, 4, 4), num_text=2).video
        pixels = video.pixel_values.to(visual.dtype)
        found = visual(pixels, grid_thw=torch.tensor([video.grid_thw])).pooler_output
        pooled = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
        pooled.square().sum().backward()
        outputs.append([pooled, *(parameter.grad for parameter in visual.parameters() if parameter.grad is not None)])
    for plain, fused in zip(*outputs, strict=True):
        assert (fused - plain).norm() < 1e-4 * plain.norm()
    assert "tower_backward" in launches


@pytest.mark.gpu
def test_fused_layers_on_a_gpu_equal_plain(oracle, tiny) -> None:
    """Compiled, in fp32: logits and every gradient."""
    rows = [row.to("cuda") for row in pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)]
    passes = []
    for choice in ("on", "off"):
        model = tiny.model().cuda()
        apply_liger_layers(model, choice)
        policy = Policy(model, gradient_checkpointing=True).train()
        oracle.packed_logits(policy, rows).square().sum().backward()
        passes.append([parameter.grad for parameter in policy.parameters()])
    for fused, plain in zip(*passes, strict=True):
        assert (fused - plain).norm() < 1e-4 * plain.norm()
