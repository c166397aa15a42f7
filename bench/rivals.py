"""Other code bases' own tests and functions against the kernels that would take their place.

    python -m bench.rivals --sources DIR [--only NAME...] [--minutes 60] [--record liger.jsonl] [--output FILE.json]

DIR holds checkouts by name (Liger-Kernel, verl, prime-rl, EasyR1, OpenRLHF, ms-swift); TRL is the installed one. A
missing one is named and counts as not run. Liger's test files run with our class in its place, for so many minutes,
and go on where `--record` ends;
TRL's trainers run patched and unpatched (`bench/rival_trainers.py`); the others' log-probs and entropies are compared
with ours and with fp64, where ours must be equal or nearer. Nothing of theirs is kept.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from tempsamp_kernels import FusedLinearGRPOLoss, linear_logprob, logits_logprob
from tempsamp_kernels.integrations import patch_verl
from tempsamp_kernels.integrations.trl import fused_logprob
from tempsamp_kernels.integrations.verl import MEGATRON, TORCH, TRITON
from torch import Tensor

from bench import rival_trainers

ROOT = Path(__file__).parents[1]
THEIRS = ("rival", "verl", "prime_rl", "openrlhf", "flash_attn", "tensordict", "jaxtyping", "beartype", "megatron")
"""Packages around a rival's file; only its own code is wanted."""


@dataclass
class Count:
    """Cases in which ours equals fp64 within fp32 rounding (2e-6), or is as near as theirs; the others by name."""

    passed: int = 0
    skipped: int = 0
    note: str = ""
    differing: list[str] = field(default_factory=list)

    def add(self, case: str, ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor]) -> None:
        distance = lambda found: max(
            float((value.double() - exact).norm() / exact.norm().clamp(min=1e-12))
            for value, exact in zip(found, truth, strict=True)
        )
        if distance(ours) <= max(1.05 * distance(theirs), 2e-6):
            self.passed += 1
        else:
            self.differing.append(f"{case}: {distance(ours):.1e} from fp64, theirs {distance(theirs):.1e}")


@contextmanager
def stubs() -> Iterator[list[str]]:
    """Of `THEIRS`, what cannot be imported is a mock inside: the functions wanted use PyTorch alone."""
    made: list[str] = []
    find = sys.meta_path[:]

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
            if name.split(".")[0] not in THEIRS:
                return None
            made.append(name)
            return importlib.util.spec_from_loader(name, Loader())

    class Loader:
        def create_module(self, spec: Any) -> ModuleType:
            module = ModuleType(spec.name)
            module.__getattr__ = lambda name: MagicMock()  # type: ignore[method-assign]
            module.__path__ = []
            return module

        def exec_module(self, module: ModuleType) -> None:
            """It has no code."""

    sys.meta_path.append(Finder())  # type: ignore[arg-type]
    try:
        yield made
    finally:
        sys.meta_path[:] = find
        for name in made:
            sys.modules.pop(name, None)


def load(path: Path) -> ModuleType:
    """A rival's file as a module, without the package around it."""
    spec = importlib.util.spec_from_file_location(f"rival.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with stubs():
        spec.loader.exec_module(module)
    return module


def head(dtype: torch.dtype, num_tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 8, generator=generator), torch.randn(37, 8, generator=generator)
    ids = torch.randint(37, (num_tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), ids


def exact(
    hidden: Tensor, weight: Tensor, ids: Tensor, scores: Callable[[Tensor], Tensor], of_entropy: bool = True
) -> list[Tensor]:
    """Log-prob, entropy and the gradients of a mix of both, in fp64."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = scores(x @ w.T).log_softmax(-1)
    found = logps.gather(-1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
    return with_gradients(found, x, w, of_entropy=of_entropy)


def with_gradients(found: Any, *leaves: Tensor, of_entropy: bool = True) -> list[Tensor]:
    logp, *entropy = (value.reshape(-1) for value in found[:2] if value is not None)
    total = (logp * torch.linspace(-1, 1, len(logp)).to(logp)).sum() + (0.1 * entropy[0].sum() if of_entropy else 0.0)
    return [logp.detach(), *(value.detach() for value in entropy), *torch.autograd.grad(total, leaves)]


def leaves(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.clone().requires_grad_(), weight.clone().requires_grad_()


def liger(checkout: Path, minutes: float, record: Path) -> Count:
    """Its tests of the GRPO losses, with our class and functions under its names.

    Each outcome is a line of `record`, under the digest of our kernels; cases that stand there are not run again.
    """
    sources = sorted((ROOT / "kernels/tempsamp_kernels").rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    record.parent.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        record.write_text(json.dumps({"kernels": digest}) + "\n")
    if json.loads(record.read_text().splitlines()[0])["kernels"] != digest:
        raise ValueError(f"{record} is of other kernels: name another file")
    files = [checkout / "test" / folder / "test_grpo_loss.py" for folder in ("chunked_loss", "transformers")]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{checkout}", "TEMPSAMP_RIVALS_RECORD": str(record.absolute())}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.rivals_plugin", "-p", "no:cacheprovider"]
    environment = os.environ | paths | {"TRITON_INTERPRET": "1"}
    run = subprocess.Popen([*command, *files], cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    try:
        run.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        run.wait()
    return recorded(record)


def recorded(record: Path) -> Count:
    """Counts of a record of `liger`, file by file in the note."""
    lines = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    collected: dict[str, int] = next((line["collected"] for line in lines if "collected" in line), {})
    cases, count = {line["case"]: line for line in lines if "case" in line}, Count()
    for file, number in collected.items():
        outcomes = Counter(line["outcome"] for case, line in cases.items() if case.startswith(f"{file}::"))
        count.passed, count.skipped = count.passed + outcomes["passed"], count.skipped + outcomes["skipped"]
        told = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        count.note += f"{'; ' if count.note else ''}{file}: {told} of {number}"
    failed = {case: line["message"] for case, line in cases.items() if line["outcome"] == "failed"}
    count.differing = [f"{case.split('::')[-1]}: {message[:120]}" for case, message in failed.items()]
    return count


def trl(_: Path) -> Count:
    """Its chunked log-prob over dtypes, biases, softcaps, scales, temperatures, tiles, lengths and outputs."""
    theirs, count = importlib.import_module("trl.kernels").ChunkedLogProbFunction.apply, Count()
    for dtype, has_bias, softcap, scale, temperature, chunk, num_tokens, of_entropy in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (None, 5.0), (1.0, 0.5), (0.7, 1.0, 1.4), (8, 64), (1, 11, 64),
        (True, False),
    ):  # fmt: skip
        hidden, weight, ids = head(dtype, num_tokens)
        bias = torch.linspace(-1, 1, 37).to(dtype) if has_bias else None
        added = 0 if bias is None else bias.double()

        def scores(z: Tensor, added=added, scale=scale, softcap=softcap, temperature=temperature) -> Tensor:
            z = (z + added) * scale
            return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature

        truth, outcomes = exact(hidden, weight, ids, scores, of_entropy), []
        truth = truth if of_entropy else [truth[0], *truth[2:]]
        for function in (fused_logprob, theirs):
            x, w = leaves(hidden, weight)
            options = (temperature, chunk, softcap, scale, ("log_probs", "entropy")[: 1 + of_entropy])
            outcomes.append(with_gradients(function(x, w, bias, ids, *options), x, w, of_entropy=of_entropy))
        case = f"{dtype}, {has_bias=}, {softcap=}, {scale=}, {temperature=}, {chunk=}, {num_tokens=}, {of_entropy=}"
        count.add(case, *outcomes, truth)
    return count


def trl_trainers(_: Path) -> Count:
    """What its GRPO and RLOO trainers log at every step, patched against unpatched."""
    count = Count(note="equal: all logged values within 1e-3, under bf16 5e-2")
    for name in rival_trainers.CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            difference = rival_trainers.difference(name, folder)
        if difference is None:
            count.passed += 1
        else:
            count.differing.append(f"{name}: {difference}")
    return count


Head = Callable[[Tensor, Tensor, Tensor, float], Any]


def ours_of_heads(x: Tensor, w: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return linear_logprob(x, w, ids, temperature=temperature)


def heads_of(theirs: Head, of_entropy: bool = True, ours: Head = ours_of_heads, count: Count | None = None) -> Count:
    """Log-prob and entropy from hidden states, over dtypes, lengths and temperatures."""
    count = count or Count()
    for dtype, num_tokens, temperature in itertools.product(
        (torch.float32, torch.bfloat16), (1, 7, 64), (0.7, 1.0, 1.4)
    ):
        hidden, weight, ids = head(dtype, num_tokens)
        truth = exact(hidden, weight, ids, lambda z, temperature=temperature: z / temperature, of_entropy)
        outcomes = []
        for function in (ours, theirs):
            x, w = leaves(hidden, weight)
            outcomes.append(with_gradients(function(x, w, ids, temperature), x, w, of_entropy=of_entropy))
        count.add(f"{dtype}, {num_tokens=}, {temperature=}", *outcomes, truth)
    return count


def verl(checkout: Path) -> Count:
    """Its models' ways to log-probs under `patch_verl`, against the class behind `impl_backend: torch`, its default.

    That class, the function of the Triton backend, and the output processor of its Megatron models, on one rank.
    """
    files = {name: checkout / f"{name.replace('.', '/')}.py" for name in (TORCH, TRITON, *MEGATRON)}
    modules = {name: load(file) for name, file in files.items()}
    layer, megatron, count = modules[TORCH].FusedLinearForPPO(chunk_size=5), modules[MEGATRON[0]], Count()
    theirs = lambda x, w, ids, temperature: layer(x[None], w, ids[None], temperature)
    modules[TORCH].__dict__["_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE"] = False
    megatron.has_config_logger_enabled.return_value = False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    megatron.parallel_state.get_tensor_model_parallel_group.return_value = dist.group.WORLD

    def processed(x: Tensor, w: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        output = megatron.fused_output_processor(
            hidden_states=x[:, None], output_layer=SimpleNamespace(weight=w), output_weight=None, labels=ids[None],
            context=megatron.FusedOutputProcessorContext(temperature), config=SimpleNamespace(sequence_parallel=False),
        )  # fmt: skip
        return output.log_probs, output.entropy

    sys.modules.update(modules)
    try:
        with patch_verl() as patch:
            ours = {
                "torch": lambda x, w, ids, t: modules[TORCH].FusedLinearForPPO()(x[None], w, ids[None], t),
                "triton": modules[TRITON].linear_cross_entropy,
                "Megatron": processed,
            }
            for function in ours.values():
                heads_of(theirs, ours=function, count=count)
        if f"{len(MEGATRON)} Megatron modules were rebound" not in repr(patch):
            count.differing.append(repr(patch))
    finally:
        dist.destroy_process_group()
        for name in modules:
            sys.modules.pop(name, None)
    return count


def prime_rl(checkout: Path) -> Count:
    """The function of its output layer, temperatures per token; it gives entropy no gradient."""
    apply = load(checkout / "src/prime_rl/trainer/models/layers/lm_head.py")._SequenceChunkedLogProbEntropyFn.apply
    inverse = lambda ids, temperature: torch.full((len(ids),), 1 / temperature)
    return heads_of(lambda x, w, ids, t: apply(x, w, ids, inverse(ids, t), 5), of_entropy=False)


def held_logits(theirs: Callable[..., Tensor]) -> Count:
    """Log-probs of logits [N, V] and [B, T, V] with their gradient."""
    count = Count()
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((7,), (2, 5), (1, 64))):
        generator = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(*shape, 37, generator=generator)).to(dtype)
        ids = torch.randint(37, shape, generator=generator)
        outcomes = []
        for function, of in ((logits_logprob, dtype), (theirs, dtype), (None, torch.float64)):
            z = logits.to(of).requires_grad_()
            logp = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0] if function is None else function(z * 1, ids)
            outcomes.append([logp.detach(), torch.autograd.grad(logp.sum(), z)[0]])
        count.add(f"{dtype}, {shape=}", *outcomes)
    return count


def easyr1(checkout: Path) -> Count:
    """`log_probs_from_logits` as its actor calls it without flash-attention."""
    module = load(checkout / "verl/utils/torch_functional.py")
    module.__dict__["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"] = False
    return held_logits(module.log_probs_from_logits)


def openrlhf(checkout: Path) -> Count:
    """`log_probs_from_logits` without flash-attention."""
    function = load(checkout / "openrlhf/models/utils.py").log_probs_from_logits
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]
    return held_logits(lambda logits, ids: function(logits.clone(), ids))


def widened(value: Any) -> Any:
    """Floating tensors in fp64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def ms_swift(checkout: Path) -> Count:
    """The keywords by which its trainer makes and calls Liger's class, in every mix of its own options."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    tree = ast.parse((checkout / "swift/rlhf_trainers/grpo_trainer.py").read_text())
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    made, called = (
        {keyword.arg for keyword in calls[name].keywords}
        for name in ("LigerFusedLinearGRPOLoss", "self.liger_grpo_loss")
    )
    generator, count = torch.Generator().manual_seed(0), Count()
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    every = {
        "_input": normal(4, 7, 8), "lin_weight": normal(37, 8), "bias": None,
        "selected_token_ids": torch.randint(37, (4, 7), generator=generator),
        "attention_mask": torch.arange(7) < torch.tensor([[7], [3], [1], [5]]), "advantages": normal(4),
        "old_per_token_logps": normal(4, 7) - 4, "ref_per_token_logps": normal(4, 7) - 4,
    }  # fmt: skip
    if unknown := called - every.keys() - {"vllm_is_ratio"}:
        raise ValueError(f"ms-swift calls the class with {sorted(unknown)}")
    theirs = LigerFusedLinearGRPOLoss
    for loss_type, level, beta, weights in itertools.product(
        ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
        ("token", "sequence"),
        (0.0, 0.04),
        (None, normal(4, 7).exp()),
    ):
        if level == "sequence" and loss_type in ("cispo", "sapo"):
            continue
        every["vllm_is_ratio"] = weights
        options = {
            "beta": beta, "compiled": False, "epsilon_low": 0.2, "epsilon_high": 1.2 if loss_type == "cispo" else 0.2,
            "temperature": 0.9, "use_ref_model": beta != 0, "loss_type": loss_type, "max_completion_length": 9,
            "importance_sampling_level": level, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        }  # fmt: skip
        outcomes = []
        for cls, widen in ((FusedLinearGRPOLoss, False), (theirs, False), (theirs, True)):
            inputs = {name: widened(every[name]) if widen else every[name] for name in called}
            x, w = leaves(inputs["_input"], inputs["lin_weight"])
            loss, metrics = cls(**{name: options[name] for name in made})(**inputs | {"_input": x, "lin_weight": w})
            outcomes.append([loss.detach(), *metrics, *torch.autograd.grad(loss, (x, w))])
        count.add(f"{loss_type}, {level}, {beta=}, weighted={weights is not None}", *outcomes)
    return count


RIVALS: dict[str, Callable[[Path], Count]] = {
    **{"TRL": trl, "TRL trainers": trl_trainers, "verl": verl, "ms-swift": ms_swift},
    **{"prime-rl": prime_rl, "EasyR1": easyr1, "OpenRLHF": openrlhf},
}
NAMES = ("Liger-Kernel", *RIVALS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--record", type=Path, default=ROOT / "build/liger.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/rivals.json")
    arguments = parser.parse_args()
    kept = json.loads(arguments.output.read_text())["rivals"] if arguments.output.exists() else {}
    for name in arguments.only:
        checkout = arguments.sources / name
        if not name.startswith("TRL") and not checkout.is_dir():
            kept[name] = {"not_run": f"no checkout {name} among the sources"}
        else:
            count = RIVALS[name](checkout) if name in RIVALS else liger(checkout, arguments.minutes, arguments.record)
            kept[name] = asdict(count)
        row = kept[name]
        print(name, row.get("not_run") or f"{row['passed']} passed, {row['skipped']} skipped", flush=True)
        for case in row.get("differing", []):
            print("  differs:", case)
        versions = {"torch": torch.__version__}
        arguments.output.write_text(json.dumps({"versions": versions, "rivals": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
