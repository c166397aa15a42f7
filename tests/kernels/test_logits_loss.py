"""`triton_grpo_loss`: Liger-Kernel's contract, kept on logits of any layout and padding."""

import pytest
import torch
from tempsamp_kernels import triton_grpo_loss

# The interpreter computes with numpy, which warns about the log(0) and inf - inf of rows that are not counted.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
IMPLS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_ONLY = ("cispo", "sapo", "vespo")
LOSS_TYPES = [
    (loss_type, level)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", *TOKEN_ONLY)
    for level in ("token", "sequence")
    if level == "token" or loss_type not in TOKEN_ONLY
]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three completions whose old and reference policies are far enough away that every clip branch is taken."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 33, generator=generator) * 3
    ids = torch.randint(33, (3, 8), generator=generator)
    logps = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    tensors = {
        "logits": logits,
        "old_logp": logps + torch.randn(3, 8, generator=generator) * 0.5,
        "ref_logp": logps + torch.randn(3, 8, generator=generator) * 0.3,
        "completion_ids": ids,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "completion_mask": (torch.arange(8) < torch.tensor([[8], [5], [1]])).long(),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def run(function, batch, **options):
    """Outputs of the loss and the gradient of the logits, under a different weight for every token."""
    logits = batch["logits"].clone().requires_grad_()
    outputs = function(**{**batch, "logits": logits * 1.0}, **options)
    weights = 1.0 if options.get("reduce") else torch.arange(1.0, 25.0, device=DEVICE).view(3, 8)
    (outputs[0] * weights).sum().backward()
    return outputs, logits.grad


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss_type", "level"), LOSS_TYPES)
@pytest.mark.parametrize("reduce", [False, True])
def test_loss_metrics_and_gradients_equal_ligers(batch, loss_type, level, reduce):
    """Liger's own kernels, interpreted where there is no GPU."""
    liger = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="needs liger-kernel")
    importance = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.5
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "reduce": reduce,
        "max_completion_length": 11,
        "eps_high": 1.2 if loss_type == "cispo" else 0.3,
        "delta": None if loss_type in TOKEN_ONLY else 1.5,
        "use_bias_correction_kl": level == "token",
        "vllm_is_ratio": importance.where(batch["completion_mask"].bool(), 1),
    }
    expected, expected_gradient = run(liger.triton_grpo_loss, batch, **options)
    actual, gradient = run(triton_grpo_loss, batch, **options, impl="torch")
    assert_same(actual, expected)
    # Liger 0.8.5 reads the [B, 1] factor of a reduced "luspo" as [B, L]: past its end.
    if not (reduce and loss_type == "luspo" and level == "token"):
        assert_same(gradient, expected_gradient)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "beta": 0.3, "eps_low": 0.9},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.6},
        {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0},
        {"loss_type": "vespo", "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0},
    ],
    ids=["grpo", "sapo", "vespo above 0", "vespo below 0"],
)
def test_numbers_off_their_defaults_act_as_in_liger(batch, options):
    liger = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="needs liger-kernel")
    batch["completion_mask"][:, 3:] = 0
    expected, expected_gradient = run(liger.triton_grpo_loss, batch, **options)
    actual, gradient = run(triton_grpo_loss, batch, **options, impl="torch")
    assert_same(actual, expected)
    assert_same(gradient, expected_gradient)
    without, _ = run(triton_grpo_loss, batch, loss_type=options["loss_type"], impl="torch")
    assert not torch.allclose(actual[0], without[0], rtol=1e-2)


@pytest.mark.parametrize(("loss_type", "level"), LOSS_TYPES)
def test_kernels_equal_their_torch_twin(batch, loss_type, level):
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "use_bias_correction_kl": loss_type == "grpo",
    }
    expected, expected_gradient = run(triton_grpo_loss, batch, **options, impl="torch")
    actual, gradient = run(triton_grpo_loss, batch, **options, impl="triton")
    assert_same(actual, expected)
    assert_same(gradient, expected_gradient)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reduced_gradient_is_that_of_the_reduced_per_token_loss(batch, loss_type, level):
    """Autograd over the per-token loss with the normaliser written out."""
    mask, options = batch["completion_mask"], {"loss_type": loss_type, "importance_sampling_level": level}
    logits = batch["logits"].clone().requires_grad_()
    per_token, _, _ = triton_grpo_loss(**{**batch, "logits": logits * 1.0}, **options)
    loss = {
        "grpo": lambda: (per_token.sum(-1) / mask.sum(-1)).mean(),
        "bnpo": lambda: per_token.sum() / mask.sum(),
        "dr_grpo": lambda: per_token.sum() / (3 * 8),
        "dapo": lambda: per_token.sum() / mask.sum(),
        "luspo": lambda: (per_token * mask.sum(-1, keepdim=True)).mean(),
    }[loss_type]()
    loss.backward()
    (reduced, _), gradient = run(triton_grpo_loss, batch, **options, reduce=True)
    assert_same(reduced, loss)
    assert_same(gradient, logits.grad)


def test_batch_takes_every_clip_branch(batch):
    _, _, is_clipped = triton_grpo_loss(**batch, eps_high=0.2)
    clipped, counted = is_clipped.bool(), batch["completion_mask"].bool()
    for sign in (1, -1):
        rows = (batch["advantages"].sign() == sign)[:, None] & counted
        assert (clipped & rows).any() and (~clipped & rows).any()
    assert not clipped[~counted].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_whatever_padding_holds_changes_nothing(batch, impl, level):
    expected = run(triton_grpo_loss, batch, importance_sampling_level=level, impl=impl)
    padding = batch["completion_mask"] == 0
    for name in ("old_logp", "ref_logp"):
        batch[name] = batch[name].masked_fill(padding, torch.nan)
    batch["completion_ids"] = batch["completion_ids"].masked_fill(padding, -100)
    logits = batch["logits"].clone()
    logits[:, :-1][padding] = torch.nan
    logits[:, -1] = torch.nan
    poisoned = logits.requires_grad_()
    outputs = triton_grpo_loss(**{**batch, "logits": poisoned}, importance_sampling_level=level, impl=impl)
    (outputs[0] * torch.arange(1.0, 25.0, device=DEVICE).view(3, 8)).sum().backward()
    assert_same((outputs, poisoned.grad), expected)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_all_masked_batch_gives_a_zero_loss_with_a_gradient(batch, reduce, loss_type):
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    outputs, gradient = run(triton_grpo_loss, batch, reduce=reduce, loss_type=loss_type)
    assert not outputs[0].any()
    assert not gradient.any()


def test_without_old_log_probs_the_gradient_is_that_of_advantage_times_log_prob(batch):
    batch["old_logp"] = batch["ref_logp"] = None
    (per_token, kl, _), gradient = run(triton_grpo_loss, batch, beta=0.0)
    assert kl is None
    mask, ids = batch["completion_mask"], batch["completion_ids"]
    assert_same(per_token, -batch["advantages"][:, None] * mask)
    logits = batch["logits"].clone().requires_grad_()
    logps = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    weights = torch.arange(1.0, 25.0, device=DEVICE).view(3, 8) * mask
    (-batch["advantages"][:, None] * logps * weights).sum().backward()
    assert_same(gradient, logits.grad)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"ref_logp": None}, "ref_logp"),
        ({"temperature": 0.0}, "temperature"),
        ({"impl": "cuda"}, "impl"),
        ({"completion_ids": torch.zeros(3, 9, dtype=torch.int64)}, "ids"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(batch, options, named):
    with pytest.raises(ValueError, match=named):
        triton_grpo_loss(**{**batch, **options})
