"""Which keys rows share, cut into pieces so that the programs that read them fill a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_QUERIES = 64
"""Of one program; more rows of a span read its keys again."""
SMALLEST_PIECE, NUM_PROGRAMS = 256, 128
"""Keys that are worth a program, and programs that fill a GPU."""


@dataclass(frozen=True)
class Span:
    """Shared keys, and the rows that continue them."""

    first_key: int
    num_keys: int
    first_row: int
    num_rows: int
    first_part: int
    """Pieces of spans before this one on the path of its rows."""
    num_parts: int
    """Pieces that it is cut into."""

    def items(self, rows_per_item: int) -> list[tuple[int, ...]]:
        """What each program reads: (first_row, num_rows, first_key, num_keys, part)."""
        piece = -(-self.num_keys // self.num_parts)
        stop = self.first_row + self.num_rows
        return [
            (row, min(rows_per_item, stop - row), self.first_key + start, min(piece, self.num_keys - start),
             self.first_part + start // piece)
            for start in range(0, self.num_keys, piece)
            for row in range(self.first_row, stop, rows_per_item)
        ]  # fmt: skip


def alike(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans in lists of as many rows each and of lengths not further apart than 1 to 2; no row comes twice."""
    found: list[list[Span]] = []
    taken: set[int] = set()
    for span in sorted(spans, key=lambda span: (span.num_rows, span.num_keys)):
        rows = range(span.first_row, span.first_row + span.num_rows)
        fits = found and span.num_rows == found[-1][0].num_rows and span.num_keys <= 2 * found[-1][0].num_keys
        if not fits or not taken.isdisjoint(rows):
            found.append([])
            taken.clear()
        found[-1].append(span)
        taken.update(rows)
    return found


def cut(paths: Sequence[Sequence[tuple[int, int]]], num_kv_heads: int) -> tuple[list[Span], list[int]]:
    """The spans that rows continue, and the number of pieces on the path of each row.

    paths: by row, (first key, number of keys) from the root on; rows of a span follow each other.
    """
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, path in enumerate(paths):
        for span in path:
            rows_of.setdefault(span, []).append(row)
    num_keys = sum(length for _, length in rows_of)
    piece = max(SMALLEST_PIECE, -(-num_keys * num_kv_heads // NUM_PROGRAMS))
    num_parts = {span: -(-span[1] // -(-span[1] // -(-span[1] // piece))) for span in rows_of}
    spans = []
    for span, rows in rows_of.items():
        path = paths[rows[0]]
        before = sum(num_parts[each] for each in path[: path.index(span)])
        spans.append(Span(*span, rows[0], len(rows), before, num_parts[span]))
    return spans, [sum(num_parts[span] for span in path) for path in paths]


def rows_per_item(num_heads: int, num_kv_heads: int) -> int:
    """Rows whose queries one program takes."""
    return max(1, MAX_QUERIES * num_kv_heads // num_heads)
