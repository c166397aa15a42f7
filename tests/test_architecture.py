"""The shape of the source tree: which part may know which, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE_ROOTS = {"tempsamp_fast": REPOSITORY, "tempsamp_kernels": REPOSITORY / "kernels"}
LEAVES = {
    "config": {"sample"},
    "sample": set(),
    "batch": {"sample"},
    "rewards": {"sample"},
    "prompts": {"sample", "rewards"},
    "annotations": {"sample", "rewards", "prompts"},
    "advantage": {"batch", "config"},
}
"""Modules that need nothing of the trainer but the ones named here, and import neither DeepSpeed nor transformers."""
KERNEL_IMPORTS = {"torch", "triton", "tempsamp_kernels"}
PATCHED_LIBRARIES = {"trl", "verl"}


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, root in SOURCE_ROOTS.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str, at_import_time: bool = True) -> frozenset[str]:
    """Dotted names that a module imports: when it is imported itself, or anywhere in it."""
    tree = ast.parse(modules()[name].read_text())
    found = set()
    nodes = list(_run_on_import(tree)) if at_import_time else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{modules()[name]}:{node.lineno} is a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in modules() else node.module for each in names}
    return frozenset(found)


def _run_on_import(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        is_type_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_type_only:
            yield child
            yield from _run_on_import(child)


def top_level(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.startswith("tempsamp_kernels")))
def test_kernels_import_only_torch_triton_and_the_standard_library(name: str) -> None:
    """Integrations may import what they patch, inside functions."""
    assert top_level(imports(name)) <= KERNEL_IMPORTS
    lazily = PATCHED_LIBRARIES if ".integrations" in name else set()
    assert top_level(imports(name, at_import_time=False)) <= KERNEL_IMPORTS | lazily


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_know_nothing_of_the_training(leaf: str) -> None:
    inside = {name for name in imports(f"tempsamp_fast.{leaf}", at_import_time=False) if name in modules()}
    allowed = {f"tempsamp_fast.{name}" for name in LEAVES[leaf]}
    kernels = {name for name in inside if name.startswith("tempsamp_kernels")}
    assert inside - kernels <= allowed
    assert not kernels or leaf == "advantage"
    assert not top_level(imports(f"tempsamp_fast.{leaf}")) & {"transformers", "deepspeed"}


def test_nothing_imports_the_training_script() -> None:
    assert [name for name in modules() if "tempsamp_fast.train" in imports(name, at_import_time=False)] == []


def test_there_are_no_import_cycles() -> None:
    graph = {name: {each for each in imports(name) if each in modules()} for name in modules()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_module_is_a_heap_or_hides_another_package() -> None:
    """`deepspeed tempsamp_fast/train.py` puts tempsamp_fast/ first on the path, ahead of the standard library."""
    stems = {path.stem for path in (REPOSITORY / "tempsamp_fast").glob("*.py")}
    assert not {path.stem for path in modules().values()} & {"utils", "util", "common", "helpers", "misc"}
    assert not stems & set(sys.stdlib_module_names)
    assert not stems & {"torch", "triton", "transformers", "datasets", "evaluate", "kernels", "tokenizers", "peft"}


def test_kernels_is_a_source_root_and_no_package() -> None:
    """As a package it would hide Hugging Face's `kernels`, which transformers imports."""
    assert not (REPOSITORY / "kernels/__init__.py").exists()


def test_no_file_is_longer_than_400_lines() -> None:
    files = [
        path
        for folder in ("tempsamp_fast", "kernels", "csrc", "bench")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu"}
    ]
    assert files
    assert {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 400} == {}


def test_rewards_are_imported_at_once() -> None:
    """Which is so while they load nothing but the standard library."""
    code = "import sys; before = {*sys.modules}; import tempsamp_fast.rewards; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = frozenset(done.stdout.split())
    assert "tempsamp_fast.rewards" in loaded and top_level(loaded) == {"tempsamp_fast"}
