"""Trainers of other projects on these kernels: what they compute must not change."""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tempsamp_kernels import (
    FusedLinearGRPOLoss,
    fused_linear_grpo_loss,
    fused_selective_log_softmax,
    linear_logprob,
    logits_logprob,
    triton_grpo_loss,
)
from tempsamp_kernels.integrations import patch_trl, patch_verl
from tempsamp_kernels.integrations import trl as trl_integration
from tempsamp_kernels.integrations.trl import fused_logprob

WORDS = ["<pad>", "<eos>", *"abcdefghijklmn"]


@pytest.fixture
def head():
    """hidden, weight, bias and targets of a small head; a factory, so that every caller has its own gradients."""

    def make():
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in [(11, 8), (37, 8), (37,)])
        targets = torch.randint(37, (11,), generator=generator)
        return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets

    return make


def trl_call(function, head, softcap, logit_scale, with_bias):
    hidden, weight, bias, targets = head
    logp, entropy, *rest = function.apply(
        hidden, weight, bias if with_bias else None, targets, 0.7, 16, softcap, logit_scale, ("log_probs", "entropy")
    )
    assert rest == [None, None, None]
    (logp.sin().sum() + entropy.square().sum()).backward()
    return logp, entropy, hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_log_probs_entropy_and_gradients_equal_those_of_trl(head, softcap, logit_scale, with_bias):
    kernels = pytest.importorskip("trl.kernels", reason="needs a TRL with a fused head")
    theirs = trl_call(kernels.ChunkedLogProbFunction, head(), softcap, logit_scale, with_bias)
    ours = trl_call(SimpleNamespace(apply=fused_logprob), head(), softcap, logit_scale, with_bias)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_calls_for_other_outputs_keep_trls_own_function(head):
    """SFT, DPO and KTO: what they compute is TRL's to the bit, patched or not."""
    kernels = pytest.importorskip("trl.kernels", reason="needs a TRL with a fused head")
    outputs = ("log_probs", "is_top1", "mean_logits")
    theirs = kernels.ChunkedLogProbFunction.apply(*head(), 1.0, 16, None, 1.0, outputs)
    ours = fused_logprob(*head(), 1.0, 16, None, 1.0, outputs)
    assert any(value is not None for value in theirs[2:])
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual is None and expected is None) or torch.equal(actual, expected)


def test_backward_gathers_a_sharded_head_again_as_trl_does(head, monkeypatch):
    """Under ZeRO-3 the weight is whole only inside TRL's context, which TRL itself enters for the forward alone."""
    utils = pytest.importorskip("trl.trainer.utils")
    entered = []

    @contextmanager
    def gather(*parameters):
        entered.append(parameters)
        yield

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    hidden, weight, bias, targets = head()
    logp, *_ = fused_logprob(hidden, weight, bias, targets, 1.0, 16)
    assert not entered
    logp.sum().backward()
    ((gathered_weight, gathered_bias),) = entered
    assert gathered_weight is weight and gathered_bias is bias


def test_trl_patch_rebinds_one_name_until_undone_and_says_what_it_costs(head):
    utils = pytest.importorskip("trl.trainer.utils")
    original = utils._ChunkedLogProbFunction
    with patch_trl(impl="torch") as patch:
        assert utils._ChunkedLogProbFunction.apply.func is fused_logprob
        logp, *_ = utils._ChunkedLogProbFunction.apply(*head(), 1.0, 16)
        assert torch.equal(logp, fused_logprob(*head(), 1.0, 16)[0])
    assert utils._ChunkedLogProbFunction is original
    assert "GRPO" in repr(patch) and "8NHV" in repr(patch) and "stay TRL's own" in repr(patch)


def module(monkeypatch, name: str, **attributes) -> ModuleType:
    """A stand-in for a module that is not installed in this version."""
    stand_in = ModuleType(name)
    stand_in.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def test_older_trl_gets_our_class_in_place_of_ligers(monkeypatch):
    module(monkeypatch, "trl.trainer.utils")
    trainer = module(monkeypatch, "trl.trainer.grpo_trainer", LigerFusedLinearGRPOLoss=object)
    with patch_trl():
        assert trainer.LigerFusedLinearGRPOLoss is FusedLinearGRPOLoss
    assert trainer.LigerFusedLinearGRPOLoss is object


def test_trl_without_either_interface_is_refused(monkeypatch):
    module(monkeypatch, "trl.trainer.utils")
    module(monkeypatch, "trl.trainer.grpo_trainer")
    with pytest.raises(ValueError, match="fused head"):
        patch_trl()


TRITON = "verl.utils.kernel.linear_cross_entropy"


def test_verl_gets_log_probs_and_entropy_of_both_backends_with_gradients(head, monkeypatch):
    """Called as `verl.models.transformers.dense_common` does: flat from the Triton function, [1, N] from the class."""
    verl = module(monkeypatch, TRITON, linear_cross_entropy=None)
    default = module(monkeypatch, "verl.utils.experimental.torch_functional", FusedLinearForPPO=None)
    megatron = module(monkeypatch, "verl.models.mcore.model_forward_fused", linear_cross_entropy=None)
    hidden, weight, _, labels = head()
    with patch_verl(impl="torch") as patch:
        assert megatron.linear_cross_entropy is verl.linear_cross_entropy
        logp, entropy = verl.linear_cross_entropy(hidden.unsqueeze(0), weight, labels.unsqueeze(0), 0.7, "none")
        layer = default.FusedLinearForPPO()
        rows = layer(hidden_states=hidden[None], vocab_weights=weight, input_ids=labels[None].int(), temperature=0.7)
    assert verl.linear_cross_entropy is default.FusedLinearForPPO is megatron.linear_cross_entropy is None
    assert "triton and torch" in repr(patch) and "1 Megatron modules" in repr(patch)
    torch.testing.assert_close(rows, (logp[None], entropy[None]))
    (logp.sum() + entropy.sum()).backward()
    grads, (hidden, weight, _, _) = (hidden.grad, weight.grad), head()
    logps = (hidden @ weight.T / 0.7).log_softmax(-1)
    expected = logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)
    torch.testing.assert_close((logp, entropy), expected, rtol=1e-5, atol=1e-5)
    (expected[0].sum() + expected[1].sum()).backward()
    torch.testing.assert_close(grads, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-4)


def test_a_verl_without_a_fused_head_is_refused():
    if "verl" in sys.modules:
        pytest.skip("verl is here")
    with pytest.raises(ValueError, match="no fused head"):
        patch_verl()


@pytest.mark.parametrize(("option", "value"), [("reduction", "mean"), ("dist_process_group", object())])
def test_verl_options_without_support_are_refused_by_name(head, monkeypatch, option, value):
    """A head split over ranks among them; a group of one rank is none."""
    verl = module(monkeypatch, TRITON, linear_cross_entropy=None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    hidden, weight, _, labels = head()
    with patch_verl(), pytest.raises(ValueError, match=option):
        verl.linear_cross_entropy(hidden, weight, labels, **{option: value})


LOGGED = ("loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean")


def grpo_run(folder, with_patch: bool) -> torch.Tensor:
    """What a real `trl.GRPOTrainer` logs at every step of a tiny Qwen2, [steps, len(LOGGED)]; always the same."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(WordLevel({word: id_ for id_, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    set_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)  # the reference model is loaded from where the policy was
    arguments = GRPOConfig(
        output_dir=folder,
        max_steps=8,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        beta=0.1,
        num_iterations=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    with patch_trl() if with_patch else nullcontext():
        trainer = GRPOTrainer(
            model=Qwen2ForCausalLM.from_pretrained(folder),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(text.count("a") - text.count("b")) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e f g"] * 4}),
        )
        trainer.train()
    return torch.tensor([[entry[name] for name in LOGGED] for entry in trainer.state.log_history if "loss" in entry])


def test_grpo_trainer_follows_the_unpatched_run(tmp_path, monkeypatch):
    """Eight steps of a real trainer, two per generation so that ratios leave 1: loss, KL, entropy, gradient norm."""
    pytest.importorskip("trl", reason="needs TRL")
    calls = []
    counted = lambda *arguments, **options: calls.append(1) or fused_logprob(*arguments, **options)
    monkeypatch.setattr(trl_integration, "fused_logprob", counted)
    expected = grpo_run(tmp_path, with_patch=False)
    assert not calls and expected.shape == (8, 5) and expected[:, -1].any()
    torch.testing.assert_close(grpo_run(tmp_path, with_patch=True), expected, rtol=1e-3, atol=1e-5)
    assert calls


def test_the_recipe_for_trainers_that_hold_logits_gives_their_loss():
    """The lines of kernels/README.md, as they stand there."""
    readme = (Path(__file__).parents[2] / "kernels/README.md").read_text()
    code = readme.split("## Trainers that hold the logits")[1].split("```python\n")[1].split("```")[0]
    logits, ref_logits = torch.randn(2, 3, 6, 11)  # [B, L + 1, V] each
    logits.requires_grad_()
    ids, mask = torch.randint(11, (3, 5)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 4 + [0]])
    advantages = torch.randn(3)
    names = {"model": lambda **_: SimpleNamespace(logits=1.0 * logits), "inputs": {}, "ref_logits": ref_logits}
    names |= {"completion_ids": ids, "completion_mask": mask, "advantages": advantages}
    names |= {"fused_selective_log_softmax": fused_selective_log_softmax, "triton_grpo_loss": triton_grpo_loss}
    exec(code, names)
    logps, ref_logps = (of[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0] for of in (logits, ref_logits))
    delta = ref_logps - logps
    per_token = -(logps - logps.detach()).exp() * advantages[:, None] + 0.04 * (delta.exp() - delta - 1)
    expected = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(names["loss"], expected)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (names["loss"], expected))
    torch.testing.assert_close(ours, theirs)


def recipe(after: str) -> str:
    """The first block of code in kernels/README.md behind the line that starts so."""
    readme = (Path(__file__).parents[2] / "kernels/README.md").read_text()
    return readme.split(after)[1].split("```python\n")[1].split("```")[0]


def test_the_recipe_for_prime_rl_gives_log_probs_and_entropy_under_a_temperature_per_token(head):
    """Called as its models call `FusedOutputLinear`: hidden states [B, S, H], labels and temperature [B, S]."""
    lm_head = SimpleNamespace(FusedOutputLinear=type("FusedOutputLinear", (torch.nn.Linear,), {}), PrimeLmOutput=dict)
    exec(recipe("prime-rl (`lm_head`"), {"lm_head": lm_head, "linear_logprob": linear_logprob})
    hidden, weight, _, targets = head()
    layer = lm_head.FusedOutputLinear(8, 37, bias=False)
    layer.weight.data = weight.detach()
    temperature = torch.linspace(0.5, 1.5, 11)[None]
    found = layer(hidden[None], labels=targets[None], temperature=temperature)
    logps = (hidden @ weight.T / temperature[0, :, None]).log_softmax(-1)
    torch.testing.assert_close(found["logprobs"][0], logps.gather(-1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["entropy"][0], -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-5)
    found["logprobs"].sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_the_recipe_for_easyr1_and_openrlhf_gives_the_log_prob_of_every_row(shape):
    """Packed rows [N, V] of EasyR1's padding-free path, padded ones [B, T, V], and OpenRLHF's temperature."""
    functional = SimpleNamespace()
    exec(recipe("EasyR1, padding-free"), {"functional": functional, "logits_logprob": logits_logprob})
    logits, labels = torch.randn(*shape, 13, requires_grad=True), torch.randint(13, shape)
    for temperature in (1.0, 0.7):
        found = functional.log_probs_from_logits(logits, labels, temperature=temperature)
        expected = (logits / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(value.sum(), logits)[0] for value in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_recipe_for_ms_swift_puts_our_class_in_ligers_place(monkeypatch):
    """It imports the class from the package when its trainer is made, with keywords of Liger's alone."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    monkeypatch.setattr(chunked_loss, "LigerFusedLinearGRPOLoss", chunked_loss.LigerFusedLinearGRPOLoss)
    exec(recipe("ms-swift, before"), {"FusedLinearGRPOLoss": FusedLinearGRPOLoss})
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, epsilon_low=0.2, epsilon_high=0.3, temperature=0.9, use_ref_model=False,
        loss_type="grpo", max_completion_length=9, importance_sampling_level="sequence",
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    )  # fmt: skip
    assert isinstance(loss, FusedLinearGRPOLoss)


def test_the_rejection_rules_of_the_readme_are_arguments_of_the_loss(packed):
    """The lines as they stand there, each given to the call that its comment names."""
    batch = packed([3, 2], masked=0.0)
    lengths, num_rows = torch.tensor([3.0, 2.0]), 2
    rollout = batch.old_logps + torch.linspace(-0.1, 0.1, 5)
    names = {"torch": torch, "old_logps": batch.old_logps, "rollout_logps": rollout, "num_rows": num_rows}
    names |= {"row_ids": batch.row_ids, "lengths": lengths, "entropy": torch.rand(5), "mask": batch.mask}
    exec(recipe("Rules about whole completions"), names)
    for options in (
        {"importance_weights": names["weights"], "importance_cap": 2.0},
        {"importance_weights": names["row_weights"]},
        {"row_mask": names["row_mask"]},
        {"entropy_threshold": names["threshold"]},
    ):
        loss, _ = fused_linear_grpo_loss(*batch.inputs(), advantages=batch.advantages, **options)
        assert loss.isfinite()
