"""Where published data sets come from, under which terms, and the commands that fetch them; nothing is fetched here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

ACADEMIC = "TimeLens's term: BSD-3 text, academic use only, and NOT for use within the European Union"


@dataclass(frozen=True)
class Source:
    """A data set as its authors offer it."""

    where: str
    licence: str
    commands: tuple[str, ...]
    """With {folder}, the quoted folder to fetch into."""
    is_restricted: bool = False
    """Whether the terms are to be accepted before the commands are shown."""
    notes: str = ""


def _hub(name: str, *patterns: str) -> str:
    chosen = "".join(f" --include {shlex.quote(pattern)}" for pattern in patterns)
    return f"hf download {name} --repo-type dataset{chosen} --local-dir {{folder}}"


_SHARDS = 'for shard in {folder}/video_shards/*/*.tar.gz; do tar -xzf "$shard" -C {folder}/videos; done'
_UNPACK = ("mkdir -p {folder}/videos", _SHARDS)


def _bench(subset: str, size: str) -> Source:
    return Source(
        "the hub's data set TencentARC/TimeLens-Bench (arXiv 2512.14698)",
        ACADEMIC,
        (_hub("TencentARC/TimeLens-Bench", f"{subset}-timelens.json", f"video_shards/{subset}/*"), *_UNPACK),
        is_restricted=True,
        notes=f"videos {size}, unpacked as videos/{subset}/ID.mp4",
    )


_CHARADES = Source(
    "annotations: jiyanggao/TALL; mirror with the test set: the hub's lmms-lab/charades_sta; videos: AI2's Charades",
    "annotations: none found (the mirror is tagged MIT); videos: AI2's own licence, non-commercial",
    (
        "git clone --depth 1 --filter blob:none https://github.com/jiyanggao/TALL {folder}/TALL",
        "cp {folder}/TALL/charades_sta_train.txt {folder}/TALL/charades_sta_test.txt {folder}",
    ),
    is_restricted=True,
    notes="take Charades_v1_480.zip and Charades.zip (whose Charades_v1_*.csv have the durations) from AI2's page of "
    "the data set after reading its licence, and unpack both there",
)
_ACTIVITYNET = Source(
    "captions.zip of ActivityNet Captions; videos: the request form of ActivityNet, or the hub's "
    "friedrichor/ActivityNet_Captions (42 GB in parts)",
    "'other': the terms of ActivityNet's form",
    (
        _hub("friedrichor/ActivityNet_Captions"),
        "cat {folder}/ActivityNet_Videos.tar.part-* | tar -x -C {folder}",
    ),
    is_restricted=True,
    notes="train.json, val_1.json and val_2.json are in captions.zip",
)
_QVHIGHLIGHTS = Source(
    "annotations: jayleicn/moment_detr, data/; videos: qvhilights_videos.tar.gz of its authors",
    "annotations CC BY-NC-SA 4.0 (no commercial use), code MIT",
    (
        "git clone --depth 1 https://github.com/jayleicn/moment_detr {folder}/moment_detr",
        "cp {folder}/moment_detr/data/highlight_*_release.jsonl {folder}",
    ),
    is_restricted=True,
    notes="moment_detr's README links the archive of the videos",
)
SOURCES = {
    **dict.fromkeys(("charades-train", "charades-test"), _CHARADES),
    **dict.fromkeys(("activitynet-train", "activitynet-val", "activitynet-test"), _ACTIVITYNET),
    **dict.fromkeys(("qvhighlights-train", "qvhighlights-val"), _QVHIGHLIGHTS),
    "timelens-100k": Source(
        "the hub's data set TencentARC/TimeLens-100K (arXiv 2512.14698)",
        ACADEMIC,
        (_hub("TencentARC/TimeLens-100K"), *_UNPACK),
        is_restricted=True,
        notes="annotations 12.6 MB, videos about 146 GB",
    ),
    "timelens-bench-charades": _bench("charades", "in one shard"),
    "timelens-bench-activitynet": _bench("activitynet", "about 50 GB"),
    "timelens-bench-qvhighlights": _bench("qvhighlights", "about 8 GB"),
    "timelens2-93k": Source(
        "annotations and rollouts: MCG-NJU/TimeLens2, grpo/data/; the hub's MCG-NJU/TimeLens2-93K (arXiv 2607.17423)",
        f"card and README Apache-2.0, but the repository's LICENSE file is {ACADEMIC}",
        (
            _hub("MCG-NJU/TimeLens2-93K"),
            "git clone --depth 1 https://github.com/MCG-NJU/TimeLens2 {folder}/TimeLens2",
            "cp {folder}/TimeLens2/grpo/data/annotations/timelens2-93k.jsonl {folder}",
        ),
        is_restricted=True,
        notes="videos are in part those of others, to be fetched there",
    ),
    "orarl": Source(
        "the hub's data set OraRL/OraRL-Data (arXiv 2608.20492)",
        "the terms of every source in it",
        (_hub("OraRL/OraRL-Data"),),
        is_restricted=True,
        notes="evaluation rows and media; training rows are announced, not published",
    ),
    "omtg-bench": Source(
        "the hub's data set insomnia7/omtg_bench (arXiv 2606.06294)",
        "CC BY-NC 4.0 (no commercial use)",
        (_hub("insomnia7/omtg_bench"), "unzip -n {folder}/videos.zip -d {folder}"),
        is_restricted=True,
    ),
    "omtg-56k": Source(
        "the hub's data set insomnia7/omtg56k (arXiv 2606.06294)",
        "CC BY-NC 4.0 (no commercial use)",
        (_hub("insomnia7/omtg56k"),),
        is_restricted=True,
    ),
    "tvgbench": Source("the hub's data set Boshenxx/TimeR1-Dataset", "not stated", (_hub("Boshenxx/TimeR1-Dataset"),)),
    "timelens-offline": Source(
        "the hub's data set JungleGym/TimeLens-Qwen3-VL-8B-filter-data: offline IoUs of TimeLens-100K",
        "not stated",
        (_hub("JungleGym/TimeLens-Qwen3-VL-8B-filter-data"),),
    ),
}
"""By the names of `catalogue.DATASETS`, and of some that are no annotation file."""


def how_to_fetch(name: str, folder: Path, is_accepted: bool) -> str:
    """Source, licence and commands as text; of a restricted set the commands only where its terms `is_accepted`.

    Raises ValueError for a name without a source here.
    """
    if name not in SOURCES:
        raise ValueError(f"{name!r}: no source known; choose from {', '.join(SOURCES)}")
    source = SOURCES[name]
    lines = [f"{name}: {source.where}", f"licence: {source.licence}"]
    lines += [f"note: {source.notes}"] if source.notes else []
    if source.is_restricted and not is_accepted:
        return "\n".join([*lines, "If you may and do accept these terms, add --accept_licence to see the commands."])
    commands = [command.replace("{folder}", shlex.quote(str(folder))) for command in source.commands]
    check = f"python -m tempsamp_fast.data check {name} --videos {shlex.quote(str(folder / 'videos'))}"
    lines += ["nothing was fetched; to fetch it:", *(f"  {line}" for line in commands), f"then: {check}"]
    return "\n".join(lines)
