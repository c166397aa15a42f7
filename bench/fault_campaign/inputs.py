"""Bad input at every door: each must end with exit code 2 and one line that names the thing, or be survived."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bench.fault_campaign.children import World, fresh, start

Case = Callable[[], dict[str, Any]]
Spoil = Callable[[Path], Any]

CONFIG: dict[str, tuple[str, ...]] = {
    "unknown flag": ("--shapping=mixed",),
    "unknown choice": ("--shaping=mixd",),
    "text for a number": ("--fps=fast",),
    "negative rate": ("--learning_rate=-1",),
    "NaN rate": ("--learning_rate=nan",),
    "zero answers": ("--num_generations=0",),
    "top_p over 1": ("--top_p=1.5",),
    "a phase of no method": ("--phases=ppo:3",),
    "a phase of no steps": ("--phases=sft:0",),
    "an unknown mode": ("--eval_modes=guess",),
    "offloading below its ZeRO stage": ("--offload=all",),
    "a missing recipe": ("--config=nowhere.yaml",),
    "a DeepSpeed file that is none": ("--deepspeed_config=/dev/null",),
    "recording and replaying": ("--record_rollouts=a", "--replay_rollouts=b"),
    "recording over a file": (f"--record_rollouts={__file__}",),
    "CUDA graphs under vLLM": ("--cuda_graphs=true", "--rollout_backend=vllm"),
    "a model of no folder": ("--model=runs/nowhere",),
    "a seed of 64 bits": ("--seed=9223372036854775808",),
    "an empty name": ("--eval_annotations=",),
    "a folder of videos that is not there": ("--videos=nowhere",),
}
DEEPSPEED: dict[str, Any] = {
    "a stage for a section": {"zero_optimization": 2},
    "a batch size": {"train_batch_size": 16},
    "an optimizer of 8 bits": {"optimizer": {"type": "Adam8bit"}},
    "a rate of its own": {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}},
    "fp16": {"fp16": {"enabled": True}},
    "bf16 for a run in fp32": {"bf16": {"enabled": True}},
    "clipping in words": {"gradient_clipping": "1.0"},
    "clipping below zero": {"gradient_clipping": -1},
    "parameters offloaded at stage 2": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
    "elastic batches": {"elasticity": {"enabled": True, "max_train_batch_size": 2000}},
    "a misspelt section": {"zero_optimisation": {"stage": 2}},
    "a misspelt setting": {"zero_optimization": {"stage": 2, "overlap_com": True}},
}
REWARDS: dict[str, str] = {
    "a syntax error": "def mine(completions:\n    pass\n",
    "an import that is missing": "import nowhere_to_be_found\n",
    "the end of the program": "raise SystemExit(0)\n",
    "another name": "def yours(completions):\n    return []\n",
    "an error": "def mine(completions):\n    return [1 / 0 for _ in completions]\n",
    "too few numbers": "def mine(completions):\n    return [1.0]\n",
    "NaN": "def mine(completions):\n    return [float('nan') for _ in completions]\n",
}
"""Files of one's own rewards, of which `mine` is asked for."""
PROMPTS: dict[str, str] = {
    "an unknown mode": "anwser: '{query}'\n",
    "an unknown field": "answer: '{query} {qery}'\n",
    "no query": "answer: When?\n",
    "a token of the chat format": "answer: '{query}<|im_end|>'\n",
    "no template for a mode": "think: '{query}'\n",
    "no YAML": "answer: [\n",
}
ENTRY: dict[str, Any] = {"duration": 8.0, "timestamps": [[1.0, 3.0]], "sentences": ["a square appears"]}
ANNOTATIONS: dict[str, str] = {
    "empty": "",
    "cut off": '{"clip": {"duration": 8.0,',
    "a list": "[]",
    "no entries": "{}",
    "not UTF-8": "\udcff\udcfe",
    "a NUL byte": "\0",
    **{
        name: json.dumps({"clip": {**ENTRY, **changed}})
        for name, changed in {
            "end before start": {"timestamps": [[3.0, 1.0]]},
            "NaN": {"timestamps": [[float("nan"), 1.0]]},
            "infinite duration": {"duration": float("inf")},
            "negative duration": {"duration": -1},
            "text for a number": {"duration": "8"},
            "an empty query": {"sentences": [" "]},
            "too few windows": {"timestamps": []},
            "windows that are no pairs": {"timestamps": [[1.0]]},
        }.items()
    },
    "a path out of the folder": json.dumps({"../../etc/passwd": ENTRY}),
    "an absolute path": json.dumps({"/etc/passwd": ENTRY}),
}
LONG = "word " * 180_000
VIDEOS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "text": b"these bytes are no video",
    "zeros": bytes(4096),
    "an HLS playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
    "a concat script": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a DASH manifest": b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>",
    "an SDP session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "a JPEG header": b"\xff\xd8\xff\xe0" + bytes(100),
    "a box of a huge size": b"\xff\xff\xff\xffftypisom" + bytes(64),
    "random bytes": bytes((37 * n * n + 11 * n) % 256 for n in range(5000)),
    "a folder": b"folder",
    "a FIFO": b"fifo",
    "half a clip": b"half",
}


def _write(name: str, content: bytes | str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def _delete(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Spoil:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _json(name: str, **changed: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return spoil


def _renamed(name: str, part: str, other: str) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {key.replace(part, other): tensor for key, tensor in load_file(folder / name).items()}
        save_file(tensors, folder / name)

    return spoil


MODEL: dict[str, Spoil] = {
    "no config": _delete("config.json"),
    "half a config": _cut("config.json"),
    "an empty config": _write("config.json", "{}"),
    "a list for a config": _write("config.json", "[]"),
    "another architecture": _json("config.json", model_type="gpt2"),
    "no such architecture": _json("config.json", model_type="nonesuch"),
    "code of its own": _json("config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
    "no weights": _delete("model.safetensors"),
    "half the weights": _cut("model.safetensors"),
    "empty weights": _write("model.safetensors", b""),
    "a header of a huge size": _write("model.safetensors", b"\xff" * 8 + b"{}"),
    "weights in a pickle": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "weights of no tensors": _write("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
}
TOKENIZER: dict[str, Spoil] = {
    "no tokenizer": _delete("tokenizer.json"),
    "half a tokenizer": _cut("tokenizer.json"),
    "an empty tokenizer": _write("tokenizer.json", ""),
    "an empty object": _write("tokenizer.json", "{}"),
    "a list": _write("tokenizer.json", "[]"),
    "random bytes": _write("tokenizer.json", b"\xff\xfe\x00"),
    "no chat template": _delete("chat_template.jinja"),
    "a chat template that is broken": _write("chat_template.jinja", "{% for"),
    "a chat template without the video": _write("chat_template.jinja", "hello"),
    "half a tokenizer configuration": _cut("tokenizer_config.json"),
    "a class that does not exist": _json("tokenizer_config.json", tokenizer_class="NoTokenizer"),
    "another id of the video token": _json("config.json", video_token_id=3),
}
ADAPTERS: dict[str, Spoil] = {
    "no weights": _delete("adapter_model.safetensors"),
    "half the weights": _cut("adapter_model.safetensors"),
    "empty weights": _write("adapter_model.safetensors", b""),
    "weights of no tensors": _write("adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    "weights in a pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "half a configuration": _cut("adapter_config.json"),
    "an empty configuration": _write("adapter_config.json", "{}"),
    "a list for a configuration": _write("adapter_config.json", "[]"),
    "random bytes for a configuration": _write("adapter_config.json", b"\xff\xfe\x00"),
    "a kind that does not exist": _json("adapter_config.json", peft_type="NONESUCH"),
    "another rank": _json("adapter_config.json", r=8),
    "weights of places that do not exist": _renamed("adapter_model.safetensors", "q_proj", "nowhere"),
    "a base that is not there": _json("adapter_config.json", base_model_name_or_path="/nowhere/my_model"),
    "a base that is a number": _json("adapter_config.json", base_model_name_or_path=3),
}
RESUME: dict[str, Spoil] = {
    "no configuration": _delete("config.json"),
    "half a configuration": _cut("config.json"),
    "a configuration that is a list": _write("config.json", "[]"),
    "a half row of metrics": _cut("metrics.jsonl"),
    "a binary metrics file": _write("metrics.jsonl", b"\xff\xfe\x00\n"),
    "half the results": _cut("results.json"),
    "a broken reference model": _cut("reference/model.safetensors"),
    "no reference model": lambda folder: shutil.rmtree(folder / "reference"),
    "every checkpoint broken": lambda folder: [
        _cut("model/model.safetensors")(each) for each in (folder / "checkpoints").iterdir()
    ],
    "the newest checkpoint's weights broken": _cut("checkpoints/step_000005/model/model.safetensors"),
    "the newest checkpoint without a tokenizer": _delete("checkpoints/step_000005/model/tokenizer.json"),
    "half a state.json": _cut("checkpoints/step_000005/state.json"),
    "a state.json whose files are a number": _json("checkpoints/step_000005/state.json", files=3),
    "a state.json of no files": _json("checkpoints/step_000005/state.json", files=[]),
    "a state.json of another step": _json("checkpoints/step_000005/state.json", step=4),
    "a checkpoint folder that is a file": _write("checkpoints/step_000006", b""),
}
SURVIVED = {"the newest checkpoint's weights broken", "the newest checkpoint without a tokenizer", "half a state.json"}
SURVIVED |= {"a state.json of another step", "a checkpoint folder that is a file", "a half row of metrics"}
SURVIVED |= {"a class that does not exist", "a state.json whose files are a number", "a state.json of no files"}
"""The run goes on from what is whole; transformers needs no more than `tokenizer.json` where a class is unknown."""


def input_cases(world: World) -> Iterator[tuple[str, Case]]:
    """`(name, case)`."""
    for name, words in CONFIG.items():
        yield f"config: {name}", partial(_config, world, words)
    for name, content in DEEPSPEED.items():
        yield f"DeepSpeed file: {name}", partial(_deepspeed, world, content)
    for name, text in REWARDS.items():
        yield f"own rewards: {name}", partial(_own_file, world, "my_rewards.py", text, "rewards", ":mine")
    for name, text in PROMPTS.items():
        yield f"own prompts: {name}", partial(_own_file, world, "my_prompts.yaml", text, "prompt_file")
    yield "before the run: a missing video", partial(_sample, world, {"lost": ENTRY}, "lost.mp4")
    yield "before the run: a long query", partial(_sample, world, {"long": ENTRY | {"sentences": [LONG]}}, "'long/0'")
    yield "weights of NaN", partial(_nan, world)
    for name, text in ANNOTATIONS.items():
        yield f"annotations: {name}", partial(_annotations, world, text)
    for name, content in VIDEOS.items():
        for backend in ("native", "torchcodec"):
            yield f"video through {backend}: {name}", partial(_video, world, content, backend)
    for name, spoil in (MODEL | TOKENIZER).items():
        door = "checkpoint" if name in MODEL else "tokenizer"
        yield f"{door}: {name}", partial(_model, world, spoil, name in SURVIVED)
    for name, spoil in ADAPTERS.items():
        yield f"adapters: {name}", partial(_adapters, world, spoil)
    for name, spoil in RESUME.items():
        yield f"resume: {name}", partial(_resume, world, spoil, name in SURVIVED)


def _verdict(world: World, words: list[str], named: str, survives: bool = False) -> dict[str, Any]:
    log = world.folder / "input.log"
    code = start(words, log).wait()
    text = log.read_text(errors="replace")
    if survives and code == 0:
        return {"outcome": "survived"}
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1 or "Traceback" in text:
        return {"outcome": f"ended with {code}: {text[-600:]}"}
    return {"line": errors[0], "outcome": "refused" if named in errors[0] else f"{named} not named: {errors[0]}"}


def _config(world: World, words: tuple[str, ...]) -> dict[str, Any]:
    run = fresh(world.folder / "input")
    named = words[0].partition("=")[0].removeprefix("--")
    return _verdict(world, [*world.flags(run), *words], named)


def _deepspeed(world: World, content: Any) -> dict[str, Any]:
    run, path = fresh(world.folder / "input"), world.folder / "my_deepspeed.json"
    path.write_text(json.dumps(content))
    return _verdict(world, world.flags(run, deepspeed_config=path), "my_deepspeed.json")


def _own_file(world: World, name: str, text: str, setting: str, part: str = "") -> dict[str, Any]:
    run, path = fresh(world.folder / "input"), world.folder / name
    path.write_text(text)
    return _verdict(world, world.flags(run, **{setting: f"{path}{part}"}), name)


def _sample(world: World, entries: dict[str, Any], named: str) -> dict[str, Any]:
    """One more sample beside the good ones, of which none may have been trained on."""
    run, path, videos = fresh(world.folder / "input"), world.folder / "mine.json", fresh(world.folder / "my_videos")
    shutil.copytree(world.clips / "videos", videos)
    shutil.copy(next(videos.glob("*.mp4")), videos / "long.mp4")
    path.write_text(json.dumps(json.loads((world.clips / "annotations/train.json").read_text()) | entries))
    settings = {"videos": videos, "on_bad_sample": "raise", "max_eval_samples": 0}
    verdict = _verdict(world, world.flags(run, annotations=path, **settings), named)
    if (run / "metrics.jsonl").exists():
        verdict["outcome"] = "the run began"
    return verdict


def _nan(world: World) -> dict[str, Any]:
    run, model = fresh(world.folder / "input"), fresh(world.folder / "my_model")
    shutil.copytree(world.model, model)
    weights = {name: tensor * float("nan") for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return _verdict(world, world.flags(run, model=model, phases="sft:2", max_eval_samples=0), "NaN in the weights")


def _annotations(world: World, text: str) -> dict[str, Any]:
    run, path = fresh(world.folder / "input"), world.folder / "mine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return _verdict(world, world.flags(run, annotations=path), "mine.json")


def _video(world: World, content: bytes | None, backend: str) -> dict[str, Any]:
    run, folder = fresh(world.folder / "input"), fresh(world.folder / "my_videos")
    folder.mkdir()
    path = folder / "clip.mp4"
    if content == b"folder":
        path.mkdir()
    elif content == b"fifo":
        os.mkfifo(path)
    elif content == b"half":
        whole = sorted((world.clips / "videos").glob("*.mp4"))[0].read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    annotations = world.folder / "mine.json"
    annotations.write_text(json.dumps({"clip": ENTRY}))
    settings = {"videos": folder, "video_backend": backend, "on_bad_sample": "raise", "max_eval_samples": 0}
    return _verdict(world, world.flags(run, annotations=annotations, **settings), "clip.mp4")


def _model(world: World, spoil: Spoil, survives: bool) -> dict[str, Any]:
    run, model = fresh(world.folder / "input"), fresh(world.folder / "my_model")
    shutil.copytree(world.model, model)
    spoil(model)
    return _verdict(world, world.flags(run, model=model), "my_model", survives)


def _adapters(world: World, spoil: Spoil) -> dict[str, Any]:
    settings = {"lora_rank": 4, "phases": "sft:1"}
    finished = _finished(world, "finished_adapters", **settings)
    run, adapters = fresh(world.folder / "input"), fresh(world.folder / "my_model")
    shutil.copytree(finished / "checkpoints/step_000001/model", adapters)
    spoil(adapters)
    return _verdict(world, world.flags(run, model=adapters, **settings), "my_model")


def _finished(world: World, name: str, **settings: object) -> Path:
    """A whole run, made by the first case that asks for it."""
    run = world.folder / name
    if not (run / "summary.json").exists():
        fresh(run)
        if start(world.flags(run, **settings), run.with_suffix(".log")).wait():
            raise RuntimeError(f"the run to spoil failed: {run.with_suffix('.log')}")
    return run


def _resume(world: World, spoil: Spoil, survives: bool) -> dict[str, Any]:
    finished, run = _finished(world, "finished"), fresh(world.folder / "my_run")
    shutil.copytree(finished, run)
    spoil(run)
    return _verdict(world, [f"--resume={run}", "--phases=sft:2,tempsamp:4"], "my_run", survives)
