"""The plan of a run: right in its counts, near a measured run in its memory, and made without weights or data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2_5_VLForConditionalGeneration

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import ModelConfig
from tempsamp_fast.config.recipe import RECIPES, read_recipe
from tempsamp_fast.embedded.model import tiny_model, train_tokenizer
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.flops import layout_flops
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.shapes import text_shape
from tempsamp_fast.plan import decided, describe_plan, main
from tempsamp_fast.planning.estimate import TEXT_TOKENS, Work, step_memory, work_of
from tempsamp_fast.planning.network import step_messages
from tempsamp_fast.planning.subject import peak_memory, with_stage
from tempsamp_fast.train import main as train_main
from tests.conftest import Tiny

PUBLISHED_COUNTS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen/Qwen3.5-0.8B": 852_985_920,
    "Qwen/Qwen3.5-2B": 2_213_241_664,
    "Qwen/Qwen3.5-4B": 4_539_265_536,
    "Qwen/Qwen3.5-9B": 9_409_813_744,
    "Qwen/Qwen3.5-27B": 27_356_728_560,
    "Qwen/Qwen3.5-35B-A3B": 35_107_181_936,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_known_architectures_have_the_published_number_of_parameters(name: str) -> None:
    """Of Qwen3.5's, what checkpoints hold besides the layer that predicts several tokens at once."""
    model = ModelConfig(model=name)
    assert count_parameters(model_config(model), model).total == PUBLISHED_COUNTS[name]


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model='/nowhere/x'.*known without it are Qwen2\.5-VL-3B-Instruct"):
        model_config(ModelConfig(model="/nowhere/x"))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_has_a_plan_without_its_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    train_main(["--config", name, "--dry_run"])
    printed = capsys.readouterr().out
    assert "nothing was loaded" in printed and "ZeRO" in printed
    has_data = "annotations" in read_recipe(RECIPES / f"{name}.yaml")
    assert ("is not here" in printed) == (has_data and name not in ("tiny_cpu", "demo", "own_videos"))


def test_steps_are_those_of_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "charades_qwen2_5_vl_7b", "--gpus", "4", "--gpu", "A100"]) == 0
    printed = capsys.readouterr().out
    assert "tempsamp/answer: 1551 steps of 8 prompts" in printed
    assert "samples  12408 (charades-train is not here: published count" in printed
    assert "at most 5760 tokens of a prompt" in printed  # 384 patches in time, of 15 tokens: as few as min_pixels lets
    assert "no measurement was given" in printed and "a floor, no forecast" in printed
    assert main(["--gpus", "0"]) == 2


def test_the_least_time_is_that_of_one_devices_share_at_the_cards_peak(capsys: pytest.CaptureFixture[str]) -> None:
    """However many share the step; both figures have three digits."""
    patterns = r"([\d.e+]+) to [\d.e+]+ TFLOP per device", r"([\d.e+-]+) to [\d.e+-]+ s at the H100's peak"
    found = []
    for num_gpus in ("1", "8"):
        assert main(["--config", "charades_qwen2_5_vl_7b", "--gpu", "H100", "--gpus", num_gpus]) == 0
        printed = capsys.readouterr().out
        found.append([float(re.findall(pattern, printed)[0]) for pattern in patterns])
    assert found[0] == found[1] and found[0][1] == pytest.approx(found[0][0] / 989, rel=0.02)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("zero1", "1, offload none"), ("zero3_offload", "3, offload optimizer+param")],
)
def test_the_plan_follows_deepspeeds_settings(name: str, chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "charades_qwen2_5_vl_7b", "--deepspeed_config", name, "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    (row,) = (line.split() for line in printed.splitlines() if "(chosen)" in line)
    assert f"{chosen} (chosen)" in " ".join(row)
    by_stage = [line.split() for line in printed.splitlines() if line.split()[:1] == [chosen[0]]]
    is_offloaded = "param" in chosen
    assert (float(row[-1]) > 0) == is_offloaded
    assert is_offloaded or row[-8:] == by_stage[-1][-8:]


@pytest.mark.parametrize(
    ("gib", "num_gpus", "chosen"),
    [(1000, 1, ("1", "none")), (80, 8, ("1", "none")), (80, 1, ("3", "all"))],
)
def test_the_plan_sizes_a_run_on_own_videos_to_the_card(
    monkeypatch: pytest.MonkeyPatch, gib: int, num_gpus: int, chosen: tuple[str, str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    card = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    words = ["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--annotations", "mine.json", "--videos", "v"]
    train = decided(parse_args(words), num_gpus).train
    assert (train.zero_stage, train.offload) == chosen
    assert decided(parse_args([*words, "--zero_stage", "1"]), num_gpus).train.zero_stage == "1"
    for asked, least in (("optimizer", "1"), ("all", "3")):
        train = decided(parse_args([*words, "--offload", asked]), num_gpus).train
        assert (train.zero_stage >= least) and train.offload in (asked, "all")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_least_stage_that_fits_is_taken_before_anything_is_offloaded(
    monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Of eight cards in size between what this stage and the one before need."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = parse_args(["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--annotations", "mine.json", "--videos", "v"])
    more, needed = (peak_memory(with_stage(config, each), 8).total for each in (stage - 1, stage))
    assert more > 1.1 * needed
    card = SimpleNamespace(total_memory=(more + needed) / 2 / 0.9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    train = decided(config, 8).train
    assert (train.zero_stage, train.offload) == (str(stage), "none")


@pytest.mark.parametrize(("offload", "stage"), [("none", "0"), ("optimizer", "1"), ("all", "3")])
def test_without_a_card_the_stage_is_the_least_that_offloads_what_is_asked_for(offload: str, stage: str) -> None:
    words = ["--annotations", "mine.json", "--videos", "v", "--offload", offload]
    assert decided(parse_args(words), 1).train.zero_stage == stage


@pytest.mark.parametrize(
    ("setting", "stage", "large", "small", "told"),
    [
        ("gather_weights", "3", "rollout", "layer", "once for a rollout"),
        ("reduce_gradients", "2", "step", "row", "once a step"),
    ],
)
@pytest.mark.parametrize(("gib", "given"), [(80, "auto"), (20, "auto"), (None, "auto"), (20, None)])
def test_whole_weights_and_gradients_are_held_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    stage: str,
    large: str,
    small: str,
    told: str,
    gib: int | None,
    given: str | None,
) -> None:
    """Of 7B in bfloat16 each takes 15 GiB. What the settings say is not asked."""
    if gib:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    words = ["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--annotations", "mine.json", "--videos", "v", "--beta", "0"]
    words += ["--zero_stage", stage, f"--{setting}", given or large]
    with caplog.at_level("INFO"):
        config = decided(parse_args(words), 64)
    found = getattr(config.rollout if stage == "3" else config.train, setting)
    assert found == (small if (gib, given) == (20, "auto") else large)
    assert (setting in caplog.text) == (given == "auto")
    assert (told in caplog.text) == (given == "auto" and found == large)
    if given == "auto":
        assert ("no card limits it" in caplog.text) == (gib is None) and (f"of {gib} GiB" in caplog.text) == bool(gib)


def test_partitioning_divides_what_it_partitions() -> None:
    config = parse_args(["--config", "charades_qwen2_5_vl_7b"])
    one, eight = (peak_memory(with_stage(config, 3), n) for n in (1, 8))
    assert one.optimizer == 8 * eight.optimizer and one.weights == 8 * eight.weights
    stages = [peak_memory(with_stage(config, stage), 8).total for stage in range(4)]
    assert stages == sorted(stages, reverse=True)
    shape = model_config(config.model)
    work = work_of((2, 4, 4), shape, "tempsamp", 4, 10)
    counted = count_parameters(shape, config.model)
    gigabytes, video = 2 * counted.total, 32 * 1176
    sent = lambda stage: sum(each.sent(8) for each in step_messages(work, counted, with_stage(config, stage), 2, 1))
    assert sent(2) == (3 * gigabytes + video) * 7 / 8
    # Of the gathers for a backward pass all but half of DeepSpeed's distance; a rollout and the reference gather once.
    assert sent(3) == pytest.approx((5 * gigabytes - 1e9 + video) * 7 / 8)
    config.rollout.gather_weights = "layer"
    assert sent(3) == pytest.approx((15 * gigabytes - 1e9 + video) * 7 / 8)


def kept_bytes(model: torch.nn.Module, tiny: Tiny) -> tuple[int, int, int]:
    """What autograd keeps of one forward pass besides parameters; tokens and patches of the row."""
    policy = Policy(model).train()
    group = tiny.group(tiny.prompt((4, 4, 4), num_text=50), [64, 64])  # chunks of linear layers are filled
    (row,) = pack([group], config=policy.config, max_tokens_per_row=10_000)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(row)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return num_bytes, row.num_tokens, int(row.video_grid_thw.prod())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_as_much_as_estimated(tiny: Tiny, dtype: torch.dtype) -> None:
    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128} if tiny.family == "qwen3_5" else {}
    models = [tiny.model(num_hidden_layers=n, **linear).to(dtype) for n in (2, 4)]
    (few, num_tokens, _), (many, _, _) = (kept_bytes(model, tiny) for model in models)
    kept, shape = FAMILIES[tiny.family].kept[dtype.itemsize], text_shape(models[0].config)
    elements = 0
    for coefficients, sizes, num_layers in (
        (kept.per_token, (shape.query, shape.key), shape.num_attending),
        (kept.per_linear_token, (shape.channels, shape.linear_value), shape.num_linear),
    ):
        every = (shape.hidden, *sizes, shape.intermediate)
        elements += num_layers * sum(c * size for c, size in zip(coefficients, every, strict=True))
    assert (many - few) / num_tokens / dtype.itemsize == pytest.approx(elements, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_is_counted_on_every_device(name: str) -> None:
    """A family made from another one brings no linear layers along that nobody counted."""
    family = FAMILIES[name]
    for kept in filter(None, (*family.kept.values(), family.kept_fused)):
        assert any(kept.per_linear_token) == ("linear_attention" in family.layer_types)


def test_the_kernels_of_a_gpu_keep_less_of_linear_layers_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near what `make rehearse` saw of an update of Qwen3.5-4B, simulated: 44.3 GiB, and 19.3 recomputed."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for recomputed, simulated in (("false", 44.3), ("true", 19.3)):
        words = ["--phases", "grpo:1", "--model", "Qwen/Qwen3.5-4B", "--gradient_checkpointing", recomputed]
        words += ["--zero_stage", "1", "--offload", "optimizer", "--liger_layers", "on", "--prompts_per_device", "1"]
        config = parse_args(words)
        shape = model_config(config.model)
        parameters = count_parameters(shape, config.model)
        work = Work((16, 28, 32), 3724, 32, 8, 8)
        memory = step_memory(work, shape, parameters, config, 2, 1)
        found = (memory.weights + 2 * parameters.trained(config.model) + memory.activations) / 2**30
        assert found == pytest.approx(simulated, rel=0.1)


def test_ranks_that_share_rows_hold_a_share_of_its_activations_and_rows_grow_with_them() -> None:
    def activations(ranks: int, budget: int, prompts: int) -> float:
        words = ["--phases=sft:1", "--model=Qwen/Qwen2.5-VL-7B-Instruct", "--gradient_checkpointing=true"]
        words += ["--zero_stage=1", "--offload=optimizer", "--lora_rank=8", f"--max_tokens_per_row={budget}"]
        config = parse_args([*words, f"--sequence_parallel_size={ranks}", f"--prompts_per_device={prompts}"])
        shape, work = model_config(config.model), Work((16, 28, 32), 3724, 32, 1, 0)
        memory = step_memory(work, shape, count_parameters(shape, config.model), config, 2, 4)
        return memory.activations

    alone = activations(1, 8000, 1)
    assert activations(4, 8000, 1) == pytest.approx(alone / 4, rel=0.2)
    assert activations(4, 8000, 8) == pytest.approx(8 * activations(4, 8000, 1), rel=0.25)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "6"), "sequence_parallel_size=4: must be a divisor of 6 devices"),
        (("--gpus", "4", "--model", "Qwen/Qwen3.5-4B"), "qwen3_5 has layers of linear_attention; set 1"),
    ],
)
def test_rows_that_ranks_cannot_share_are_refused(capsys, words: tuple[str, ...], message: str) -> None:
    assert main(["--phases", "sft:1", "--sequence_parallel_size", "4", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--gpu", "L4", "--zero_stage", "0"),
            ("does not fit, with a tenth left free: 92", "fits with --zero_stage 3 --offload all or --lora_rank 16"),
        ),
        (("--gpu", "L4"), ("3, offload optimizer+param (chosen)",)),
        (("--gpu", "B200"), ("1, offload none (chosen)", "fits: ")),
        (
            ("--gpu", "H100", "--max_tokens_per_row", "3000"),
            ("is longer than max_tokens_per_row=3000: a run refuses it",),
        ),
    ],
)
def test_a_card_by_name_decides_and_what_does_not_fit_it_is_said(
    capsys, words: tuple[str, ...], said: tuple[str, ...]
) -> None:
    """Without such a card here."""
    recipe = ["--config", "own_videos", "--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--zero_stage", "auto"]
    assert main([*recipe, *words]) == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in said), printed


MEASURE = """
import resource, sys
from pathlib import Path
from tempsamp_fast.train import main
import tempsamp_fast.report.plots, torch.utils.tensorboard, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
before = resident("VmRSS")
main(sys.argv[1:])
print("added", resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_the_memory_estimate_is_near_a_measured_run(trainer, clips: Path, tmp_path: Path) -> None:
    """Of a model of 40 M parameters in fp32 on the CPU: within 25 % of what a step adds to the resident memory."""
    texts = ["When does a red square appear in the video? <answer> 1.00 to 2.00 </answer> seconds"] * 4
    tokenizer = train_tokenizer(texts)
    config = tiny_model(tokenizer, "qwen2_5_vl", 0).config
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 512
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 2048, 10
    config.text_config.rope_parameters["mrope_section"] = [32, 16, 16]
    config.text_config.layer_types = ["full_attention"] * 10
    folder = tmp_path / "model"
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = trainer.flags(tmp_path / "run", "--phases", "tempsamp:1", "--beta", "0.04", "--save_steps", "0")
    words += ["--model", str(folder), "--cot_off_policy", "template", "--max_completion_length", "32"]
    estimated = peak_memory(parse_args(words), 1).total
    set_here = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in set_here}
    command = [sys.executable, "-c", MEASURE, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("added")[-1])
    assert estimated == pytest.approx(measured, rel=0.25), (estimated / 2**20, measured / 2**20)


def test_the_plan_reads_the_annotations_that_are_there(clips: Path) -> None:
    words = ["--annotations", str(clips / "annotations/train.json"), "--videos", str(clips / "videos")]
    num_queries = sum(len(e["sentences"]) for e in json.loads(Path(words[1]).read_text()).values())
    assert f"samples  {num_queries} (read from" in describe_plan(decided(parse_args(words), 1), 1)


@pytest.mark.parametrize(("method", "answers", "sampled"), [("sft", 1, 0), ("grpo", 8, 8), ("tempsamp", 8, 7)])
def test_a_prompt_has_the_answers_of_its_method(tiny: Tiny, method: str, answers: int, sampled: int) -> None:
    work = work_of((4, 8, 8), tiny.model().config, method, 8, 20)
    assert (work.num_answers, work.num_sampled) == (answers, sampled)


def test_a_prompt_of_a_tree_costs_its_share(tiny: Tiny) -> None:
    """Four prompts of the plan are the tree that is packed: what they share counts once."""
    config, answers = tiny.model().config, (7,) * 20
    grid, prompt_len = (4, 8, 8), 64 + TEXT_TOKENS
    work = Work(grid, prompt_len, 7, 5, 5, queries=4)
    tree = GroupLayout(64, (TEXT_TOKENS,) * 4 + answers, (0,) * 4 + tuple(1 + i // 5 for i in range(20)))
    assert 4 * work.forward_flops(5, config) == pytest.approx(layout_flops([tree], 140, [grid], config))
    assert 4 * work.tokens_in_row == tree.num_tokens and 4 * work.patches_in_row == 4 * 8 * 8
    assert Work(grid, prompt_len, 7, 5, 5).forward_flops(5, config) > 1.5 * work.forward_flops(5, config)


@pytest.mark.parametrize("most", ["1", "2"])
def test_the_plan_tells_how_many_questions_share_a_video(clips: Path, most: str) -> None:
    words = ["--annotations", str(clips / "annotations/train.json"), "--videos", str(clips / "videos")]
    words += ["--prompts_per_device", "2", "--queries_per_video", most]
    counts = [len(entry["sentences"]) for entry in json.loads(Path(words[1]).read_text()).values()]
    together = sum(counts) / sum(-(-count // 2) for count in counts)
    said = f"trees    {together:.2g} questions about a video share it"
    assert (said in describe_plan(decided(parse_args(words), 1), 1)) == (most == "2")
