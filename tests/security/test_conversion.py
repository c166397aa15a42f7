"""Engine states of strangers: DeepSpeed's converter, which runs what files hold, opens none that was not checked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.learning import universal

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine folder that two ranks left, to one rank; nothing is converted in these tests."""
    state = tmp_path / "engine/state"
    state.mkdir(parents=True)
    for name in (MODEL, OPTIMIZER.format(0), OPTIMIZER.format(1)):
        torch.save({"module": {"a.weight": torch.zeros(2)}}, state / name)
    monkeypatch.setattr(universal.subprocess, "run", lambda *_, **__: pytest.fail("the converter was started"))
    return tmp_path / "engine"


def refused(saved: Path, allow_pickle: bool = False) -> str:
    with (
        pytest.raises(ValueError) as error,
        universal.loadable_state(saved, saved.parent / "universal", allow_pickle),
    ):
        pass
    return str(error.value)


PLACES: dict[str, Callable[[Path], Path]] = {
    "in a folder": lambda state: state / "global_step1" / MODEL,
    "deeper": lambda state: state / "a/b" / OPTIMIZER.format(7),
    "another ending": lambda state: state / "mp_rank_00_model_states.bin",
    "another beginning": lambda state: state / "layer_00-model_states.pt",
    "an expert's": lambda state: state / "layer_0_expert_0_mp_rank_00_model_states.pt",
    "hidden": lambda state: state / ".mp_rank_00_model_states.pt",
    "the model's": lambda state: state / MODEL,
    "an optimizer's": lambda state: state / OPTIMIZER.format(1),
}


@pytest.mark.parametrize("where", PLACES)
def test_conversion_runs_no_code_wherever_it_lies(saved: Path, tmp_path: Path, where: str) -> None:
    path = PLACES[where](saved / "state")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {"a.weight": Bomb(tmp_path / "ran")}}, path)
    line = refused(saved)
    assert path.name in line or "is not what DeepSpeed writes there" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_conversion_opens_no_link(saved: Path, tmp_path: Path, allow_pickle: bool) -> None:
    """Neither of a file nor of a folder, even where pickles are allowed."""
    outside = (saved / "state" / MODEL).rename(tmp_path / "outside.pt")
    (saved / "state" / MODEL).symlink_to(outside)
    assert MODEL in refused(saved, allow_pickle)
    (saved / "state" / MODEL).unlink()
    (saved / "state/more").symlink_to(tmp_path)
    assert "more" in refused(saved, allow_pickle)


NAMES: dict[str, Any] = {
    "absolute": {"module": {"/elsewhere/outside": torch.zeros(1)}},
    "upward": {"module": {"../../outside": torch.zeros(1)}},
    "parent": {"param_shapes": [OrderedDict({"..": torch.Size([1])})]},
    "of a fragment": {"optimizer_state_dict": {"param_slice_mappings": [OrderedDict({"a/../../b": 1})]}},
    "in a tuple": {"optimizer_state_dict": ({"x": [{"/y": 1}]},)},
    "steering": {"universal_checkpoint_info": {"a": 1}},
    "experts": {"ds_autoep_layers": [{"expert_key_prefix": "/elsewhere/outside"}]},
}


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("file", [MODEL, OPTIMIZER.format(1)])
def test_names_of_parameters_do_not_become_paths(saved: Path, what: str, file: str) -> None:
    torch.save(NAMES[what], saved / "state" / file)
    assert "which no state of this trainer has" in refused(saved)


def test_conversion_writes_into_a_new_folder_and_imports_nothing_from_where_it_is_started(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lies there is deleted; a link is removed, and what it leads to stays."""
    outside, seen = tmp_path / "outside", {}
    outside.mkdir()
    (tmp_path / "universal").symlink_to(outside)

    def converter(command: list[str], **options: Any) -> Any:
        seen.update(options, out=Path(command[command.index("--output_folder") + 1]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(universal.subprocess, "run", converter)
    with universal.loadable_state(saved, tmp_path / "universal", allow_pickle=False) as (folder, is_universal):
        assert is_universal and not folder.is_symlink()
        assert seen["cwd"] == seen["out"].parent == folder and list(folder.iterdir()) == []
    assert outside.exists() and not (tmp_path / "universal").exists()
