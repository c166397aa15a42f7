"""Adapters: what is trained, saved, resumed and compared with; and the head stays out of the backward."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.export import export
from tempsamp_fast.model.loading import load_model
from tempsamp_fast.model.lora import REFERENCE, TRAINED, as_reference, merged_parameters
from tempsamp_fast.model.packing import pack
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.schedule import plan

LORA = ("--lora_rank", "4", "--learning_rate", "1e-3", "--beta", "0.04")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_only_adapters_learn_and_the_reference_is_the_model_without_them(stepper) -> None:
    one = stepper("--phases", "tempsamp:2", *LORA)
    before = weights(one.run.policy)
    rows = one.steps()
    changed = {name for name, tensor in weights(one.run.policy).items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name and "language_model" in name for name in changed)
    assert one.run.reference is not None and not (one.run.folder / REFERENCE).exists()
    assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-7) and rows[1]["policy/kl"] > 0
    assert not one.run.policy.base_model.lm_head.weight.requires_grad


def test_the_reference_gives_what_the_model_did_before_its_adapters_learned(stepper) -> None:
    one = stepper("--phases", "tempsamp:1", *LORA)
    at = next(plan(one.run.phases))
    groups = one.groups(at)
    (row, *_) = pack(groups, config=one.run.policy.config, max_tokens_per_row=10_000)

    @torch.no_grad()
    def hidden(policy: Any) -> torch.Tensor:
        return policy(row, lambda hidden, weight: hidden)

    before = hidden(one.run.policy)
    one.run.update(at, groups)
    assert not torch.allclose(hidden(one.run.policy), before, atol=1e-4)
    torch.testing.assert_close(hidden(one.run.reference), before)


def test_after_supervised_steps_the_reference_keeps_what_the_adapters_had_learned(stepper) -> None:
    one = stepper("--phases", "sft:2,tempsamp:2", *LORA)
    rows = one.steps()
    assert rows[2]["policy/kl"] == pytest.approx(0, abs=1e-7) and rows[3]["policy/kl"] > 0
    model = one.run.policy.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with as_reference(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(f".{REFERENCE}." in name for name in trained)


def test_a_resumed_run_goes_on_as_if_never_stopped(trainer, without_times, tmp_path: Path) -> None:
    words = ("--phases", "sft:1,tempsamp:3", *LORA, "--save_steps", "2")
    whole = trainer.main(tmp_path / "whole", *words)
    assert without_times(trainer.cut_and_resumed(tmp_path / "cut", 2, *words)) == without_times(whole)


def test_a_run_that_starts_from_adapters_compares_with_those(trainer, stepper, tmp_path: Path) -> None:
    trainer.main(tmp_path / "first", "--phases", "sft:2", *LORA)
    adapters = str(latest_checkpoint(tmp_path / "first")[0] / "model")
    rows = stepper("--model", adapters, "--phases", "tempsamp:2", *LORA).steps()
    assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-7) and rows[1]["policy/kl"] > 0
    with pytest.raises(ValueError, match=r"lora_rank=0: the adapters in .* have rank 4"):
        stepper("--model", adapters, "--phases", "tempsamp:2")


def test_reinforcement_added_on_resuming_starts_from_what_the_adapters_had_learned(trainer, tmp_path: Path) -> None:
    trainer.main(tmp_path / "run", "--phases", "sft:2", *LORA)
    rows = trainer.main(tmp_path / "run", *LORA, "--phases", "sft:2,tempsamp:1", "--resume", str(tmp_path / "run"))
    assert rows[2]["policy/kl"] == pytest.approx(0, abs=1e-7)


def test_an_export_is_the_merged_model_and_loads_without_peft(trainer, tmp_path: Path) -> None:
    trainer.main(tmp_path / "run", "--phases", "sft:2", *LORA)
    export(tmp_path / "run", tmp_path / "merged", torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    adapted, _ = load_model(str(latest_checkpoint(tmp_path / "run")[0] / "model"), ModelConfig(), torch.float32)
    ids = torch.arange(20, 30)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    base, _ = load_model(str(trainer.checkpoint), ModelConfig(), torch.float32)
    assert not torch.allclose(plain(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-4)


def test_merged_parameters_are_those_of_the_merged_model_and_leave_it_as_it_was(stepper) -> None:
    """By the names of a checkpoint; with a reference beside the trained adapter, which is not merged."""
    one = stepper("--phases", "sft:2,tempsamp:1", *LORA)
    one.steps()
    policy, before = one.run.policy, weights(one.run.policy)
    merged = {name: value.clone() for name, value in merged_parameters(policy.base_model)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    expected = weights(policy.model.merge_and_unload(adapter_names=[TRAINED]))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    adapted = [name for name in before if name.endswith(".base_layer.weight")]
    assert adapted and not any(
        torch.equal(before[name], merged[name.removeprefix("model.base_model.model.").replace(".base_layer.", ".")])
        for name in adapted
    )


def test_targets_that_are_no_linear_layers_are_refused_with_the_choices(stepper) -> None:
    with pytest.raises(ValueError, match=r"lora_targets='lm_head,q_proj': no lm_head; choose from down_proj, .*v_proj"):
        stepper("--lora_rank", "4", "--lora_targets", "lm_head,q_proj")


@pytest.fixture(scope="module")
def saved_adapters(trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one supervised step before reinforcement leaves, its reference adapter included."""
    run = tmp_path_factory.mktemp("adapters") / "run"
    trainer.main(run, "--phases", "sft:1,tempsamp:1", *LORA)
    return latest_checkpoint(run)[0] / "model"


def test_adapters_of_a_folder_have_the_scale_that_it_tells(saved_adapters: Path, tmp_path: Path) -> None:
    """Alpha over the root of the rank here; not what PEFT takes where nothing is told."""
    folder = shutil.copytree(saved_adapters, tmp_path / "adapters")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 6, "use_rslora": True}))
    model, _ = load_model(str(folder), ModelConfig(), torch.float32)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers and {layer.scaling[TRAINED] for layer in layers} == {6 / 4**0.5}


def without_one_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    _, *kept = ((name, tensor.clone()) for name, tensor in load_file(file).items())
    save_file(dict(kept), file)


WEIGHTS, BIN = "adapter_model.safetensors", "adapter_model.bin"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "half the weights": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "cannot be loaded"),
    "one tensor missing": (without_one_tensor, "has no weights for 1 adapters, such as base_model"),
    "half the reference's weights": (lambda folder: os.truncate(folder / REFERENCE / WEIGHTS, 5000), REFERENCE),
    "half a configuration": (lambda folder: os.truncate(folder / "adapter_config.json", 20), "adapter_config.json"),
    "a configuration of nothing": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is None; expect"),
    "weights in a pickle": (
        lambda folder: (torch.save(load_file(folder / WEIGHTS), folder / BIN), (folder / WEIGHTS).unlink()),
        "--allow_pickle",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_adapters_that_cannot_be_read_end_the_run_with_one_line_that_names_them(
    trainer, saved_adapters: Path, refused, tmp_path: Path, what: str
) -> None:
    spoil, named = SPOILED[what]
    folder = shutil.copytree(saved_adapters, tmp_path / "adapters")
    spoil(folder)
    words = ("--phases", "sft:1", "--model", str(folder), "--lora_rank", "4")
    line = refused(trainer.flags(tmp_path / "run", *words))
    assert str(folder) in line and named in line
    if what == "weights in a pickle":
        model, _ = load_model(str(folder), ModelConfig(allow_pickle=True), torch.float32)
        whole, _ = load_model(str(saved_adapters), ModelConfig(), torch.float32)
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(model).items())
