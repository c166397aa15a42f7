"""Which frames come back from awkward and broken files: ours beside torchcodec and decord on the same corpus.

    python -m bench.video_corpus --out bench/results/video_corpus.json
    OTHER/python -m bench.video_corpus --backends --peers torchcodec --beside bench/results/video_corpus.json

The second line adds a peer of another release, from an environment that has it. Peers are asked for every frame by
index, in random order, as a data loader would, each file in a process of its own. A file counts as solved when no wrong
frame came back and every frame that ffmpeg's command line decodes did; a file without video, when there was an error.
Files that only our rules refuse (too short, too thin, too large) are not held against the peers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.video.corpus import CASES, Case, build_corpus, read
from tests.video.user_files import PARTS, USER_CASES
from tests.video.verdict import judge, recoverable, truth

TIMEOUT_S = 20.0
FrameAt = Callable[[int], np.ndarray]
"""index -> [height, width, 3] uint8."""


@dataclass
class Score:
    """What one decoder made of one file."""

    right: int = 0
    wrong: int = 0
    outcome: str = "ok"
    solved: bool = False


def open_torchcodec(path: str) -> tuple[int, FrameAt]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC")
    return len(decoder), lambda index: decoder.get_frame_at(index).data.numpy()


def open_decord(path: str) -> tuple[int, FrameAt]:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return len(reader), lambda index: reader[index].asnumpy()


PEERS = {"torchcodec": open_torchcodec, "decord": open_decord}


def score_peer(name: str, path: str, expected: Sequence[int]) -> Score:
    """Ask a peer for all frames in random order; frame i must show `expected[i]`. Silences the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    score = Score()
    try:
        count, frame_at = PEERS[name](path)
    except Exception as error:  # whatever a peer raises is its answer
        return Score(outcome=type(error).__name__)
    for index in np.random.default_rng(0).permutation(min(count, 1000)).tolist():
        try:
            (number,) = read(frame_at(index)[None].mean(axis=-1))
        except Exception as error:  # as above
            score.outcome = type(error).__name__
            continue
        is_right = index < len(expected) and number == expected[index]
        score.right += is_right
        score.wrong += not is_right
    return score


def isolated(name: str, path: Path, expected: Sequence[int]) -> Score:
    """`score_peer` in a forked process: a crash or a hang is an outcome too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(score_peer(name, str(path), expected)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIMEOUT_S) else Score(outcome="hang")
    except EOFError:
        return Score(outcome="crash")
    finally:
        process.kill()
        process.join()


def peer_score(name: str, case: Case, folder: Path) -> Score:
    if case.expect == "refused":
        if set(case.codes) & {"TOO_FEW_FRAMES", "BAD_GEOMETRY", "LIMIT_EXCEEDED"}:
            return Score(outcome="not asked", solved=True)
        score = isolated(name, folder / case.name, [])
        score.solved = score.right + score.wrong == 0 and score.outcome not in ("ok", "hang", "crash")
        return score
    _, expected = truth(folder / (case.pristine or case.name), case.size)
    score = isolated(name, folder / case.name, expected)
    wanted = recoverable(case, folder) if case.pristine else len(expected)
    score.solved = score.wrong == 0 and score.right >= wanted
    return score


def our_score(backend: str, case: Case, folder: Path) -> Score:
    verdict = judge(case, folder, backend)
    return Score(verdict.right, verdict.wrong, verdict.outcome, verdict.good)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/video_corpus.json"))
    parser.add_argument("--backends", nargs="*", default=["native", "torchcodec"], help="our backends")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--beside", type=Path, help="earlier report on the same files, whose decoders come first")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    peers = {name: f"{name} {importlib.metadata.version(name)}" for name in arguments.peers}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        build_corpus(folder)
        build_corpus(folder, USER_CASES, PARTS)
        for case in CASES + USER_CASES:
            wanted = 0 if case.expect == "refused" else len(truth(folder / (case.pristine or case.name), case.size)[1])
            row: dict[str, Any] = {"file": case.name, "frames": wanted}
            for name, release in peers.items():
                row[release] = asdict(peer_score(name, case, folder))
            for name in arguments.backends:
                row[f"tempsamp_{name}"] = asdict(our_score(name, case, folder))
            table.append(row)
            print("  ".join([f"{case.name:28}"] + [f"{n}: {row[n]['right']}/{row[n]['wrong']}" for n in list(row)[2:]]))
    if arguments.beside:
        earlier = json.loads(arguments.beside.read_text())["files"]
        assert [row["file"] for row in earlier] == [row["file"] for row in table], "a report on other files"
        table = [old | new for old, new in zip(earlier, table, strict=True)]
    solved = {name: sum(row[name]["solved"] for row in table) for name in list(table[0])[2:]}
    report = {"num_files": len(table), "solved": solved, "files": []}
    rows = ",\n".join(json.dumps(row) for row in table)
    arguments.out.write_text(json.dumps(report)[:-2] + f"\n{rows}\n]}}\n")
    print(f"{len(table)} files, solved: {solved}")


if __name__ == "__main__":
    main()
