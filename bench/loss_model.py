"""PREDICTED share of bare cuBLAS that the fused loss reaches, by arithmetic: nothing here was measured on a card.

    python bench/loss_model.py [--card H100] [--output bench/results/loss_model.json]

A launch takes the longest of its FLOPs, its bytes and the least time of a launch. A GEMM's FLOPs are those of whole
waves of its best tile. "roofline" rates are what good kernels reach on an H100 (800 of 989 TFLOP/s, 3.0 of 3.35 TB/s,
5 us), "cautious" ones what usual kernels do (640, 2.55, 2 us); other cards are scaled by their data sheets. Two
launches side by side take the longer of their summed FLOPs and their summed bytes, which is the most that a second
stream can give: a GEMM that fills the registers of every multiprocessor leaves it less. Bare cuBLAS is logits, dX and
dW in three bf16 GEMMs over all tokens, at the same rates.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

TILES = ((128, 256), (256, 128), (128, 128), (64, 256))
HEADS = {"H2048 V151936": (2048, 151936), "H2560 V151936": (2560, 151936), "H3584 V152064": (3584, 152064)}
HEADS |= {"H4096 V248320": (4096, 248320), "H4096 V152064": (4096, 152064)}
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Card:
    """Data sheet: dense bf16 FLOP/s, memory bytes/s, streaming multiprocessors."""

    flops: float
    bandwidth: float
    multiprocessors: int


CARDS = {
    "H100": Card(989e12, 3.35e12, 132),
    "H200": Card(989e12, 4.8e12, 132),
    "A100": Card(312e12, 2.04e12, 108),
    "B200": Card(2250e12, 8.0e12, 148),
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
    """What a kernel computes and moves."""

    flops: float = 0.0
    bytes: float = 0.0

    def beside(self, other: Launch) -> Launch:
        """Both at once, on two streams."""
        return Launch(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, card: Card, rates: Rates) -> float:
        by_memory = self.bytes / (card.bandwidth * rates.bandwidth)
        return max(self.flops / (card.flops * rates.flops), by_memory, rates.launch)


@dataclass(frozen=True)
class Schedule:
    """How the loss is put together; the defaults are what the package does."""

    logits_bytes: float = 5 * 2**28
    """Memory of a chunk's logits: `head.LOGITS_BYTES`."""
    zeroes_first: bool = False
    """dW starts as zeros that every chunk is added to; else the first chunk writes it."""
    defers_single: bool = True
    """The only chunk's dW is written once, in bf16, by the backward; else fp32, read and rounded there."""
    streams: int = 1
    """2: the row kernel of one chunk beside the GEMMs of its neighbours, with a second buffer of logits."""
    logits_reads: int = 2
    """How often the row kernel fetches a logit from memory: for the statistics, and for the gradient."""


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


def chunk_rows(num_tokens: int, vocab: int, schedule: Schedule) -> int:
    """As `head.chunk_rows`: equal chunks, multiples of 32."""
    most = max(32, int(schedule.logits_bytes) // (4 * vocab) // 32 * 32)
    num_chunks = max(1, ceil(num_tokens / most))
    return ceil(ceil(num_tokens / num_chunks) / 32) * 32


def fused(num_tokens: int, hidden: int, vocab: int, card: Card, schedule: Schedule) -> list[Launch]:
    """The launches of a forward and backward pass of the loss with a trained head."""
    rows = chunk_rows(num_tokens, vocab, schedule)
    num_chunks = ceil(num_tokens / rows)
    logits = gemm(rows, vocab, hidden, 4, card)
    row = Launch(bytes=rows * vocab * (4 * schedule.logits_reads + 2))
    d_hidden = gemm(rows, hidden, vocab, 4, card)
    first, later = (gemm(vocab, hidden, rows, out_bytes, card) for out_bytes in (4, 8))
    weight = hidden * vocab
    launches = [Launch(bytes=6 * num_tokens * hidden)]  # dX in fp32, times the incoming gradient, to bf16
    if num_chunks == 1 and schedule.defers_single:
        return [*launches, logits, row, d_hidden, gemm(vocab, hidden, rows, 2, card)]
    launches += [Launch(bytes=6 * weight)]  # dW likewise
    if schedule.zeroes_first:
        first, launches = later, [*launches, Launch(bytes=4 * weight)]
    d_weights = [first, *[later] * (num_chunks - 1)]
    if schedule.streams == 1 or num_chunks == 1:
        return [*launches, *[logits, row, d_hidden] * num_chunks, *d_weights]
    # Main stream: logits 0, logits 1, gradients 0, logits 2, gradients 1, ...; row i runs beside what follows it there.
    launches += [logits, row.beside(logits)]
    for chunk in range(num_chunks):
        work = d_hidden.beside(d_weights[chunk])
        runs_beside = chunk + 1 < num_chunks
        launches.append(work.beside(row) if runs_beside else work)
        if chunk + 2 < num_chunks:
            launches.append(logits)
    return launches


def share(num_tokens: int, head: tuple[int, int], card: Card, rates: Rates, schedule: Schedule) -> float:
    """Time of bare cuBLAS over ours."""
    total = lambda launches: sum(launch.seconds(card, rates) for launch in launches)
    return total(bare(num_tokens, *head, card)) / total(fused(num_tokens, *head, card, schedule))


SCHEDULES = {
    "before: zeros first, dW rounded in the backward": Schedule(zeroes_first=True, defers_single=False),
    "first chunk writes dW": Schedule(defers_single=False),
    "now: and the only chunk's dW waits for the backward": Schedule(),
    "now, chunks of up to 1.75 GiB": Schedule(logits_bytes=7 * 2**28),
    "now, two streams": Schedule(streams=2),
    "now, two streams, chunks of up to 1.75 GiB": Schedule(logits_bytes=7 * 2**28, streams=2),
    "now, logits fetched once": Schedule(logits_reads=1),
    "all of these": replace(Schedule(logits_bytes=7 * 2**28), streams=2, logits_reads=1),
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
    print(f"predicted share of bare cuBLAS on {arguments.card}, head {list(HEADS)[2]}, by tokens {TOKENS}")
    for rates, schedules in table.items():
        for name, heads in schedules.items():
            print(f"{rates:9} {name:52}" + "".join(f"{value:7.1%}" for value in heads[list(HEADS)[2]].values()))


if __name__ == "__main__":
    main()
