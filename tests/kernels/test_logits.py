"""The logits level: log-probabilities and the GRPO loss on logits that the caller holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempsamp_kernels.logits import fused_selective_log_softmax
from torch.nn import functional as F

# The interpreter computes with numpy, which warns about the log(0) of a row that is not counted.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
IMPLS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_logits(batch, length, vocab, dtype=torch.float32, scale=3.0):
    logits = (torch.randn(batch, length + 1, vocab, device=DEVICE) * scale).to(dtype)
    return logits, torch.randint(vocab, (batch, length), device=DEVICE)


def exact_logps(logits, ids, temperature):
    """fp64 truth, differentiable; x - logsumexp(x) would round for confident tokens even there."""
    z, index = logits[:, :-1].double() / temperature, ids.unsqueeze(-1)
    others = z.scatter(-1, index, -torch.inf).logsumexp(-1)
    return -F.softplus(others - z.gather(-1, index).squeeze(-1), threshold=60)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [1, 5, 4097])
def test_logps_and_gradient_equal_fp64_for_every_vocabulary_tail(impl, vocab):
    logits, ids = random_logits(2, 3, vocab)
    upstream = torch.randn(2, 3, device=DEVICE)
    exact = logits.double().requires_grad_()
    expected = exact_logps(exact, ids, 0.9)
    expected.backward(upstream.double())
    logits.requires_grad_()
    logps = fused_selective_log_softmax(logits, ids, 0.9, impl=impl)
    logps.backward(upstream)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("margin", [5.0, 17.0, 30.0])
def test_confident_tokens_keep_their_tiny_log_probability(impl, margin):
    """x - logsumexp(x) would round to 0 in fp32; so would 1 - exp(log p)."""
    logits = torch.zeros(1, 2, 300, device=DEVICE)
    logits[0, 0, 7] = margin + 5.0
    ids = torch.tensor([[7]], device=DEVICE)
    exact = logits.double().requires_grad_()
    expected = exact_logps(exact, ids, 1.0)
    expected.sum().backward()
    logits.requires_grad_()
    logps = fused_selective_log_softmax(logits, ids, 1.0, impl=impl)
    logps.sum().backward()
    assert logps.item() < 0
    torch.testing.assert_close(logps.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_in_place_overwrites_the_logits_and_equals_the_copy(impl):
    logits, ids = random_logits(2, 3, 70, torch.bfloat16)
    copied, overwritten = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    fused_selective_log_softmax(copied, ids, impl=impl).sum().backward()
    fused_selective_log_softmax(overwritten, ids, impl=impl, inplace=True).sum().backward()
    assert torch.equal(copied.grad, overwritten.grad)
    assert torch.equal(overwritten.detach(), overwritten.grad)
    assert torch.equal(copied.detach(), logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_whoever_needs_overwritten_logits_gets_an_error(impl):
    """A second backward, or another loss that saved the same logits."""
    logits, ids = random_logits(1, 2, 9)
    logits = logits.requires_grad_() * 1
    loss, other = fused_selective_log_softmax(logits, ids, inplace=True, impl=impl).sum(), logits.square().sum()
    loss.backward(retain_graph=True)
    for needs_logits in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            needs_logits.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [True, False])
def test_nan_in_masked_rows_and_invalid_ids_never_leak(impl, inplace):
    logits, ids = random_logits(2, 3, 70)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=DEVICE)
    clean = logits.clone().requires_grad_()
    expected = fused_selective_log_softmax(clean, ids, mask=mask, impl=impl)
    expected.sum().backward()
    logits[:, :-1][mask == 0] = torch.nan
    logits[:, -1] = torch.nan
    logits.requires_grad_()
    logps = fused_selective_log_softmax(logits, ids.masked_fill(mask == 0, -100), mask=mask, inplace=inplace, impl=impl)
    logps.sum().backward()
    assert torch.equal(logps, expected)
    assert torch.equal(logits.grad, clean.grad)
    assert not logits.grad[:, -1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_give_what_contiguous_logits_give(impl):
    logits, ids = random_logits(2, 4, 70)
    expected = fused_selective_log_softmax(logits[:, 1:].contiguous(), ids[:, 1:].contiguous(), impl=impl)
    assert torch.equal(fused_selective_log_softmax(logits[:, 1:], ids, impl=impl), expected)
    vocab_first = logits[:, 1:].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(fused_selective_log_softmax(vocab_first, ids, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_no_rows_give_no_log_probs_and_a_zero_gradient(impl, batch, length):
    logits = torch.randn(batch, length + 1, 7, device=DEVICE, requires_grad=True)
    ids = torch.zeros(batch, length, dtype=torch.int64, device=DEVICE)
    logps = fused_selective_log_softmax(logits, ids, impl=impl)
    logps.sum().backward()
    assert logps.shape == (batch, length)
    assert not logits.grad.any()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_more_rows_than_a_grid_dimension_of_65535_holds(impl):
    logits, ids = random_logits(1, 70_001, 3)
    logps = fused_selective_log_softmax(logits, ids, 1.0, impl=impl)
    torch.testing.assert_close(logps.double(), exact_logps(logits, ids, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_gives_the_same_bits_at_any_position(impl):
    logits, ids = random_logits(1, 1, 300)
    rows = logits[:, :1].expand(3, 5, 300).clone()
    rows[0, 1], rows[2, 0] = 7.0, -3.0
    alone, among = logits.clone().requires_grad_(), rows.requires_grad_()
    expected = fused_selective_log_softmax(alone, ids, impl=impl)
    actual = fused_selective_log_softmax(among, ids.expand(3, 4), impl=impl)
    expected.sum().backward()
    actual.sum().backward()
    for position in [(0, 0), (1, 2), (2, 3)]:
        assert torch.equal(actual[position], expected[0, 0])
        assert torch.equal(among.grad[position], alone.grad[0, 0])


@settings.get_profile("kernels")
@given(st.data())
def test_any_shape_mask_and_temperature_agree_with_fp64(data):
    batch, length, vocab = (data.draw(st.integers(1, most)) for most in (3, 4, 40))
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length)))
    mask, temperature = mask.view(batch, length).to(DEVICE), data.draw(st.floats(0.3, 3.0))
    logits, ids = random_logits(batch, length, vocab)
    exact = logits.double().requires_grad_()
    expected = exact_logps(exact, ids, temperature) * mask
    expected.sum().backward()
    for impl in IMPLS:
        leaf = logits.clone().requires_grad_()
        logps = fused_selective_log_softmax(leaf, ids, temperature, mask, impl=impl)
        logps.sum().backward()
        torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_mask_is_that_of_the_last_ids():
    """Input ids and mask may begin with the prompt, whose tokens count otherwise."""
    logits, ids = torch.randn(2, 4, 11), torch.randint(0, 11, (2, 7))
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]])
    found = fused_selective_log_softmax(logits, ids, 0.7, mask, impl="torch")
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, -3:, None])[..., 0] * mask[:, -3:]
    torch.testing.assert_close(found, expected)
