"""An exported model: readable by others, with the processors' settings and a card that says what it is."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tempsamp_fast.data.prompt_file import saved_templates
from tempsamp_fast.export import export, main
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.processor_files import processor_files
from tempsamp_fast.report.model_card import model_card
from tempsamp_fast.run.checkpoint import read_video_settings


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "my_model"
    export(finished_run.folder, out, torch.bfloat16)
    return out


def test_every_file_may_be_read_by_others(exported: Path) -> None:
    assert stat.S_IMODE(exported.stat().st_mode) & 0o055 == 0o055
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {0o644}
    assert AutoModelForImageTextToText.from_pretrained(exported).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(exported).chat_template


def test_weights_that_are_not_finite_are_not_written(checkpoint: Path, tmp_path: Path) -> None:
    """Those that only the 16 bits make infinite neither."""
    for value, dtype in ((float("nan"), torch.float32), (3.4e38, torch.bfloat16)):
        spoiled = shutil.copytree(checkpoint, tmp_path / f"{dtype}")
        weights = load_file(spoiled / "model.safetensors")
        name = next(name for name in weights if "mlp.down_proj.weight" in name)
        weights[name][0, 0] = value
        save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"down_proj.weight holds NaN or infinity \(in torch"):
            export(spoiled, tmp_path / "out", dtype)
        assert not (tmp_path / "out").exists()


def test_its_frames_and_own_prompts_go_with_it(checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "prompts.json").write_text(json.dumps({"answer": "say when {query}"}))
    (model / "video.json").write_text(json.dumps({"fps": 3.0, "answer_form": "json"}))
    export(model, tmp_path / "out", torch.float32)
    assert saved_templates(str(tmp_path / "out")) == {"answer": "say when {query}"}
    found = read_video_settings(tmp_path / "out")
    assert (found.fps, found.answer_form) == (3.0, "json")


def test_its_card_has_settings_data_and_scores(exported: Path, finished_run) -> None:
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "# my_model" in text
    assert "After 5 optimizer steps." in text and "| beta | 0.04 |" not in text and "| num_generations | 3 |" in text
    assert "| annotations | train.json |" in text and str(finished_run.folder.parent) not in text
    assert "On test.json, held out" in text and "| 2\\_tempsamp/answer | answer |" in text and "| mIoU |" in text
    assert "- answer: When does" in text and "- think: " in text


def test_a_card_of_a_strangers_record_holds_no_markup(tmp_path: Path) -> None:
    model = tmp_path / "run/checkpoints/step_000001/model"
    model.mkdir(parents=True)
    evil = "<script>x</script> | [a](b) \x1b[31m" + "y" * 5000
    state = {
        "step": 1,
        "config": {"data": {"videos": f"{tmp_path}/{evil}", "annotations": evil}, "model": {"model": evil}},
    }
    (model.parent / "state.json").write_text(json.dumps(state))
    text = model_card("m", model, {})
    assert "<script>" not in text.replace("\\<", "") and "\x1b" not in text and str(tmp_path) not in text
    assert max(map(len, text.splitlines())) < 600
    assert "## Data" not in model_card("m", tmp_path, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_cut_as_the_family_does(family: str, tmp_path: Path) -> None:
    config = replace(FAMILIES[family]).config_class(**FAMILIES[family].tiny)
    files = {name: json.loads(text) for name, text in processor_files(config).items()}
    assert files.keys() == {"preprocessor_config.json", "video_preprocessor_config.json"}
    for settings in files.values():
        assert settings["patch_size"] == config.vision_config.patch_size
        assert settings["merge_size"] == config.vision_config.spatial_merge_size
        assert settings["size"]["shortest_edge"] < settings["size"]["longest_edge"]


def test_transformers_loads_the_processor(exported: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(exported)
    assert processor.video_processor.patch_size == 14 and processor.tokenizer.chat_template


def test_a_full_disk_leaves_no_model_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert main([str(checkpoint), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    assert main([str(checkpoint), str(tmp_path / "out")]) == 2
