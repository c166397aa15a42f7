"""Settings of the model off their defaults: what is loaded, what of it is trained, how it runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.model import loading as model_module
from tempsamp_fast.model import policy as policy_module
from tempsamp_fast.rollout import generate as rollout_module
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan

SHORT = ("--phases", "sft:1")


def test_the_model_asked_for_is_trained(stepper: Callable, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    one, two = stepper(*SHORT), stepper(*SHORT, "--model", str(other))
    torch.testing.assert_close(two.weights(), one.weights() + 1)


def test_the_embedded_model_is_of_the_family_and_seed_asked_for(stepper: Callable) -> None:
    tiny = lambda *words: stepper(*SHORT, "--model", "tiny", *words)
    one, other, again = tiny("--tiny_family", "qwen3_vl"), tiny("--seed", "1"), tiny()
    assert [each.run.policy.config.model_type for each in (one, other)] == ["qwen3_vl", "qwen2_5_vl"]
    assert not torch.equal(other.weights(), again.weights())


def test_weights_are_of_the_dtype_asked_for(stepper: Callable) -> None:
    """`auto` is float32 without a GPU; the optimizer keeps float32 copies of bfloat16 weights."""
    if torch.cuda.is_available():
        pytest.skip("auto is bfloat16 with a GPU")
    for words, dtype in (((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)):
        run = stepper("--phases", "grpo:1", "--beta", "0.1", *words).run
        policies = (run.policy, run._build_reference(is_first=True))
        assert {parameter.dtype for each in policies for parameter in each.parameters()} == {dtype}
        assert run.engine.bfloat16_enabled() == (dtype == torch.bfloat16)


def test_a_frozen_tower_has_no_gradient_and_no_place_in_the_optimizer(stepper: Callable) -> None:
    for words in ((), ("--freeze_vision",)):
        run = stepper(*SHORT, *words).run
        tower = {id(parameter) for parameter in run.policy.base_model.model.visual.parameters()}
        trained = {id(parameter) for group in run.engine.optimizer.param_groups for parameter in group["params"]}
        assert bool(tower & trained) == run.policy.base_model.model.visual.blocks[0].mlp.gate_proj.weight.requires_grad
        assert bool(tower & trained) == (not words)


def test_adapters_are_of_the_rank_scale_and_place_asked_for(stepper: Callable) -> None:
    """The scale is alpha over rank, and 2 where alpha is not given."""
    for words, rank, scale in ((("--lora_rank", "3"), 3, 2), (("--lora_rank", "4", "--lora_alpha", "6"), 4, 1.5)):
        model = stepper(*SHORT, *words, "--lora_targets", "q_proj,up_proj").run.policy.model
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "up_proj"}
        assert {module.lora_A["default"].out_features for module in layers.values()} == {rank}
        assert {module.scaling["default"] for module in layers.values()} == {scale}


@pytest.mark.parametrize(
    ("words", "layers", "blocks"),
    [
        ((), [], []),
        (("--gradient_checkpointing",), [0, 1, 2, 3], [0, 1]),
        (("--gradient_checkpointing", "--checkpoint_every", "3", "--checkpoint_vision", "False"), [0, 3], []),
    ],
)
def test_the_layers_asked_for_run_again_in_the_first_update(
    stepper: Callable, words: tuple[str, ...], layers: list[int], blocks: list[int]
) -> None:
    one = stepper(*SHORT, "--gradient_accumulation_steps", "1", *words)
    parts = (one.run.policy.base_model.model.language_model.layers, one.run.policy.base_model.model.visual.blocks)
    calls: list[torch.nn.Module] = []
    for part in parts:
        for layer in part:
            layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    one.steps()
    again = [[index for index, layer in enumerate(part) if calls.count(layer.mlp) == 2] for part in parts]
    assert again == [layers, blocks]


def test_sampling_update_and_reference_attend_by_the_core_asked_for(
    stepper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores: list[str] = []
    for module in (policy_module, rollout_module):
        attend = module.packed_attention
        note = lambda *of, core, attend=attend, **options: cores.append(core) or attend(*of, core=core, **options)
        monkeypatch.setattr(module, "packed_attention", note)
    words = ("--gradient_accumulation_steps", "1", "--max_completion_length", "2", "--attention_core", "split")
    one = stepper("--phases", "grpo:1", "--beta", "0.1", *words)
    one.steps()
    assert len(cores) == 3 and set(cores) == {"split"}


def test_a_core_that_cannot_train_here_is_refused_before_the_model_is_made(stepper: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("flex trains on a GPU")
    with pytest.raises(ValueError, match="attention_core='flex'"):
        stepper(*SHORT, "--attention_core", "flex", "--model", "nowhere")


def test_fused_layers_run_where_they_are_asked_for(stepper: Callable) -> None:
    """By Triton's interpreter here; `off` keeps transformers' own."""
    for choice in ("on", "off"):
        model = stepper(*SHORT, "--liger_layers", choice).run.policy.base_model
        forward = model.model.language_model.norm.forward
        assert (forward.__module__ == "tempsamp_fast.model.liger_layers") == (choice == "on")


def test_remote_code_is_trusted_only_when_asked_for(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By everything that reads the checkpoint."""
    trusted: list[tuple[str, bool]] = []
    for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoTokenizer"):
        loads = getattr(model_module, name).from_pretrained

        def noting(*arguments: Any, loads: Any = loads, name: str = name, **options: Any) -> Any:
            trusted.append((name, options["trust_remote_code"]))
            return loads(*arguments, **options)

        monkeypatch.setattr(getattr(model_module, name), "from_pretrained", noting)
    for words, expected in (((), False), (("--trust_remote_code",), True)):
        trusted.clear()
        stepper(*SHORT, *words)
        asked = ("AutoConfig", "AutoModelForImageTextToText", "AutoTokenizer")
        assert {(name, expected) for name in asked} == set(trusted)


def test_pickles_are_loaded_only_when_asked_for(stepper: Callable, trainer, checkpoint: Path, tmp_path: Path) -> None:
    """Weights, and the engine's state of a resumed run: it holds an object that a plain load would have to import."""
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    words = (*SHORT, "--model", str(pickled))
    with pytest.raises(ValueError, match="pickled"):
        stepper(*words)
    assert torch.equal(stepper(*words, "--allow_pickle").weights(), stepper(*SHORT).weights())

    trainer.main(tmp_path / "run", *SHORT)
    folder = latest_checkpoint(tmp_path / "run")[0]
    (state,) = (folder / "engine/state").iterdir()
    torch.save(torch.load(state, weights_only=False) | {"client_state": Path("an object")}, state)
    (folder / "state.json").write_text('{"step": 1}')
    resume = ("--resume", str(tmp_path / "run"))
    with pytest.raises(ValueError, match="--allow_pickle"):
        Run(parse_args(resume))
    run = Run(parse_args([*resume, "--allow_pickle"]))
    assert run.first_step == 1 and not list(plan(run.phases, run.first_step))
