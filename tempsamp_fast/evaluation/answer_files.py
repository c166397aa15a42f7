"""Answers of an evaluation on disk, so that it can be interrupted and continued on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempsamp_fast.data.text_files import parse_json
from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.system.files import open_to_append, write_file


class AnswerFiles:
    """The answers of one mode in FOLDER: `<mode>.<rank>.jsonl` while they come, `<mode>.jsonl` once all are there.

    A line that a kill cut off is dropped.
    """

    def __init__(self, folder: Path, mode: Mode, rank: int) -> None:
        self.merged = folder / f"{mode}.jsonl"
        self._own = folder / f"{mode}.{rank}.jsonl"
        if self._own.is_file():
            content = self._own.read_bytes()
            write_file(self._own, content[: content.rfind(b"\n") + 1])

    def read(self, samples: Sequence[Sample]) -> dict[str, str]:
        """The texts so far by sample id, of all ranks.

        Raises ValueError naming the file and line of an answer to another query or video of the same id.
        """
        by_id = {sample.sample_id: sample for sample in samples}
        texts = {}
        for path in filter(Path.is_file, [self.merged, *self._parts()]):
            for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
                row: dict[str, Any] = parse_json(str(path), line) if line.endswith("\n") else {"sample_id": None}
                sample = by_id.get(row["sample_id"])
                if sample is None or "skipped" in row:
                    continue
                if (row["query"], Path(row["video"]).name) != (sample.query, sample.video.name):
                    raise ValueError(f"{path}: line {number} answers another query of the id {sample.sample_id!r}")
                texts[sample.sample_id] = row["text"]
        return texts

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep answers of this rank."""
        with open_to_append(self._own) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def merge(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the ranks' files by one of all rows."""
        write_file(self.merged, "".join(json.dumps(row) + "\n" for row in rows))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return list(self.merged.parent.glob(f"{self.merged.stem}.*.jsonl"))
