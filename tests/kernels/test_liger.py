"""Door B: our class and Liger's give the same loss, metrics and gradients for everything that Liger's accepts."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
from tempsamp_kernels import liger
from tempsamp_kernels.liger import FusedLinearGRPOLoss, triton_grpo_loss
from tempsamp_kernels.logits import fused_selective_log_softmax

LigerFusedLinearGRPOLoss = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
BATCH, LENGTH, HIDDEN, VOCAB = 4, 7, 12, 37
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", *TOKEN_LEVEL_ONLY)
CASES = [
    (loss_type, level)
    for loss_type in LOSS_TYPES
    for level in ("token", "sequence")
    if level == "token" or loss_type not in TOKEN_LEVEL_ONLY
]


def batch(seed=0):
    """A padded batch whose old and reference policies are far enough to reach every clip."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    hidden, weight, bias = normal(BATCH, LENGTH, HIDDEN), normal(VOCAB, HIDDEN) * 0.5, normal(VOCAB) * 0.1
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 3, 0, 5])
    logps = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, ids[..., None])[..., 0]
    return {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
        "advantages": normal(BATCH),
        "bias": bias,
        "ref_per_token_logps": logps + 0.3 * normal(BATCH, LENGTH),
        "old_per_token_logps": logps + 0.3 * normal(BATCH, LENGTH),
        "importance": torch.rand(BATCH, LENGTH, generator=generator) + 0.5,
    }


def outcome(cls, inputs, **options):
    inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
    learned = [
        inputs[name].requires_grad_() for name in ("_input", "lin_weight", "bias") if inputs.get(name) is not None
    ]
    loss, metrics = cls(**options)(**inputs)
    (1.5 * loss).backward()
    return [loss.detach(), *metrics, *(tensor.grad for tensor in learned)]


def assert_same(inputs, **options):
    theirs = outcome(LigerFusedLinearGRPOLoss, inputs, compiled=False, **options)
    ours = outcome(FusedLinearGRPOLoss, inputs, **options)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def assert_same_with(loss_type, level, beta, importance):
    inputs = batch()
    weights = inputs.pop("importance")
    if importance is not None:
        inputs["vllm_is_ratio"] = weights if importance == "token" else weights[:, 0]
    assert_same(
        inputs,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        use_ref_model=beta != 0,
        epsilon_high=1.3 if loss_type == "cispo" else 0.25,
        temperature=0.8,
        max_completion_length=9,
    )


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_loss_metrics_and_gradients_equal_ligers(loss_type, level):
    assert_same_with(loss_type, level, beta=0.1, importance="token")


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "level"), CASES)
@pytest.mark.parametrize(("beta", "importance"), [(0.0, None), (0.0, "row"), (0.0, "token"), (0.1, None), (0.1, "row")])
def test_every_mix_of_kl_and_importance_weights_equals_ligers(loss_type, level, beta, importance):
    assert_same_with(loss_type, level, beta, importance)


def assert_same_option(loss_type, level, dropped, given, options):
    inputs = {name: value for name, value in batch(1).items() if name not in (*dropped, "importance")}
    bound = 1.2 if loss_type == "cispo" else 0.2
    common = {"importance_sampling_level": level, "epsilon_high": bound, "max_completion_length": 9}
    assert_same({**inputs, **given}, loss_type=loss_type, **common, **options)


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_delta_and_corrected_kl_without_bias_equal_ligers(loss_type, level):
    assert_same_option(loss_type, level, ("bias",), {}, {"delta": 1.1, "use_bias_correction_kl": True})


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "level"), CASES)
@pytest.mark.parametrize(
    ("dropped", "given", "options"),
    [
        (("bias",), {}, {}),
        (("old_per_token_logps",), {}, {}),
        ((), {}, {"delta": 1.1}),
        ((), {}, {"use_bias_correction_kl": True}),
        (("ref_per_token_logps",), {}, {"use_ref_model": False}),
        ((), {"num_items_in_batch": 31}, {}),
    ],
    ids=["no bias", "no old", "delta", "bias-corrected KL", "no reference", "given item count"],
)
def test_every_option_acts_as_in_liger(loss_type, level, dropped, given, options):
    assert_same_option(loss_type, level, dropped, given, options)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_an_advantage_per_token_acts_as_in_liger(loss_type):
    """Without a KL term, where tokens of no advantage leave the backward pass; Liger's other losses take [B] only."""
    advantages = torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(1))
    advantages[:, ::2] = 0
    options = {"use_ref_model": False, "beta": 0.0}
    assert_same_option(loss_type, "token", ("ref_per_token_logps",), {"advantages": advantages}, options)


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sapo", {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.6}),
        ("vespo", {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0}),
        ("cispo", {"delta": 1.1}),
        ("dapo", {"chunk_size": 2}),
    ],
)
def test_parameters_of_one_loss_and_weights_of_a_column_act_as_in_liger(loss_type, options):
    given = {"vllm_is_ratio": batch(1)["importance"][:, :1], "num_items_in_batch": torch.tensor(31)}
    assert_same_option(loss_type, "token", (), given, options)


def test_ids_outside_the_vocabulary_are_refused_where_liger_reads_padding():
    inputs = {name: value for name, value in batch(1).items() if name != "importance"}
    padding = inputs["attention_mask"] == 0
    inputs["selected_token_ids"] = inputs["selected_token_ids"].masked_fill(padding, -100)
    FusedLinearGRPOLoss()(**inputs)
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 37\); got -100"):
        FusedLinearGRPOLoss(loss_type="luspo")(**inputs)


def test_reference_head_stands_in_for_reference_log_probs():
    inputs = batch(2)
    del inputs["importance"], inputs["ref_per_token_logps"]
    reference = {"ref_input": inputs["_input"] + 0.1, "ref_weight": inputs["lin_weight"] * 0.9}
    assert_same({**inputs, **reference}, beta=0.1)
    assert_same({**inputs, **reference, "ref_bias": inputs["bias"].flip(0)}, beta=0.1, temperature=0.7)


def test_a_reference_head_beside_reference_log_probs_is_left_out_with_a_warning():
    inputs = {name: value for name, value in batch().items() if name != "importance"}
    expected, _ = FusedLinearGRPOLoss()(**inputs)
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        loss, _ = FusedLinearGRPOLoss()(**inputs, ref_input=inputs["_input"], ref_weight=inputs["lin_weight"])
    assert torch.equal(loss, expected)


def test_a_frozen_head_gets_no_gradient():
    inputs = batch(3)
    del inputs["importance"]
    hidden = inputs["_input"].requires_grad_()
    loss, _ = FusedLinearGRPOLoss()(**inputs)
    loss.backward()
    assert hidden.grad is not None and inputs["lin_weight"].grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type 'ppo'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level 'row'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "'cispo'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ({"delta": -1.0}, "delta"),
    ],
)
def test_what_liger_refuses_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)


def test_what_is_not_said_is_as_in_liger():
    """The defaults of the function over logits, which differ from those over hidden states."""
    theirs = pytest.importorskip("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    ours = inspect.signature(triton_grpo_loss).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name in ours:
            assert ours[name].default == parameter.default, name
    theirs = pytest.importorskip("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    ours = inspect.signature(fused_selective_log_softmax).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("given", [None, 12.0])
def test_tokens_of_the_batch_are_counted_over_all_processes(monkeypatch, given):
    """Three of them with as many tokens each; what is given is of all of them already."""
    monkeypatch.setattr(liger.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(liger.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(liger.dist, "all_reduce", lambda tensor: tensor.mul_(3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert float(liger.items_per_process(mask, given)) == (5.0 if given is None else 4.0)


@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (LENGTH, BATCH)) for name in ("attention_mask", "old_per_token_logps", "ref_per_token_logps")),
        *(("vllm_is_ratio", shape) for shape in ((), (1,), (1, LENGTH), (BATCH, 2))),
    ],
)
def test_what_has_another_shape_is_refused_where_liger_fails(loss_type, name, shape):
    inputs = batch()
    inputs.pop("importance")
    inputs[name] = torch.ones(shape)
    with pytest.raises((RuntimeError, AssertionError)):
        LigerFusedLinearGRPOLoss(loss_type=loss_type, beta=0.1, compiled=False)(**inputs)
    with pytest.raises(ValueError, match=rf"{name} must be \[4.*; got {re.escape(str(list(shape)))}"):
        FusedLinearGRPOLoss(loss_type=loss_type, beta=0.1)(**inputs)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_computes_the_same(make):
    inputs = batch()
    inputs.pop("importance")
    module = FusedLinearGRPOLoss(loss_type="cispo", epsilon_high=1.3)
    assert torch.equal(make(module)(**inputs)[0], module(**inputs)[0])


def test_attributes_are_ligers_and_count_as_they_are_by_now():
    ours, theirs = (cls(beta=0.0, compiled=False) for cls in (FusedLinearGRPOLoss, LigerFusedLinearGRPOLoss))
    public = lambda module: {name: value for name, value in vars(module).items() if not name.startswith("_")}
    assert public(theirs).items() <= public(ours).items()
    inputs = batch()
    inputs.pop("importance")
    before = ours(**inputs)[0]
    ours.epsilon_high = theirs.epsilon_high = 5.0
    after = ours(**inputs)[0]
    assert before != after
    torch.testing.assert_close(after, theirs(**inputs)[0])


def test_supervised_losses_are_not_ligers():
    with pytest.raises(ValueError, match="loss_type 'sft' is not one of"):
        FusedLinearGRPOLoss(loss_type="sft")
    with pytest.raises(ValueError, match="loss_type 'sft' is not one of"):
        triton_grpo_loss(torch.zeros(1, 3, 5), None, None, torch.zeros(1, 2).long(), torch.ones(1), loss_type="sft")
