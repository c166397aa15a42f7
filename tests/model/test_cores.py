"""Attention cores other than SDPA, through test doubles of the kernels that need a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tempsamp_fast.model import varlen_attention
from tempsamp_fast.model.attention import packed_attention, vision_attention
from tempsamp_fast.model.flops import _num_attended
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import _logit_indices, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.varlen_attention import (
    VarlenKernel,
    _Gathered,
    adapt_flash_attn,
    adapt_torch_varlen,
    varlen_kernel,
)

LAYOUT = (GroupLayout(5, (2, 1, 4)), GroupLayout(3, (6,)), GroupLayout(4, ()))


def flash_double(query, key, value, cu_q, cu_k, max_q, max_k, *, scale: float, causal: bool, gqa: bool) -> Tensor:
    """The contract of every varlen flash kernel, sequence by sequence; causal is aligned to the bottom right."""
    assert gqa or query.shape[1] == key.shape[1], "this kernel has no grouped heads"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs = []
    for q, k, v in zip(
        *(t.split(cu.diff().tolist()) for t, cu in ((query, cu_q), (key, cu_k), (value, cu_k))), strict=True
    ):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)) if causal else None
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def torch_with_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    """As torch's first releases of it: causal by flag, no grouped heads."""
    return flash_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=is_causal, gqa=False)


def torch_with_window(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """Causal by window, no grouped heads."""
    assert window_size in ((-1, -1), (-1, 0))
    causal = window_size == (-1, 0)
    return flash_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=causal, gqa=False)


def torch_with_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """Causal by window, grouped heads on demand."""
    assert window_size in ((-1, -1), (-1, 0))
    causal = window_size == (-1, 0)
    return flash_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=causal, gqa=enable_gqa)


def torch_that_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Causal by window; no keyword for grouped heads, which it takes all the same."""
    causal = window_size == (-1, 0)
    return flash_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=causal, gqa=True)


def torch_that_groups_wrongly(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Takes grouped heads in another order than the model's."""
    if query.shape[1] != key.shape[1]:
        key, value = key.flip(1), value.flip(1)
    options = {"scale": scale, "window_size": window_size}
    return torch_that_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    return flash_double(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, causal=causal, gqa=True
    )  # fmt: skip


KERNELS: dict[str, Callable[[], VarlenKernel]] = {
    "torch_with_flag": lambda: adapt_torch_varlen(torch_with_flag),
    "torch_with_window": lambda: adapt_torch_varlen(torch_with_window),
    "torch_with_gqa": lambda: adapt_torch_varlen(torch_with_gqa),
    "torch_that_groups": lambda: adapt_torch_varlen(torch_that_groups),
    "torch_that_groups_wrongly": lambda: adapt_torch_varlen(torch_that_groups_wrongly),
    "flash_attn": lambda: adapt_flash_attn(flash_attn),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_varlen_call_equals_plain(exact, tiny, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient, whatever the keywords of the kernel."""
    monkeypatch.setattr("tempsamp_fast.model.attention.varlen_kernel", KERNELS[kernel])
    model = exact.model(tiny)
    rows = pack(exact.groups(tiny), config=model.config, max_tokens_per_row=10_000)
    policy = Policy(model, attention_core="varlen")
    exact.assert_same(exact.packed_pass(policy, rows), exact.expected(tiny.family))


def test_the_installed_varlen_accepts_our_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked with tensors that have shapes and no data, since the kernel itself needs a GPU."""
    monkeypatch.setattr(varlen_attention, "groups_heads", lambda *_: False)  # an older one is asked, which takes data
    kernel = varlen_kernel()
    assert kernel is not None
    core = packed_attention(LAYOUT, dtype=torch.bfloat16, device=torch.device("meta"), core="varlen")
    num_tokens = sum(group.num_tokens for group in LAYOUT)
    query, key = (torch.empty(1, heads, num_tokens, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    assert core(0, query, key, key, 0.25).shape == (1, num_tokens, 4, 16)


def test_flex_attention_equals_split() -> None:
    """Forward only: it cannot train on the CPU."""
    num_tokens = sum(group.num_tokens for group in LAYOUT)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, num_tokens, 16, generator=generator) for heads in (4, 2, 2))
    cores = [
        packed_attention(LAYOUT, dtype=torch.float32, device=torch.device("cpu"), core=core)
        for core in ("flex", "split")
    ]
    flex, split = (core(0, query, key, value, 0.3) for core in cores)
    torch.testing.assert_close(flex, split)


TREES = (
    GroupLayout(4, (3, 2, 1, 3, 2, 5), parents=(0, 1, 1, 0, 4, 0)),  # children right after their parent
    GroupLayout(2, (3, 1, 2, 2, 4), parents=(0, 0, 1, 2, 2)),  # level by level
    GroupLayout(3, (2, 2, 3), parents=(0, 1, 2)),
    *LAYOUT,
)


def seen_one_by_one(layout: Sequence[GroupLayout]) -> Tensor:
    """[N, N] bool, written down from what a tree means: walk up from a token's node, and take its own up to itself."""
    ancestors, own, num_nodes = [], [], 0
    for group in layout:
        parents = [None, *(group.parents or [0] * len(group.branch_lens))]
        for index, length in enumerate((group.prompt_len, *group.branch_lens)):
            above, node = set(), parents[index]
            while node is not None:
                above.add(num_nodes + node)
                node = parents[node]
            ancestors += [above] * length
            own += [num_nodes + index] * length
        num_nodes += len(parents)
    return torch.tensor(
        [[own[k] in ancestors[q] or (own[k] == own[q] and k <= q) for k in range(len(own))] for q in range(len(own))]
    )


@pytest.mark.parametrize("core", ["split", "varlen", "flex"])
def test_a_token_of_a_tree_sees_its_path_and_itself(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any depth, children after their parent or level by level; the oracle is one dense masked call."""
    monkeypatch.setattr("tempsamp_fast.model.attention.varlen_kernel", KERNELS["torch_with_gqa"])
    num_tokens = sum(group.num_tokens for group in TREES)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, num_tokens, 16, generator=generator) for heads in (4, 2, 2))
    attention = packed_attention(TREES, dtype=torch.float32, device=torch.device("cpu"), core=core)
    mask = seen_one_by_one(TREES)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention(0, query, key, value, 0.3), expected.transpose(1, 2))


def test_a_tree_is_counted_by_what_its_tokens_see() -> None:
    """Attended pairs, the tokens that predict, and the answers."""
    row = SimpleNamespace(layout=TREES)
    assert _num_attended(row.layout) == int(seen_one_by_one(TREES).sum())  # type: ignore[arg-type]
    assert [group.num_leaves for group in TREES] == [4, 3, 1, 3, 1, 0]
    # video of 4 tokens; question of 3 with answers of 2 and 1; question of 3 with an answer of 2; an answer of 5
    assert _logit_indices(TREES[:1]).tolist() == [6, 7, 6, 12, 13, 3, 15, 16, 17, 18]


@pytest.mark.parametrize("parents", [(1, 0), (0, 2), (0, -1), (0,)])
def test_a_parent_that_does_not_come_before_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must name a node before"):
        _ = GroupLayout(2, (1, 1), parents).nodes


def windows(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 13, 16, generator=generator).to(device, dtype) for _ in range(3))
    cu = torch.tensor([0, 4, 6, 10, 13], dtype=torch.int32, device=device)
    tensors = {"query": query, "key": key, "value": value, "cu_seq_lens_q": cu}
    return {**tensors, "attention_mask": None, "scaling": 0.3, "max_length_q": 4}


def windows_one_by_one(query, key, value, scaling, cu_seq_lens_q, **_) -> Tensor:
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def test_windows_of_several_sizes_equal_one_by_one() -> None:
    torch.testing.assert_close(vision_attention(None, **windows())[0], windows_one_by_one(**windows()))


def test_windows_in_one_varlen_call_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempsamp_fast.model.attention._runs_flash", lambda device, dtype: True)
    monkeypatch.setattr("tempsamp_fast.model.attention.varlen_kernel", KERNELS["torch_with_gqa"])
    torch.testing.assert_close(vision_attention(None, **windows())[0], windows_one_by_one(**windows()))


def test_an_unknown_core_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*auto, split, varlen or flex"):
        packed_attention(LAYOUT, dtype=torch.float32, device=torch.device("cpu"), core="fast")


def test_varlen_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempsamp_fast.model.attention.varlen_kernel", lambda: None)
    with pytest.raises(ValueError, match="needs flash-attn or torch"):
        packed_attention(LAYOUT, dtype=torch.bfloat16, device=torch.device("cuda"), core="varlen")


@pytest.mark.gpu
@pytest.mark.parametrize("core", ["varlen", "flex"])
def test_cores_on_a_gpu_equal_split_in_double(core: str) -> None:
    """Forward and backward in bf16, against SDPA in fp64: a branch's causal diagonal is aligned to the bottom right."""
    layout = (GroupLayout(150, (20, 1, 64)), GroupLayout(70, (33,)), GroupLayout(40, ()))
    num_tokens = sum(group.num_tokens for group in layout)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, heads, num_tokens, 64, generator=generator).double().cuda() for heads in (8, 2, 2)]
    rough = [tensor.bfloat16() for tensor in exact]
    outputs = []
    for tensors, name in ((exact, "split"), (rough, core)):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        attention = packed_attention(layout, dtype=leaves[0].dtype, device=leaves[0].device, core=name)
        output = attention(0, *leaves, 0.125)
        output.square().sum().backward()
        outputs.append([output.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for expected, actual in zip(*outputs, strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
def test_windows_on_a_gpu_equal_one_by_one() -> None:
    arguments = windows("cuda", torch.bfloat16)
    torch.testing.assert_close(
        vision_attention(None, **arguments)[0], windows_one_by_one(**arguments), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    ("varlen_attn", "heads"),
    [(torch_with_window, 4), (torch_that_groups, 2), (torch_that_groups_wrongly, 4)],
    ids=["refuses", "groups", "groups_wrongly"],
)
def test_keys_are_repeated_only_where_grouped_heads_come_out_wrong(varlen_attn, heads: int) -> None:
    """Also inside a checkpointed layer, whose own saved tensors the trial leaves alone."""
    seen = []

    def spy(query, key, *arguments, window_size, **options):
        seen.append(key.shape[1])
        return varlen_attn(query, key, *arguments, window_size=window_size, **options)

    spy.__signature__ = inspect.signature(varlen_attn)
    kernel, cu = adapt_torch_varlen(spy), torch.tensor([0, 3, 8], dtype=torch.int32)
    query, key, value = (torch.randn(8, n, 16, requires_grad=True) for n in (4, 2, 2))
    run = lambda *tensors: kernel(*tensors, cu, cu, 5, 5, scale=0.25, causal=True)
    output = checkpoint(run, query, key, value, use_reentrant=False)
    output.sum().backward()
    assert seen[-2:] == [heads] * 2


def test_gradients_of_keys_that_are_read_often_are_summed_in_float32() -> None:
    keys = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    index = torch.tensor([0, 1, 2] + [0] * 64)
    gradient = torch.full((len(index), 2, 4), 1.0)
    gradient[0] = 256.0  # in bfloat16, 256 + 1 is 256
    _Gathered.apply(keys, index).backward(gradient.bfloat16())
    assert keys.grad is not None
    assert keys.grad[0].unique().tolist() == [320.0] and keys.grad[1:].unique().tolist() == [1.0]
