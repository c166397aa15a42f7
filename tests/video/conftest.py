"""`corpus`: the folder of numbered, awkward and broken videos, made once and kept in pytest's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.video import corpus as corpus_module
from tests.video import fields, lacing, samples, user_files
from tests.video.corpus import build_corpus
from tests.video.user_files import PARTS, USER_CASES

MODULES = (corpus_module, user_files, fields, lacing, samples)
"""What the corpus is made by."""


@pytest.fixture(scope="session")
def corpus(pytestconfig: pytest.Config) -> Path:
    recipes = b"".join(Path(module.__file__ or "").read_bytes() for module in MODULES)
    recipe = hashlib.sha256(recipes).hexdigest()[:12]
    folder = pytestconfig.cache.mkdir("video_corpus") / recipe
    draft = folder.with_suffix(".draft")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait for what one makes
        if not folder.exists():
            shutil.rmtree(draft, ignore_errors=True)
            build_corpus(draft)
            build_corpus(draft, USER_CASES, PARTS)
            draft.rename(folder)
    return folder


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of real clips, outside the repository."""
    shared = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "videos").is_dir():
        pytest.skip(f"no real clips in {shared / 'videos'}; set TEMPSAMP_SHARED to the folder that has them")
    return shared / "videos"
