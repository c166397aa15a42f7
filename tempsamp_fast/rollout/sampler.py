"""Drawing the next token of every row where its logits are: on a GPU in one launch, without sorting the vocabulary.

The kernel inverts the cumulative distribution as `choose_tokens` does, in whole numbers: the likeliest token weighs
2**40, sums of weights are exact in any order, and tokens of a probability down to 1e-12 are told apart. What top_k and
top_p keep is found by halving the range of the smallest kept logit 32 times.
"""

from __future__ import annotations

from tempsamp_kernels.launch import choose_impl, launch
from tempsamp_kernels.optional_triton import tl, triton
from torch import Tensor

from tempsamp_fast.rollout.answers import Answers
from tempsamp_fast.rollout.token_sampling import choose_tokens, uniforms

BLOCK = 4096
"""Logits that a program reads at a time."""


def draw(
    logits: Tensor, answers: Answers, slots: Tensor, logit_rows: Tensor | None = None, impl: str | None = None
) -> None:
    """Write token `answers.step` of the answers in these slots, [R] int64 and increasing.

    logits: [R, vocab_size] float32, or [M, vocab_size] of which `logit_rows` [R] int64 says whose they are.
    impl: "triton" or "torch"; None: by the device. Raises ValueError as `choose_impl` does.
    """
    params = answers.params
    if choose_impl(impl, logits) == "torch":
        index = answers.step.expand(len(slots))
        numbers = uniforms(answers.noise[slots, index])
        own = logits if logit_rows is None else logits[logit_rows]
        tokens, logps = choose_tokens(own, params, numbers, answers.banned)
        answers.ids[slots, index], answers.logps[slots, index] = tokens, logps
        ends = answers.ends[tokens] & ~answers.is_finished[slots]
        answers.lengths[slots] = answers.lengths[slots].where(~ends, index + 1)
        answers.is_finished[slots] |= ends
        answers.tokens[slots] = tokens
        return
    vocab_size = logits.shape[1]
    launch(
        draw_kernel,
        (len(slots),),
        logits=logits.contiguous(),
        logit_rows=slots if logit_rows is None else logit_rows,
        slots=slots,
        noise=answers.noise,
        step=answers.step,
        banned=answers.banned,
        ends=answers.ends,
        tokens=answers.tokens,
        ids=answers.ids,
        logps=answers.logps,
        lengths=answers.lengths,
        is_finished=answers.is_finished,
        inverse_temperature=1 / (params.temperature or 1.0),
        top_k=params.top_k,
        top_p=round(params.top_p * 2**32),
        noise_stride=answers.noise.stride(0),
        ids_stride=answers.ids.stride(0),
        logps_stride=answers.logps.stride(0),
        vocab_size=vocab_size,
        HAS_LOGIT_ROWS=logit_rows is not None,
        IS_GREEDY=params.temperature == 0,
        HAS_TOP_K=0 < params.top_k < vocab_size,
        HAS_TOP_P=params.top_p < 1,
        NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)),
        BLOCK=BLOCK,
        num_warps=16,
    )


@triton.jit
def _allowed(logits, banned, first, inverse_temperature, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits at the temperature: of all ids, and of those that may be drawn."""
    ids = first + tl.arange(0, BLOCK)
    x = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")) * inverse_temperature
    is_banned = tl.load(banned + ids, mask=ids < vocab_size, other=1) != 0
    return x, tl.where(is_banned, float("-inf"), x)


@triton.jit
def _order(x):
    """Whole numbers in the order of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weights(allowed, largest):
    """Whole numbers in proportion to the probabilities, 2**40 where they are largest."""
    weights = tl.exp(allowed - largest) * 1099511627776.0
    return tl.where(weights == weights, weights, 0.0).to(tl.int64)


@triton.jit
def _share(total, of_32_bits):
    """total * of_32_bits / 2**32 of numbers below 2**59 and 2**32, rounded down but for one."""
    high, low = total >> 32, total & 0xFFFFFFFF
    return high * of_32_bits + ((low >> 1) * of_32_bits >> 31)


@triton.jit
def _sum_from(
    logits, banned, inverse_temperature, largest, smallest, least,
    BY_WEIGHT: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number or weight of the ids that may be drawn, of order `least` and `smallest` at least."""
    total = tl.zeros([1], tl.int64)
    for first in range(0, vocab_size, BLOCK):
        _, allowed = _allowed(logits, banned, first, inverse_temperature, vocab_size, BLOCK)
        order = _order(allowed)
        is_kept = (allowed > float("-inf")) & (order >= smallest) & (order >= least)
        if BY_WEIGHT:
            values = _weights(allowed, largest)
        else:
            values = tl.full([BLOCK], 1, tl.int64)
        total += tl.sum(tl.where(is_kept, values, 0))
    return tl.sum(total)


@triton.jit
def _smallest_kept(
    logits, banned, inverse_temperature, largest, smallest, wanted,
    BY_WEIGHT: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest order from which on the ids together have the number, or the weight, that is wanted."""
    low, high = tl.cast(-2147483648, tl.int64), tl.cast(2147483647, tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        total = _sum_from(logits, banned, inverse_temperature, largest, smallest, middle, BY_WEIGHT, vocab_size, BLOCK)
        if total >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def draw_kernel(
    logits,
    logit_rows,
    slots,
    noise,
    step,
    banned,
    ends,
    tokens,
    ids,
    logps,
    lengths,
    is_finished,
    inverse_temperature,
    top_k,
    top_p,
    noise_stride,
    ids_stride,
    logps_stride,
    vocab_size: tl.constexpr,
    HAS_LOGIT_ROWS: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    slot, index = tl.load(slots + row), tl.load(step)
    if HAS_LOGIT_ROWS:
        logits += tl.load(logit_rows + row) * vocab_size
    else:
        logits += row.to(tl.int64) * vocab_size
    lanes = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total, best = tl.zeros([BLOCK], tl.float32), most
    for first in range(0, vocab_size, BLOCK):
        x, allowed = _allowed(logits, banned, first, inverse_temperature, vocab_size, BLOCK)
        grown = tl.maximum(most, x)
        base = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(most - base) + tl.exp(x - base)
        most, best = grown, tl.maximum(best, allowed)
    largest = tl.max(most, 0)
    log_total = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
    likeliest = tl.max(best, 0)
    token = tl.cast(vocab_size - 1, tl.int64)
    if IS_GREEDY:
        found = tl.full([BLOCK], vocab_size - 1, tl.int64)
        for first in range(0, vocab_size, BLOCK):
            _, allowed = _allowed(logits, banned, first, inverse_temperature, vocab_size, BLOCK)
            found = tl.minimum(found, tl.where(allowed == likeliest, first + lanes, vocab_size - 1).to(tl.int64))
        token = tl.min(found, 0)
    else:
        smallest = tl.cast(-2147483648, tl.int64)
        if HAS_TOP_K:
            smallest = _smallest_kept(
                logits, banned, inverse_temperature, likeliest, smallest, top_k, False, vocab_size, BLOCK
            )
        num_ties = tl.cast(vocab_size, tl.int64)  # of the smallest kept
        if HAS_TOP_P:
            wanted = _share(
                _sum_from(logits, banned, inverse_temperature, likeliest, smallest, smallest, True, vocab_size, BLOCK),
                top_p,
            )
            nucleus = _smallest_kept(
                logits, banned, inverse_temperature, likeliest, smallest, wanted, True, vocab_size, BLOCK
            )
            above = _sum_from(
                logits, banned, inverse_temperature, likeliest, nucleus, nucleus + 1, True, vocab_size, BLOCK
            )
            number = _sum_from(
                logits, banned, inverse_temperature, likeliest, nucleus, nucleus, False, vocab_size, BLOCK
            ) - _sum_from(
                logits, banned, inverse_temperature, likeliest, nucleus, nucleus + 1, False, vocab_size, BLOCK
            )
            tied = _sum_from(logits, banned, inverse_temperature, likeliest, nucleus, nucleus, True, vocab_size, BLOCK)
            each = tl.maximum((tied - above) // tl.maximum(number, 1), 1)
            num_ties = (wanted - above + each - 1) // each
            smallest = nucleus
        blocks = tl.arange(0, NUM_BLOCKS)
        sums, ties_before = tl.zeros([NUM_BLOCKS], tl.int64), tl.zeros([NUM_BLOCKS], tl.int64)
        seen = tl.cast(0, tl.int64)
        for block in range(0, NUM_BLOCKS):
            _, allowed = _allowed(logits, banned, block * BLOCK, inverse_temperature, vocab_size, BLOCK)
            is_kept, is_tie = _kept(allowed, smallest, num_ties - seen, HAS_TOP_P)
            sums = tl.where(blocks == block, tl.sum(tl.where(is_kept, _weights(allowed, likeliest), 0)), sums)
            ties_before = tl.where(blocks == block, seen, ties_before)
            seen += tl.sum(is_tie.to(tl.int64))
        target = _share(tl.sum(sums), tl.load(noise + slot * noise_stride + index))
        before = tl.cumsum(sums) - sums
        block = tl.max(tl.where((before <= target) & (sums > 0), blocks, 0), 0)
        rest = target - tl.sum(tl.where(blocks == block, before, 0))
        left = num_ties - tl.sum(tl.where(blocks == block, ties_before, 0))
        _, allowed = _allowed(logits, banned, block * BLOCK, inverse_temperature, vocab_size, BLOCK)
        is_kept, _ = _kept(allowed, smallest, left, HAS_TOP_P)
        reached = tl.cumsum(tl.where(is_kept, _weights(allowed, likeliest), 0)) > rest
        token = tl.min(tl.where(reached, block * BLOCK + lanes, vocab_size - 1).to(tl.int64), 0)
    logp = tl.load(logits + token) * inverse_temperature - log_total
    tl.store(tokens + slot, token)
    tl.store(ids + slot * ids_stride + index, token)
    tl.store(logps + slot * logps_stride + index, logp)
    if (tl.load(ends + token) != 0) & (tl.load(is_finished + slot) == 0):
        tl.store(lengths + slot, index + 1)
        tl.store(is_finished + slot, 1)


@triton.jit
def _kept(allowed, smallest, ties_left, HAS_TOP_P: tl.constexpr):
    """Which of a block may be drawn: those over the smallest kept, and of its equals the first `ties_left`."""
    order = _order(allowed)
    is_tie = (order == smallest) & (allowed > float("-inf"))
    is_kept = (order >= smallest) & (allowed > float("-inf"))
    if HAS_TOP_P:
        is_kept = is_kept & (~is_tie | (tl.cumsum(is_tie.to(tl.int32)) <= ties_left))
    return is_kept, is_tie
