"""How to fetch a published data set: told with its licence, and never done."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tempsamp_fast.data.__main__ import main
from tempsamp_fast.data.catalogue import DATASETS
from tempsamp_fast.data.sources import SOURCES, how_to_fetch


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("timelens") and name in DATASETS])
def test_timelens_shows_its_term_first_and_commands_once_it_is_accepted(name):
    text = how_to_fetch(name, Path("a folder"), is_accepted=False)
    assert "academic use only" in text and "European Union" in text
    assert "hf download" not in text and "add --accept_licence" in text
    accepted = how_to_fetch(name, Path("a folder"), is_accepted=True)
    assert "hf download" in accepted and "'a folder'" in accepted and f"data check {name} --videos" in accepted


def test_every_set_that_forbids_commerce_is_restricted_and_every_command_is_whole():
    for name, source in SOURCES.items():
        assert source.where and source.licence and source.commands
        assert source.is_restricted or not {"NC", "academic", "non-commercial"} & set(source.licence.split())
        assert "{" not in how_to_fetch(name, Path("x"), is_accepted=True).replace("${", "")
    with pytest.raises(ValueError, match="'kinetics': no source known; choose from charades-train"):
        how_to_fetch("kinetics", Path("x"), is_accepted=True)


def test_the_command_prints_and_fetches_nothing(tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.chdir(tmp_path)
    main(["fetch", "omtg-bench", "--folder", "omtg", "--accept_licence"])
    printed = capsys.readouterr().out
    assert "CC BY-NC 4.0" in printed and "hf download insomnia7/omtg_bench" in printed and "omtg/videos" in printed
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        main(["fetch", "kinetics"])
    assert ended.value.code == 2 and "no source known" in capsys.readouterr().err
