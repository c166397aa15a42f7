"""Log-probs from hidden states: values, both gradients, precision on confident tokens, bits that do not move, cost."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob
from tempsamp_kernels.head import ROW_MULTIPLE, TILE_ROWS, chunk_rows
from tempsamp_kernels.rows import row_blocks
from torch.utils._python_dispatch import TorchDispatchMode

IMPLS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head(num_tokens, hidden_size, vocab_size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    token_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype).requires_grad_(),
        token_ids.to(DEVICE),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_values_and_gradients_of_log_prob_and_entropy_equal_fp64(packed, naive_logprobs, softcap, impl):
    batch = packed([3, 4])
    ours, truth = batch.learned(), batch.learned(torch.float64)
    options = {"temperature": 1.3, "softcap": softcap, "logit_scale": 0.8}
    found = linear_logprob(*ours.inputs()[:3], bias=ours.bias, chunk_size=4, impl=impl, **options)
    expected = naive_logprobs(truth, **options)
    upstream = torch.linspace(-1, 1, 7, device=DEVICE)
    for logp, entropy in (found, expected):
        (logp * upstream + entropy * upstream.flip(0)).sum().backward()
    for actual, value in zip([*found, *ours.gradients()], [*expected, *truth.gradients()], strict=True):
        torch.testing.assert_close(actual, value.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_entropy_alone_has_the_gradient_of_fp64(packed, naive_logprobs, impl):
    """As an entropy bonus asks for: nothing comes back through the log-prob."""
    batch = packed([3, 4])
    ours, truth = batch.learned(), batch.learned(torch.float64)
    _, entropy = linear_logprob(*ours.inputs()[:3], bias=ours.bias, chunk_size=4, impl=impl)
    entropy.sum().backward()
    naive_logprobs(truth)[1].sum().backward()
    for actual, value in zip(ours.gradients(), truth.gradients(), strict=True):
        torch.testing.assert_close(actual, value.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_outside_of_autocast_makes_the_logits_of_the_forward_again(impl):
    """Of rounded operands, as if they had been given so; hidden states are large, so that other logits show."""
    hidden, weight, token_ids = head(5, 8, 37)
    hidden = (256 * hidden).detach().requires_grad_()
    narrow, narrow_weight = (each.detach().bfloat16().requires_grad_() for each in (hidden, weight))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        logp, _ = linear_logprob(hidden, weight, token_ids, chunk_size=3, impl=impl)
    expected, _ = linear_logprob(narrow, narrow_weight, token_ids, chunk_size=3, impl=impl)
    logp.sum().backward()
    expected.sum().backward()
    assert torch.equal(logp, expected)
    torch.testing.assert_close(hidden.grad.bfloat16(), narrow.grad)
    torch.testing.assert_close(weight.grad.bfloat16(), narrow_weight.grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1), ()], ids=["per token", "per row", "one"])
def test_each_token_has_its_own_temperature(impl, shape):
    hidden, weight, token_ids = head(6, 5, 11)
    temperature = torch.linspace(0.5, 2, torch.Size(shape).numel(), device=DEVICE).view(shape)
    logp, _ = linear_logprob(hidden.view(2, 3, 5), weight, token_ids.view(2, 3), temperature=temperature, impl=impl)
    logits = hidden.double() @ weight.double().T / temperature.double().expand(2, 3).reshape(6, 1)
    expected = torch.log_softmax(logits, -1).gather(-1, token_ids[:, None]).view(2, 3)
    torch.testing.assert_close(logp, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_size", [2, 3, 37, 4096 * 2 + 37])
def test_vocabularies_below_at_and_beyond_a_block_have_their_tail_masked(vocab_size, impl):
    """151,936 and 152,064 are no multiple of a block either; an unmasked tail would let probabilities sum past 1."""
    hidden, weight, token_ids = head(3, 5, vocab_size)
    token_ids[0] = vocab_size - 1
    logp, entropy = linear_logprob(hidden, weight, token_ids, chunk_size=3, impl=impl)
    logp.sum().backward()
    truth = torch.log_softmax(hidden.detach().double() @ weight.detach().double().T, -1)
    torch.testing.assert_close(logp, truth.gather(-1, token_ids[:, None])[:, 0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(truth.exp() * truth).sum(-1).float(), rtol=1e-5, atol=1e-5)
    d_logits = torch.nn.functional.one_hot(token_ids, vocab_size) - truth.exp()
    torch.testing.assert_close(weight.grad, (d_logits.T @ hidden.detach().double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_size", [151936, 152064])
def test_real_vocabularies(vocab_size, impl):
    hidden, weight, token_ids = head(2, 8, vocab_size)
    logp, _ = linear_logprob(hidden, weight, token_ids, chunk_size=2, impl=impl)
    truth = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logp, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_confident_tokens_keep_their_digits_where_a_log_softmax_rounds_to_zero(impl):
    """Margins up to 30 nats: relative error of log-prob, 1 - p and entropy."""
    margins = torch.tensor([5.0, 12.0, 18.0, 24.0, 30.0], device=DEVICE)
    weight = torch.zeros(9, 2, device=DEVICE)
    weight[4, 0] = 1.0
    weight[:4, 1] = torch.tensor([0.1, -0.2, 0.05, 0.3])
    hidden = torch.stack([margins, torch.ones_like(margins)], dim=1)
    token_ids = torch.full((5,), 4, device=DEVICE)
    bias = torch.zeros(9, device=DEVICE, requires_grad=True)
    logp, entropy = linear_logprob(hidden, weight, token_ids, bias=bias, chunk_size=5, impl=impl)
    logits = hidden.double() @ weight.double().T
    odds = torch.exp(logits - logits[:, 4:5])
    odds[:, 4] = 0.0
    truth = -torch.log1p(odds.sum(-1))
    log_probs = logits - logits[:, 4:5] + truth[:, None]
    log_probs[:, 4] = truth
    torch.testing.assert_close(logp.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy.double(), -(log_probs.exp() * log_probs).sum(-1), rtol=1e-5, atol=0)
    logp[-1].backward()
    torch.testing.assert_close(bias.grad[4].double(), -torch.expm1(truth[-1]), rtol=1e-5, atol=0)
    assert torch.log_softmax(hidden @ weight.T, -1)[-1, 4] == 0, "the usual way loses it"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_banned_by_an_infinite_bias_harms_no_other(impl):
    hidden, weight, token_ids = head(3, 5, 11)
    token_ids[:] = 2
    bias = torch.zeros(11, device=DEVICE)
    bias[7] = -torch.inf
    logp, entropy = linear_logprob(hidden, weight, token_ids, bias=bias, chunk_size=3, impl=impl)
    (logp.sum() + entropy.sum()).backward()
    kept = [column for column in range(11) if column != 7]
    expected = torch.log_softmax((hidden @ weight.T)[:, kept], -1)[:, 2]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("impl", "num_tokens"), [("torch", 65_601), pytest.param("triton", 65_601, marks=pytest.mark.gpu)]
)
def test_more_rows_than_a_grid_dimension_of_65535(impl, num_tokens):
    hidden, weight, token_ids = head(num_tokens, 4, 5)
    logp, _ = linear_logprob(hidden, weight, token_ids, impl=impl, chunk_size=num_tokens)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(-1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hidden_row_gives_the_same_bits_at_any_position(impl):
    """Log-prob and dX; dW and the loss repeat to the bit for the same order."""
    hidden, weight, token_ids = head(11, 24, 67)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    row_ids, advantages = torch.arange(11, device=DEVICE), torch.linspace(-1, 1, 11, device=DEVICE)

    def outcome(index):
        x, w = hidden.detach()[index].requires_grad_(), weight.detach().clone().requires_grad_()
        loss, metrics = fused_linear_grpo_loss(
            x, w, token_ids[index], row_ids, advantages=advantages[index], chunk_size=4, impl=impl
        )
        loss.backward()
        return loss.detach(), metrics.token_logps, x.grad, w.grad

    straight, again, moved = outcome(row_ids), outcome(row_ids), outcome(order)
    assert all(torch.equal(first, second) for first, second in zip(straight, again, strict=True))
    assert torch.equal(moved[1], straight[1][order]) and torch.equal(moved[2], straight[2][order])


def test_log_probs_of_a_loss_and_of_a_log_prob_call_are_the_same_bits():
    """So that old log-probs taken with `linear_logprob` make a ratio of exactly 1."""
    hidden, weight, token_ids = head(13, 24, 67)
    old, _ = linear_logprob(hidden, weight, token_ids)
    row_ids = torch.zeros(13, dtype=torch.int64, device=DEVICE)
    _, metrics = fused_linear_grpo_loss(
        hidden, weight, token_ids, row_ids, advantages=torch.ones(1, device=DEVICE), old_logps=old
    )
    assert metrics["ratio_min"] == 1 and metrics["ratio_max"] == 1


class GemmCounter(TorchDispatchMode):
    """Adds up 2mnk of every matrix product, in-place ones included, which torch's own counter leaves out."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [arg for arg in args if torch.is_tensor(arg)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def flops_of(call) -> int:
    with GemmCounter() as counter:
        call()
    return counter.flops


def test_flops_are_6nhv_4nhv_with_a_frozen_head_and_less_for_dead_rows():
    num_tokens, hidden_size, vocab_size = 4 * ROW_MULTIPLE, 16, 40
    unit = num_tokens * hidden_size * vocab_size
    hidden, weight, token_ids = head(num_tokens, hidden_size, vocab_size)
    row_ids = torch.arange(4, device=DEVICE).repeat_interleave(ROW_MULTIPLE)

    def loss(head_weight=weight, live=(1.0, 1.0, 1.0, 1.0), **options):
        live = torch.tensor(live)[row_ids.cpu()] != 0
        fused_linear_grpo_loss(
            hidden, head_weight, token_ids, row_ids,
            advantages=torch.ones(4, device=DEVICE), live_rows=live, impl="torch", **options,
        )[0].backward()  # fmt: skip

    assert flops_of(loss) == 6 * unit
    assert flops_of(lambda: loss(weight.detach())) == 4 * unit
    assert flops_of(lambda: loss(importance_sampling_level="sequence")) == 8 * unit
    for share in (0.25, 0.5, 0.75):
        live = [float(row < 4 * share) for row in range(4)]
        assert flops_of(lambda live=live: loss(live=live)) == (2 + 4 * share) * unit

    def no_gradient():
        with torch.no_grad():
            fused_linear_grpo_loss(
                hidden, weight, token_ids, row_ids, advantages=torch.ones(4, device=DEVICE), impl="torch"
            )

    assert flops_of(no_gradient) == 2 * unit


def test_trl_takes_8nhv_for_the_same_gradients():
    chunked = pytest.importorskip("trl.kernels", reason="needs a TRL with a fused head").ChunkedLogProbFunction
    hidden, weight, token_ids = head(64, 16, 40)

    def call():
        logp, *_ = chunked.apply(hidden, weight, None, token_ids, 1.0, 40, None, 1.0, ("log_probs",))
        logp.sum().backward()

    assert flops_of(call) == 8 * 64 * 16 * 40


def test_chunks_are_equal_fit_the_budget_and_waste_less_than_one_multiple_each():
    assert chunk_rows(8192, 152064, "cuda") == 1024
    assert chunk_rows(2300, 152064, "cuda") == 768
    assert chunk_rows(8192, 248320, "cuda") == 512, "13 chunks of 640 would fit, and pad 128 rows"
    assert chunk_rows(16384, 152064, "cuda") == 1024, "one panel"
    assert chunk_rows(10000, 152064, "cuda") == 1024, "16 chunks of 640 pad no less than 10 of these"
    assert chunk_rows(20, 152064, "cuda") == chunk_rows(0, 64, "cpu") == ROW_MULTIPLE
    for num_tokens, device in product((1, 31, 33, 1000, 4097, 30011), ("cuda", "cpu")):
        rows = chunk_rows(num_tokens, 152064, device)
        num_chunks = -(-num_tokens // rows)
        multiple = TILE_ROWS if device == "cuda" and num_chunks > 1 else ROW_MULTIPLE
        assert rows % multiple == 0 and rows * num_chunks - num_tokens < multiple * num_chunks and rows <= 1103


def test_blocks_are_powers_of_two_that_cover_small_vocabularies_at_once():
    for vocab_size in (2, 37, 1000, 4096, 152064):
        blocks = row_blocks(vocab_size)
        assert blocks["BLOCK"] & (blocks["BLOCK"] - 1) == 0
        assert blocks["BLOCK"] >= min(vocab_size, 16384) and blocks["LANES"] * 4 == blocks["BLOCK"]
        assert blocks["num_warps"] * 32 <= 1024 and blocks["BLOCK"] // (blocks["num_warps"] * 32) <= 16


def test_a_gather_context_surrounds_the_backward():
    entered = []

    class Gathered:
        def __init__(self, *parameters):
            entered.append(parameters)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *exception):
            entered.append("out")

    hidden, weight, token_ids = head(3, 5, 11)
    logp, _ = linear_logprob(hidden, weight, token_ids, gather=Gathered)
    assert not entered
    logp.sum().backward()
    assert entered[0][0] is weight and entered[0][1] is None and entered[1:] == ["in", "out"]


def test_arguments_that_do_not_fit_are_refused_by_name():
    hidden, weight, token_ids = head(3, 5, 11)
    for arguments, options, message in (
        ((hidden.double(), weight, token_ids), {}, "hidden must be"),
        ((hidden, weight[:, :4], token_ids), {}, "weight must be"),
        ((hidden, weight, token_ids[:2]), {}, "token_ids must be"),
        ((hidden.cpu(), weight.cpu(), torch.tensor([0, 11, 3])), {}, r"token_ids must be in \[0, 11\); got 11"),
        ((hidden.cpu(), weight.cpu(), torch.tensor([0, 10, -100])), {}, "got -100"),
        ((hidden, weight, token_ids), {"bias": torch.zeros(3)}, "bias must be"),
        ((hidden, weight, token_ids), {"impl": "cuda"}, "impl 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_logprob(*arguments, **options)
