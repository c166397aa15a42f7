"""What the compiler makes of every Triton kernel on sm_80, sm_90 and sm_100, without a GPU.

    python bench/aot.py [--arch 80 90 100] [--cases NAME...] [--output bench/results/aot.json]

The functions that launch them run on meta tensors of real sizes (7B head), with Triton's launcher replaced by one that
compiles for the wanted chip and stops there: the kernels are exactly those that a real call would launch. Where cases
are named, the others stay as the output has them.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import walk_packages

import tempsamp_kernels
import torch
import triton
from tempsamp_kernels import grouped_advantages, rows, triton_grpo_loss
from tempsamp_kernels.advantages import SHAPINGS
from tempsamp_kernels.head import chunk_rows
from tempsamp_kernels.objectives import token_loss
from tempsamp_kernels.tokens import HeadOptions, RowStatistics, Tokens, aligned
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tempsamp_fast.model.tower_rotation import RotatedInPlace
from tempsamp_fast.rollout.delta_step import delta_step

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block, CUDA programming guide
VOCAB = 152064  # Qwen2.5-VL-7B
ODD_VOCABS = (50257, 151665, 128257, 248320)  # GPT-2's, Qwen's without padding, Llama's with a token more; Qwen3.5's
INSTRUCTION_CLASSES = {
    "tensor_core": r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)",
    "exp_log": r"MUFU",
    "fp64": r"(DADD|DMUL|DFMA|DSETP|DMNMX)",
    "fp32": r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FMNMX3)",
    "global_load": r"(LDG|UTMALDG|LDGSTS|UBLKCP)",
    "global_load_16_byte": r"LDG\S*\.128",
    "global_store": r"(STG|UTMASTG)",
    "global_store_16_byte": r"STG\S*\.128",
    "shared": r"(LDS|STS|LDSM|STSM)",
    "atomic": r"(ATOM|ATOMG|RED|REDG)\b",
    "local": r"(LDL|STL)",
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


@dataclass(frozen=True)
class Workload:
    """What changes from batch to batch and must not compile anything anew."""

    batch: int
    length: int
    temperature: float
    epsilon: float


WORKLOADS = (Workload(8, 1024, 1.0, 0.2), Workload(150, 37, 0.7, 0.3))


def chunk(workload: Workload, vocab_size: int = VOCAB, with_entropy: bool = False) -> tuple[torch.Tensor, Tokens]:
    """fp32 logits of one chunk of the workload's tokens, and what the row kernels read beside them."""
    num_rows = chunk_rows(workload.batch * workload.length, vocab_size, "cuda")
    token = meta(num_rows, dtype=torch.float32)
    logits = meta(num_rows, aligned(vocab_size), dtype=torch.float32)[:, :vocab_size]
    return logits, Tokens(token.long(), *[token] * (8 if with_entropy else 6))


def gradient_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where it is written: over fp32 logits, or in rows of as many elements."""
    if dtype == torch.float32:
        return logits
    return meta(len(logits), logits.stride(0), dtype=dtype)[:, : logits.shape[1]]


def row_loss(
    workload: Workload,
    loss_type: str,
    kl_type: str = "k3",
    dtype: torch.dtype = torch.bfloat16,
    vocab_size: int = VOCAB,
    with_entropy: bool = False,
    **head,
) -> None:
    loss = token_loss(loss_type, kl_type, epsilon_high=workload.epsilon)
    scale = meta(1, dtype=torch.float32) if dtype == torch.float16 else None
    logits, tokens = chunk(workload, vocab_size, with_entropy)
    rows.row_loss(logits, tokens, HeadOptions(**head), loss, gradient_of(logits, dtype), scale)


def row_statistics(workload: Workload, **head) -> None:
    rows.row_statistics(*chunk(workload), HeadOptions(**head))


def row_gradient(workload: Workload, with_entropy: bool, **head) -> None:
    logits, tokens = chunk(workload)
    statistics = RowStatistics(*[tokens.advantage] * 3)
    d_entropy = tokens.advantage if with_entropy else None
    out = gradient_of(logits, torch.bfloat16)
    rows.row_gradient(logits, tokens, HeadOptions(**head), statistics, tokens.advantage, d_entropy, out)


def advantages(workload: Workload, shaping: str) -> None:
    rewards = meta(workload.batch, dtype=torch.float32)
    ids = torch.empty_like(rewards, dtype=torch.int64)
    grouped_advantages(rewards, ids, ids.bool(), shaping=shaping, tau=workload.epsilon, impl="triton")


def logits_loss(workload: Workload) -> None:
    logits = meta(workload.batch, workload.length + 1, VOCAB, requires_grad=True)
    old, ref = (meta(workload.batch, workload.length, dtype=torch.float32) for _ in range(2))
    loss, _ = triton_grpo_loss(
        logits,
        old,
        ref,
        torch.empty_like(old, dtype=torch.int64),
        meta(workload.batch, dtype=torch.float32),
        temperature=workload.temperature,
        eps_high=workload.epsilon,
        reduce=True,
        impl="triton",
    )
    loss.backward()


def linear_step(workload: Workload) -> None:
    """A token of Qwen3.5-4B's linear layers."""
    keys, values, scalars = meta(workload.batch, 16, 128), meta(workload.batch, 32, 128), meta(workload.batch, 32)
    state = meta(workload.batch, 32, 128, 128, dtype=torch.float32)
    slots = torch.arange(workload.batch, device="meta")
    delta_step(state, slots, keys, keys, values, scalars.float(), scalars, impl="triton")


def tower_rotation(workload: Workload) -> None:
    """A layer of Qwen2.5-VL's tower."""
    qkv = meta(workload.batch, 3 * 16 * 80, requires_grad=True).clone()
    angles = meta(workload.batch, 80, dtype=torch.float32)
    RotatedInPlace.apply(qkv, angles, angles, 16).sum().backward()


CASES: dict[str, Callable[[Workload], None]] = {
    **{
        f"row_loss/{loss_type}": partial(row_loss, loss_type=loss_type)
        for loss_type in ("grpo", "cispo", "sapo", "sft")
    },
    **{f"row_loss/{kl_type}": partial(row_loss, loss_type="grpo", kl_type=kl_type) for kl_type in ("k1", "k2")},
    "row_loss/k3_corrected, softcap": partial(row_loss, loss_type="grpo", kl_type="k3_corrected", softcap=30.0),
    "row_loss/bias": partial(row_loss, loss_type="grpo", bias=meta(VOCAB, dtype=torch.float32)),
    "row_loss/entropy": partial(row_loss, loss_type="grpo", with_entropy=True),
    "row_loss/fp16": partial(row_loss, loss_type="grpo", dtype=torch.float16),
    "row_loss/fp32": partial(row_loss, loss_type="grpo", dtype=torch.float32),
    **{f"row_loss/V {size}": partial(row_loss, loss_type="grpo", vocab_size=size) for size in ODD_VOCABS},
    "row_loss/V 50257, bias": partial(
        row_loss, loss_type="grpo", vocab_size=50257, bias=meta(50257, dtype=torch.float32)
    ),
    "row_statistics": row_statistics,
    "row_statistics/softcap": partial(row_statistics, softcap=30.0),
    "row_gradient": partial(row_gradient, with_entropy=False),
    "row_gradient/entropy, softcap": partial(row_gradient, with_entropy=True, softcap=30.0),
    **{f"advantages/{shaping}": partial(advantages, shaping=shaping) for shaping in SHAPINGS},
    "logits": logits_loss,
    "linear_step": linear_step,
    "tower_rotation": tower_rotation,
}


WITH_FP64 = (
    "row_loss/k3_corrected, softcap",
    "row_loss/sapo",
    "row_gradient/entropy, softcap",
    "advantages/nonlinear",
    "advantages/orarl",
    "logits",
)
"""Cases whose kernels are compiled with fp64 scalars too: every kernel that takes any."""


@dataclass
class OfflineDriver:
    """The few answers Triton's launcher needs to compile for a chip that is not there."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(arch: int, with_fp64: bool = False) -> Iterator[dict[str, list]]:
    """Inside, a kernel launch compiles for `arch`, adds the result under "kernel(constexprs)" and runs nothing.

    `with_fp64` also compiles it as torch.compile would launch it.
    """
    compiled: dict[str, list] = {}
    launch = JITFunction.run

    def compile_launch(kernel, *args, grid, warmup, **kwargs):
        named = {name: value for name, value in kwargs.items() if name in kernel.signature.parameters}
        bound = kernel.signature.bind(*args, **named).arguments
        constexprs = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr and p.name in bound}
        shown = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in constexprs.items())
        result = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(f"{kernel.__name__}({shown})", []).append(result)
        if with_fp64 and "fp32" in result.src.signature.values():
            compiled[f"{kernel.__name__}({shown}), fp64 scalars"] = [with_fp64_scalars(result, arch)]
        return result

    JITFunction.run = compile_launch
    driver.set_active(OfflineDriver(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def with_fp64_scalars(compiled, arch: int):
    """The same kernel as torch.compile launches it, whose Python floats are fp64."""
    source = compiled.src
    wide = {name: "fp64" if kind == "fp32" else kind for name, kind in source.signature.items()}
    options = {"num_warps": compiled.metadata.num_warps, "num_stages": compiled.metadata.num_stages}
    return triton.compile(
        ASTSource(source.fn, wide, source.constants, source.attrs), target=GPUTarget("cuda", arch, 32), options=options
    )


def entry_kernels() -> set[str]:
    """Names of the kernels that the packages launch: by their convention, every jitted function named *_kernel."""
    modules = [import_module(module.name) for module in walk_packages(tempsamp_kernels.__path__, "tempsamp_kernels.")]
    modules += [import_module(each.__module__) for each in (delta_step, RotatedInPlace)]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {function.__name__ for function in functions if function.__name__.endswith("_kernel")}


def row_bits(ttir: str) -> int:
    """64 where a program's number is widened before anything is computed from it: logits may have 2**31 elements."""
    numbers = re.findall(r"(%\w+) = tt\.get_program_id x", ttir)
    lines = [line for line in ttir.splitlines() if "get_program_id" not in line]
    uses = [line for number in numbers for line in lines if re.search(rf"{number}\b", line)]
    return 64 if uses and all("arith.extsi" in line for line in uses) else 32


def measured(compiled) -> dict:
    """Registers per thread, shared and local memory in bytes, and the static instruction mix of one compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        assembly = subprocess.run(
            [tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", assembly))
    mix = {
        name: sum(count for opcode, count in opcodes.items() if re.match(pattern, opcode))
        for name, pattern in INSTRUCTION_CLASSES.items()
    }
    return {
        "registers": resources["REG"],
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": resources["STACK"] + resources["LOCAL"],
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
        "row_bits": row_bits(compiled.asm["ttir"]),
        "instructions": {"total": opcodes.total(), **{name: count for name, count in mix.items() if count}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY_LIMIT, default=list(SHARED_MEMORY_LIMIT))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/aot.json")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    table: dict[str, dict] = {}
    if arguments.output.exists() and arguments.cases != list(CASES):
        known = json.loads(arguments.output.read_text())["kernels"]
        table = {label: found for label, found in known.items() if label.split(": ")[0] not in arguments.cases}
    for arch, name in product(arguments.arch, arguments.cases):
        with compile_only(arch, with_fp64=name in WITH_FP64) as compiled:
            for workload in WORKLOADS:
                CASES[name](workload)
            for workload in WORKLOADS:
                CASES[name](workload)
        for label, results in compiled.items():
            table.setdefault(f"{name}: {label}", {})[f"sm_{arch}"] = {
                **measured(results[0]),
                "compilations": len({result.hash for result in results}),
            }
    missing = entry_kernels() - {re.findall(r": (\w+)\(", label)[0] for label in table}
    if missing:
        raise RuntimeError(f"no case launches {sorted(missing)}: add one to CASES, or name one among --cases")
    table = dict(sorted(table.items(), key=lambda entry: list(CASES).index(entry[0].split(": ")[0])))
    result = {"triton": triton.__version__, "torch": torch.__version__, "kernels": table}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
