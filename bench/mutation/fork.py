"""Test runs in forked children of a process that has imported the third-party libraries, but nothing of the package."""

from __future__ import annotations

import compileall
import contextlib
import importlib
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "triton", "numpy", "yaml", "pytest", "hypothesis", "safetensors.torch", "deepspeed",
    "liger_kernel.transformers", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.integrations.deepspeed", "peft", "trl",
    "torchcodec", "matplotlib.pyplot", "torch.utils.tensorboard", "torch.nn.attention.flex_attention",
)  # fmt: skip
"""What tests import and mutants do not change."""


def preload() -> None:
    """Import the libraries as conftest.py and `prepare_environment` would have them imported."""
    import torch

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    if not torch.cuda.is_available():
        os.environ |= {"TRITON_INTERPRET": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported ahead: {name}: {error}", file=sys.stderr)
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("tempsamp_fast", "tempsamp_kernels")]
    assert not loaded, f"imported already: {loaded}"


class Tree:
    """A copy of the files of a checkout, or of another tree, in a temporary folder."""

    def __init__(self, source: Path | Tree) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants_")
        self.path = Path(self._folder.name) / "tree"
        self.scratch = Path(self._folder.name) / "scratch"
        if isinstance(source, Tree):
            shutil.copytree(source.path, self.path, symlinks=True)
        else:
            self._take(source)

    def _take(self, checkout: Path) -> None:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(listing, cwd=checkout, capture_output=True, check=True, text=True).stdout.split("\0")
        compiled = [str(path.relative_to(checkout)) for path in (checkout / "tempsamp_fast").glob("*.so")]
        for name in [name for name in listed if name and (checkout / name).is_file()] + compiled:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, self.path / name)
        # Valid for the very text alone, so that a mutant's file is compiled and nothing else is.
        compileall.compile_dir(self.path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        (self.path / ".venv").symlink_to(Path(sys.prefix).resolve())

    def put(self, file: str, text: str) -> None:
        (self.path / file).write_text(text)

    def clean(self) -> None:
        """Remove what tests have left behind."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.path / ".hypothesis", ignore_errors=True)
        self.scratch.mkdir()


@dataclass
class Child:
    """A forked pytest process, and until when it may run."""

    pid: int
    log: Path
    deadline: float
    started: float

    def poll(self) -> str | None:
        """None while it runs; then "ended", "timed out", "exit code 1" or "signal 11", and its children are gone."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() < self.deadline:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
            return "timed out"
        code = os.waitstatus_to_exitcode(status)
        return "ended" if code == 0 else f"exit code {code}" if code > 0 else f"signal {-code}"


def start(tree: Tree, words: Sequence[str], plugin: Any, limit_s: float) -> Child:
    """`pytest words` in the tree with `plugin`, in a process group of its own."""
    tree.clean()
    log = tree.scratch / "log"
    now = time.monotonic()
    pid = os.fork()
    if pid:
        return Child(pid, log, now + limit_s, now)
    try:
        os.setsid()
        _run(tree, words, plugin, log)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _run(tree: Tree, words: Sequence[str], plugin: Any, log: Path) -> None:
    import hypothesis
    import pytest

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(tree.path)
    sources = [str(tree.path), str(tree.path / "kernels")]
    checkout = Path(__file__).parents[2]
    hidden = {"", *map(str, (checkout, checkout / "kernels", checkout / "bench"))}
    sys.path[:] = sources + [folder for folder in sys.path if folder not in hidden]
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]
    temporary = tree.scratch / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sources), "TMPDIR": str(temporary)}
    phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]  # a failure is enough
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    basetemp = f"--basetemp={tree.scratch / 'pytest'}"
    pytest.main(["-q", "-m", "not slow", basetemp, *words], plugins=[plugin])
