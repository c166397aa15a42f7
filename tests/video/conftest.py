"""`corpus`: the folder of numbered, awkward and broken videos, made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.video.corpus import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of real clips, outside the repository."""
    shared = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "videos").is_dir():
        pytest.skip(f"no real clips in {shared / 'videos'}; set TEMPSAMP_SHARED to the folder that has them")
    return shared / "videos"
