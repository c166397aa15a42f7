"""PREDICTED share of bare cuBLAS that the fused loss reaches, by arithmetic: nothing here was measured on a card.

    python bench/loss_model.py [--card H100] [--output bench/results/loss_model.json]

A launch takes the longest of its FLOPs, its bytes and the least time of a launch. A GEMM's FLOPs are those of whole
waves of its best tile. "roofline" rates are what good kernels reach on an H100 (800 of 989 TFLOP/s, 3.0 of 3.35 TB/s,
5 us), "cautious" ones what usual kernels do (640, 2.55, 2 us); other cards are scaled by their data sheets. Bare cuBLAS
is logits, dX and dW in three bf16 GEMMs over all tokens, at the same rates.

Two streams are predicted twice. "side by side": the row kernel takes its multiprocessors from the GEMM beside it for as
long as it runs, and the bytes of both share the memory. "GEMMs yield nothing": cuBLAS keeps every multiprocessor until
it ends, as persistent kernels do, and the second stream gives nothing. A card lies between.

The row kernel reads each logit twice, the second time backwards, and writes its gradient. Between the readings of a
column x from the row's end, 6x bytes come and go for each row at work: of the second readings the L2 cache serves what
it holds of 6 bytes a logit. So the kernel works at few rows, where all multiprocessors' do not fit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path

SEATS = 0.4
"""Share of the multiprocessors with which a streaming kernel has all of the memory's bandwidth. Assumed."""
INSTRUCTIONS = 21, 9
"""Of a logit in the row kernel, as compiled for sm_90: 222 + 116 in its loops over 16 of them; without statistics."""
TILES = ((128, 256), (256, 128), (128, 128), (64, 256))
SIZES = product((2048, 2560, 3584, 4096), (151936, 152064, 248320))
HEADS = {f"H{hidden} V{vocab}": (hidden, vocab) for hidden, vocab in SIZES}
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Card:
    """Data sheet: dense bf16 FLOP/s, memory bytes/s, multiprocessors, bytes of L2 cache, fp32 instructions/s.

    And the least share of its multiprocessors that `rows.rows_at_work` gives to rows.
    """

    flops: float
    bandwidth: float
    multiprocessors: int
    cache: int
    instructions: float
    at_work: float = 0.4


CARDS = {
    "H100": Card(989e12, 3.35e12, 132, 50 << 20, 33.5e12),
    "H200": Card(989e12, 4.8e12, 132, 50 << 20, 33.5e12),
    "A100": Card(312e12, 2.04e12, 108, 40 << 20, 9.75e12, 0.75),
    "B200": Card(2250e12, 8.0e12, 148, 126 << 20, 37.5e12, 0.75),
}


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet that kernels reach, and the least seconds of a launch."""

    flops: float
    bandwidth: float
    launch: float


RATES = {
    "roofline": Rates(800 / 989, 3.0 / 3.35, 5e-6),
    "cautious": Rates(640 / 989, 2.55 / 3.35, 2e-6),
}


@dataclass(frozen=True)
class Launch:
    """What a kernel computes and moves, with which share of the multiprocessors, and the row kernel beside it."""

    flops: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0
    seats: float = 1.0
    beside: Launch | None = None

    def seconds(self, card: Card, rates: Rates) -> float:
        bandwidth = card.bandwidth * rates.bandwidth
        computes = self.flops / card.flops + self.instructions / card.instructions
        alone = max(
            computes / rates.flops / self.seats, self.bytes / bandwidth * max(1, SEATS / self.seats), rates.launch
        )
        if self.beside is None:
            return alone
        other = self.beside.seconds(card, rates)
        if self.seats < 1:
            return max(alone, other)
        return max(alone + self.beside.seats * other, (self.bytes + self.beside.bytes) / bandwidth)


@dataclass(frozen=True)
class Schedule:
    """How the loss is put together; the defaults are what the package does."""

    logits_bytes: float = 5 * 2**27
    """Memory of a chunk's logits: `head.LOGITS_BYTES`."""
    gradient_bytes: float = 5 * 2**30
    """Memory of the gradients of logits that wait for their GEMMs, a panel: `head.GRADIENT_BYTES`. 0: of one chunk."""
    zeroes_first: bool = False
    """dW starts as zeros that every panel is added to; else the first one writes it."""
    defers_single: bool = True
    """The only panel's dW is written once, in bf16, by the backward; else fp32, read and rounded there."""
    yields: bool = True
    """Whether a GEMM leaves multiprocessors to the row kernel of the chunk before, on the second stream."""
    caches: bool = True
    """Whether the second reading of the logits goes backwards and finds some in the L2 cache."""
    few_rows: bool = True
    """Whether the row kernel works at no more rows than the cache holds: `rows.rows_at_work`. Else at one each."""
    reserved: float = 0.0
    """Share of the multiprocessors that only the row kernel may use while there are two streams (green contexts)."""
    epilogue: float = 0.0
    """Speed in parts of cuBLAS's of a GEMM of our own that takes statistics along and writes logits of 16 bits."""


def gemm(m: int, n: int, k: int, out_bytes: float, card: Card) -> Launch:
    """[m, k] @ [k, n] of bf16 operands; `out_bytes` per element of the product, reads of it included."""
    waves = min(
        ceil(ceil(m / rows) * ceil(n / columns) / card.multiprocessors) * rows * columns for rows, columns in TILES
    )
    padded = max(m * n, waves * card.multiprocessors)
    return Launch(2 * padded * k, 2 * (m * k + k * n) + out_bytes * m * n)


def bare(num_tokens: int, hidden: int, vocab: int, card: Card) -> list[Launch]:
    return [
        gemm(num_tokens, vocab, hidden, 2, card),
        gemm(num_tokens, hidden, vocab, 2, card),
        gemm(vocab, hidden, num_tokens, 2, card),
    ]


def panels(num_tokens: int, vocab: int, schedule: Schedule) -> int:
    """As `head.num_panels`: equal runs of chunks whose gradients are multiplied at once."""
    return max(1, ceil(num_tokens / max(32, schedule.gradient_bytes // (2 * vocab))))


def chunk_rows(num_tokens: int, vocab: int, schedule: Schedule) -> int:
    """As `head.chunk_rows`: equal chunks, of several whole tiles, as many as pad least."""
    fitting = int(schedule.logits_bytes) // (4 * vocab)
    if not schedule.gradient_bytes:
        return ceil(num_tokens / ceil(num_tokens / (fitting // 32 * 32)) / 32) * 32
    tokens = ceil(num_tokens / panels(num_tokens, vocab, schedule))
    multiple = 128 if tokens > fitting >= 128 else 32
    fewest = ceil(tokens / max(multiple, fitting // multiple * multiple))
    sizes = [ceil(tokens / number / multiple) * multiple for number in range(fewest, 2 * fewest + 1)]
    return min(sizes, key=lambda rows: ceil(tokens / rows) * rows)


def rows_at_work(num_rows: int, vocab: int, card: Card, schedule: Schedule) -> int:
    """As `rows.rows_at_work`: one for each multiprocessor, or fewer."""
    fitting = card.cache // (6 * vocab)
    if schedule.reserved:
        return int(schedule.reserved * card.multiprocessors)
    if fitting >= card.multiprocessors or not schedule.few_rows:
        return min(num_rows, card.multiprocessors)
    return min(num_rows, max(fitting, int(card.at_work * card.multiprocessors)))


def row_kernel(num_rows: int, vocab: int, card: Card, schedule: Schedule) -> Launch:
    """Two readings of fp32 logits, less what the L2 cache holds of the rows at work, and a gradient in bf16."""
    at_work = rows_at_work(num_rows, vocab, card, schedule)
    held = min(1.0, card.cache / (at_work * 6 * vocab)) if schedule.caches else 0.0
    size, instructions = (2 + 2, INSTRUCTIONS[1]) if schedule.epilogue else (4 + 4 * (1 - held) + 2, INSTRUCTIONS[0])
    return Launch(0, num_rows * vocab * size, num_rows * vocab * instructions, at_work / card.multiprocessors)


def fused(num_tokens: int, hidden: int, vocab: int, card: Card, schedule: Schedule) -> list[Launch]:
    """The launches of a forward and backward pass of the loss with a trained head."""
    rows = chunk_rows(num_tokens, vocab, schedule)
    num_panels = panels(num_tokens, vocab, schedule) if schedule.gradient_bytes else ceil(num_tokens / rows)
    num_chunks = ceil(ceil(num_tokens / num_panels) / rows)
    logits, row = gemm(rows, vocab, hidden, 4, card), row_kernel(rows, vocab, card, schedule)
    if schedule.epilogue:
        logits = replace(logits, flops=logits.flops / schedule.epilogue)
    panel_rows = num_chunks * rows
    yields = schedule.yields or schedule.reserved > 0
    beside = [replace(logits, beside=row, seats=1 - schedule.reserved) if yields else logits] * (num_chunks - 1)
    alone = [replace(row, seats=1.0) if schedule.reserved else row] * (1 if yields else num_chunks)
    of_panel = [logits, *beside, *alone, gemm(panel_rows, hidden, vocab, 4, card)]
    launches = [
        Launch(bytes=6 * num_tokens * hidden),
        *of_panel * num_panels,
    ]
    if num_panels == 1 and schedule.defers_single:
        return [*launches, gemm(vocab, hidden, panel_rows, 2, card)]
    weight = hidden * vocab
    first, later = (gemm(vocab, hidden, panel_rows, out_bytes, card) for out_bytes in (4, 8))
    launches += [Launch(bytes=6 * weight)]  # dW likewise
    if schedule.zeroes_first:
        first, launches = later, [*launches, Launch(bytes=4 * weight)]
    return [*launches, first, *[later] * (num_panels - 1)]


def share(num_tokens: int, head: tuple[int, int], card: Card, rates: Rates, schedule: Schedule) -> float:
    """Time of bare cuBLAS over ours."""
    total = lambda launches: sum(launch.seconds(card, rates) for launch in launches)
    return total(bare(num_tokens, *head, card)) / total(fused(num_tokens, *head, card, schedule))


CHUNKED = Schedule(5 * 2**28, gradient_bytes=0, yields=False, caches=False, few_rows=False)
ALONE = Schedule(yields=False)
SCHEDULES = {
    "chunks of 1.25 GiB, dW from zeros, rounded in the backward": replace(
        CHUNKED, zeroes_first=True, defers_single=False
    ),
    "the first chunk writes dW": replace(CHUNKED, defers_single=False),
    "and the only chunk's dW waits for the backward": CHUNKED,
    "panels of gradients, one stream": replace(ALONE, caches=False, few_rows=False),
    "GEMMs yield nothing, a row for each multiprocessor": replace(ALONE, few_rows=False),
    "now, GEMMs yield nothing": ALONE,
    "now, side by side": Schedule(),
    "now, side by side, logits fetched twice": Schedule(caches=False),
    "now, GEMMs yield nothing, logits fetched twice": replace(ALONE, caches=False),
    "now, side by side, chunks of half the size": Schedule(5 * 2**26),
    "now, side by side, chunks of twice the size": Schedule(5 * 2**28),
    "now, side by side, panels of 2.5 GiB": Schedule(gradient_bytes=5 * 2**29),
    "not built: a fifth of the multiprocessors reserved": replace(ALONE, reserved=0.2),
    "not built: statistics in a GEMM at cuBLAS's speed, alone": replace(ALONE, epilogue=1.0),
    "not built: statistics in a GEMM at 90 % of it, alone": replace(ALONE, epilogue=0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/loss_model.json")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    table = {
        rates: {
            name: {
                head: {str(n): round(share(n, HEADS[head], card, RATES[rates], schedule), 3) for n in TOKENS}
                for head in HEADS
            }
            for name, schedule in SCHEDULES.items()
        }
        for rates in RATES
    }
    result = {
        "what": "PREDICTED share of three bare cuBLAS GEMMs, by arithmetic; not measured",
        "card": {"name": arguments.card, **asdict(card)},
        "rates": {name: asdict(rates) for name, rates in RATES.items()},
        "predicted_share": table,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for head in ("H2048 V151936", "H3584 V152064"):
        print(f"predicted share of bare cuBLAS on {arguments.card}, head {head}, by tokens {TOKENS}")
        for rates, schedules in table.items():
            for name, heads in schedules.items():
                print(f"{rates:9} {name:58}" + "".join(f"{value:7.1%}" for value in heads[head].values()))


if __name__ == "__main__":
    main()
