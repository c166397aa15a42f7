"""What is read of a checkpoint's folder: its own regular files, which name no others, run nothing, and end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import is_offline_mode
from safetensors.torch import save_file

from tempsamp_fast.config import DataConfig, ModelConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.embedded.model import tiny_config, train_tokenizer
from tempsamp_fast.model import lora
from tempsamp_fast.model.architectures import model_config
from tempsamp_fast.model.loading import check_folder, hub_for, load_model
from tempsamp_fast.run.checkpoint import read_video_settings
from tempsamp_fast.system.bounded import bounded
from tempsamp_fast.system.files import log_printably

SECRET = json.dumps({"token": "hf_secret"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model, until its weights are read."""
    folder = tmp_path / "model"
    tiny_config(64, lambda token: 60, "qwen2_5_vl").save_pretrained(folder)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


def by_parent(path: Path, secret: Path) -> None:
    """A folder that is a link, with a file of the wanted name in it."""
    outside = secret.parent / "outside"
    outside.mkdir()
    shutil.copy(secret, outside / "adapter_config.json")
    (path.parent / "reference").symlink_to(outside)


LINKS: dict[str, Callable[[Path, Path], Any]] = {
    "symbolic": lambda path, secret: path.symlink_to(secret),
    "relative": lambda path, secret: path.symlink_to(Path("..") / secret.name),
    "chain": lambda path, secret: ((path.parent / "x").symlink_to(secret), path.symlink_to("x")),
    "hard": lambda path, secret: path.hardlink_to(secret),
    "pipe": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "loop": lambda path, _: path.symlink_to(path),
    "parent": by_parent,
}


@pytest.mark.parametrize("how", LINKS)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video.json", "chat_template.jinja", "merges.txt"])
def test_a_file_from_elsewhere_is_not_read(model: Path, secret: Path, how: str, name: str) -> None:
    """By the doors that load a model and the one that only plans; both name the file."""
    LINKS[how](model / name, secret)
    for load in (lambda: load_model(str(model), ModelConfig(), torch.float32), lambda: model_config(given(model))):
        with pytest.raises((ValueError, OSError), match=name if how != "parent" else "adapter_config.json") as error:
            load()
        assert "hf_secret" not in str(error.value)


def given(folder: Path) -> ModelConfig:
    return ModelConfig(model=str(folder))


def test_links_within_a_folder_and_into_the_hubs_blobs_are_followed(model: Path, tmp_path: Path) -> None:
    """A snapshot in the hub's cache is made of links; blobs that are a link themselves lead out."""
    repository = tmp_path / "models--someone--model"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, path in enumerate(model.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    check_folder(snapshot, allow_pickle=False)
    blobs.rename(tmp_path / "outside")
    blobs.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out"):
        check_folder(snapshot, allow_pickle=False)


@pytest.mark.parametrize(
    "shard",
    ["a.bin", "../secret.safetensors", "/elsewhere/a.safetensors", "sub/a.safetensors", "a.safetensors.pt", 7, None],
)
@pytest.mark.parametrize("flag", [False, True])
def test_an_index_names_weights_beside_it_alone(model: Path, shard: Any, flag: bool) -> None:
    """Pickles only with --allow_pickle, files elsewhere never."""
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}, "metadata": {}}))
    if flag and shard == "a.bin":
        check_folder(model, allow_pickle=True)
        return
    with pytest.raises(ValueError, match="names"):
        check_folder(model, flag)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": NaN}', '{"weight_map": []}', "[" * 100_000, "NaN"])
def test_an_index_of_nonsense_is_named(model: Path, index: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_model(str(model), ModelConfig(), torch.float32)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"transformers_weights": "../secret.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.1.json"]}),
        ("tokenizer_config.json", {"vocab_file": "../secret"}),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}),
    ],
)
def test_settings_name_no_files_to_load_instead(model: Path, secret: Path, file: str, settings: dict) -> None:
    path = model / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | settings))
    with pytest.raises(ValueError, match="is not obeyed"):
        load_model(str(model), ModelConfig(), torch.float32)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "merges.txt", "config.json"])
def test_a_settings_file_of_any_size_is_not_read(model: Path, name: str) -> None:
    with (model / name).open("ab") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ValueError, match=name):
        check_folder(model, allow_pickle=False)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where anything tried to connect to, or looked up."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def adapters(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    found = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "someone/model", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(found | settings))
    names = [f"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "adapter_model.safetensors")
    return folder


def test_the_hub_is_asked_for_nothing_that_a_folder_names(tmp_path: Path, requests: list[Any]) -> None:
    """The base of adapters: it has to be typed, lie here, or be in the hub's cache. What is typed is asked for."""
    folder = str(adapters(tmp_path / "adapters"))
    for config in (ModelConfig(), ModelConfig(model=folder), ModelConfig(model="someone/model", offline=True)):
        with pytest.raises(ValueError, match=r"someone/model"):
            load_model(folder, config, torch.float32)
    assert requests == []
    with hub_for("someone/model", ModelConfig(model="someone/model")):
        assert not is_offline_mode()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_names_no_kernel(
    model: Path, requests: list[Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of its text model; what is loaded computes with torch's own."""
    from transformers import modeling_utils

    asked: list[str] = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **_: asked.append(name))
    config = json.loads((model / "config.json").read_text())
    config[key] = config["text_config"][key] = "someone/kernel"
    (model / "config.json").write_text(json.dumps(config))
    small_tokenizer().save_pretrained(model)
    save_file({"a": torch.zeros(1 << 20)}, model / "model.safetensors")  # as many bytes as the model has weights
    with pytest.raises(ValueError, match="has no weights for"):
        load_model(str(model), ModelConfig(), torch.float32)
    assert asked == [] and requests == []


@cache
def small_tokenizer() -> Any:
    return own_tokenizer()


MORE = {
    "megatron_config": {"a": 1},
    "rank_pattern": {"(a+)+$": 4}, "alpha_pattern": {"x": 4}, "layer_replication": [[0, 9]],
    "loftq_config": {"bits": 4}, "eva_config": {"a": 1}, "target_parameters": ["x"], "surprise": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_adapters_set_nothing_that_imports_or_matches(tmp_path: Path, name: str) -> None:
    folder = adapters(tmp_path / "adapters", **{name: MORE[name]})
    with pytest.raises(ValueError, match=f"sets {name}"):
        lora.load_adapters(torch.nn.Module(), str(folder), allow_pickle=False)


@pytest.mark.parametrize("targets", [r"^((a|aa)+)+$", r".*language_model\..*\.((q|qq)+)+", ["q_proj"], None, 7])
def test_the_places_of_adapters_are_the_names_of_their_weights(tmp_path: Path, targets: Any) -> None:
    """A regular expression of theirs is not matched; the trainer's own form stays as it is."""
    config = lora._settings_of(adapters(tmp_path / "adapters", target_modules=targets))
    assert config.target_modules == {"model.language_model.layers.0.self_attn.q_proj"}
    own = r".*language_model\..*\.(q_proj|v_proj)"
    assert lora._settings_of(adapters(tmp_path / "own", target_modules=own)).target_modules == own


@pytest.mark.parametrize(
    "found",
    [
        {
            "video_backend": "torchcodec",
            "patch_cache": "/elsewhere/x",
            "annotations": "/elsewhere/a",
            "surprise": 1,
            "fps": 3.0,
        },
        {"fps": 3.0, "on_bad_video": "skip", "video_device": "cuda", "cache_features": True},
    ],
)
def test_how_frames_were_taken_says_nothing_else(tmp_path: Path, found: dict[str, Any]) -> None:
    (tmp_path / "video.json").write_text(json.dumps(found))
    assert read_video_settings(tmp_path) == DataConfig(fps=3.0)


@pytest.mark.parametrize("text", ["[]", "3", '{"fps": "fast"}', "[" * 100_000, '{"fps": 1e999}', "{"])
def test_frames_taken_in_no_way_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "video.json").write_text(text)
    with pytest.raises(ValueError, match=r"video\.json|fps="):
        read_video_settings(tmp_path)


BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "text": "{{ 'x' * 9000000000 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "deep": "{% if true %}" * 3000,
    "long": "{{ 'x' * 90000000 }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "twice": "{{ messages[0].content[1].text }}{{ messages[0].content[1].text }}",
    "silent": "nothing is asked",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_chat_template_cannot_be_a_bomb(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempsamp_fast.data import chat

    monkeypatch.setattr(chat, "bounded", lambda work, seconds, num_bytes: bounded(work, 0.7, num_bytes))
    tokenizer = small_tokenizer()
    tokenizer.chat_template = BOMBS[what]
    with pytest.raises(ValueError, match="chat template"):
        Chat(tokenizer, tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids, "qwen2_5_vl"))


HUGE, ESCAPE = 10**12, "x\x1b]0;owned\x07"
CONFIGS: list[tuple[str, Any]] = [
    ("model_type", ESCAPE), ("model_type", 7), ("architectures", 7), ("dtype", ESCAPE), ("dtype", [1]),
    ("text_config", 7), ("text_config", None), ("vision_config", ESCAPE), ("text_config.hidden_size", ESCAPE),
    ("text_config.hidden_size", 0), ("text_config.hidden_size", -128), ("text_config.hidden_size", HUGE),
    ("text_config.num_attention_heads", 0), ("text_config.num_hidden_layers", ESCAPE),
    ("text_config.num_hidden_layers", 10**9), ("text_config.vocab_size", HUGE), ("text_config.hidden_act", ESCAPE),
    ("text_config.rope_parameters", [[]]), ("text_config.rope_parameters", {"rope_type": ESCAPE}),
    ("vision_config.depth", 10**9), ("vision_config.patch_size", 0), ("vision_config.spatial_merge_size", 0),
    ("vision_config.num_heads", 0), ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("quantization_config", 7),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), CONFIGS, ids=[f"{place}-{value!r:.20}" for place, value in CONFIGS])
def test_a_configuration_of_anything_is_one_line(
    model: Path, place: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Types, sizes and names of every kind: no traceback, no endless building, no error that repeats the file."""
    log_printably()
    config = part = json.loads((model / "config.json").read_text())
    *parents, name = place.split(".")
    for parent in parents:
        part = part[parent]
    part[name] = value
    (model / "config.json").write_text(json.dumps(config))
    small_tokenizer().save_pretrained(model)
    started = time.process_time()
    with pytest.raises(ValueError, match="model=") as error:
        load_model(str(model), ModelConfig(), torch.float32)
    assert time.process_time() - started < 10
    assert len(str(error.value)) < 700 and "\x1b" not in caplog.text


def test_a_configuration_describes_no_more_than_its_files_hold(model: Path) -> None:
    for place, value in (("num_hidden_layers", 5000), ("intermediate_size", 10**7)):
        config = json.loads((model / "config.json").read_text())
        config["text_config"] |= {"layer_types": None, place: value}
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json describes .*, and its files hold \d+ bytes of weights"):
            load_model(str(model), ModelConfig(), torch.float32)


@pytest.mark.parametrize("eos", [ESCAPE, 1.5, [[]], {"a": 1}, [ESCAPE, None], -7, 10**30, [HUGE], True])
def test_an_end_of_answers_that_is_no_token_is_left_aside(eos: Any) -> None:
    tokenizer = own_tokenizer()
    config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids, "qwen2_5_vl")
    known = Chat(tokenizer, config).end_token_ids
    assert set(Chat(tokenizer, config, generation_eos=eos).end_token_ids) <= {*known, 1}


def own_tokenizer() -> Any:
    return train_tokenizer(["where is the red square"], 300)


@pytest.mark.parametrize("name", ["../../evil", "/elsewhere/evil", "a/b", "..", ESCAPE])
def test_a_chat_template_names_no_file(tmp_path: Path, name: str) -> None:
    """Where a tokenizer has several by name, the one for chats alone is taken and saved."""
    tokenizer = own_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, name: "owned"}
    chat = Chat(tokenizer, tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids, "qwen2_5_vl"))
    folder = tmp_path / "a/b/saved"
    chat.tokenizer.save_pretrained(folder)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {path.name for path in folder.iterdir()}
    assert not any("owned" in path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("rank", [10**9, 1, "2", None, [2]])
def test_adapters_have_the_rank_of_their_weights(tmp_path: Path, rank: Any) -> None:
    folder = adapters(tmp_path / "adapters", r=rank)
    with pytest.raises(ValueError, match=r"adapter_config\.json has r=.*, its weights \[2\]"):
        lora._settings_of(folder)
