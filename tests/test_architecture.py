"""The shape of the source tree: which part may know which, and how large a file may grow."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE_ROOTS = {"tempsamp_fast": REPOSITORY, "tempsamp_kernels": REPOSITORY / "kernels"}
FLOORS = (
    {"__main__"},
    {"train", "demo"},
    {"eval", "infer", "score", "export", "plan"},
    {"run"},
    {"report"},
    {"planning", "evaluation"},
    {"rollout"},
    {"learning"},
    {"model"},
    {"embedded"},
    {"data"},
    {"model.families"},
    {"video"},
    {"arguments"},
    {"config", "batch", "rewards", "system"},
    {"answers", "intervals"},
    {"sample", "times"},
)
"""The packages and modules of tempsamp_fast from the street to the cellar: an import goes to a floor below, or stays
in its package. The facts about model families lie beneath the data, which writes prompts by them."""
WITHOUT_TORCH = ("sample", "times", "rewards", "config", "arguments", "score", "evaluation.scoring",
                 "evaluation.published", "evaluation.protocols", "data.annotations", "data.catalogue", "data.prompts",
                 "data.subsets")  # fmt: skip
"""What scores answers and reads files: it imports neither torch nor what is built on it."""
TOP_MODULES = 14
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


def room(name: str) -> str:
    """The entry of FLOORS that a module of tempsamp_fast belongs to: the longest that its name begins with."""
    inner = name.removeprefix("tempsamp_fast.")
    found = [entry for floor in FLOORS for entry in floor if f"{inner}.".startswith(f"{entry}.")]
    assert found, f"{name} has no floor: name it in FLOORS, or move it into a package"
    return max(found, key=len)


def trainer_modules() -> list[str]:
    return sorted(name for name in modules() if name.startswith("tempsamp_fast."))


@pytest.mark.parametrize("name", trainer_modules())
def test_imports_go_downward(name: str) -> None:
    """Those inside functions too."""
    depth = {entry: index for index, floor in enumerate(FLOORS) for entry in floor}
    for imported in imports(name, at_import_time=False):
        if imported.startswith("tempsamp_fast.") and imported in modules() and room(imported) != room(name):
            assert depth[room(imported)] > depth[room(name)], f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize("entry", sorted(entry for floor in FLOORS for entry in floor))
def test_every_entry_of_the_table_exists(entry: str) -> None:
    assert f"tempsamp_fast.{entry}" in modules()


def test_the_top_is_a_list_of_doors_and_nouns() -> None:
    assert len(list((REPOSITORY / "tempsamp_fast").glob("*.py"))) - 1 <= TOP_MODULES


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_scoring_and_reading_need_no_torch(name: str) -> None:
    reached, waiting = set(), [f"tempsamp_fast.{name}"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [each for each in imports(module) if each in modules()]
    libraries = set().union(*(top_level(imports(module)) for module in reached))
    assert not libraries & {"torch", "transformers", "deepspeed", "triton", "matplotlib"}


def test_the_type_of_a_model_is_looked_at_in_one_place() -> None:
    """A new family is a record of model/families.py: nothing else compares with a type, or lists the types."""
    families = REPOSITORY / "tempsamp_fast/model/families.py"
    names = "|".join(re.findall(r'^    name="(\w+)",', families.read_text(), re.MULTILINE))
    asked = re.compile(rf'model_type|Qwen\w*(Config|ForConditional)|[=!]= "({names})"|in \([^)]*"({names})"')
    geometry = REPOSITORY / "tempsamp_fast/video/geometry.py"  # has the rules of two processors, by whose they are
    assert names.count("|") >= 1
    assert [
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "tempsamp_fast").rglob("*.py")
        if path not in (families, geometry) and asked.search(path.read_text())
    ] == []


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
    """`deepspeed tempsamp_fast/train.py` puts tempsamp_fast/ first on the path, ahead of everything installed."""
    folder = REPOSITORY / "tempsamp_fast"
    here = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert not {path.stem for path in modules().values()} & {"utils", "util", "common", "helpers", "misc"}
    installed = {name.partition(".")[0] for name in packages_distributions()}
    assert not here - {"__init__"} & (installed | set(sys.stdlib_module_names))
    assert not here & {
        "torch",
        "triton",
        "transformers",
        "datasets",
        "evaluate",
        "kernels",
        "tokenizers",
        "peft",
        "vllm",
    }


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
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}
    package = REPOSITORY / "tempsamp_fast"
    assert sum(lines > 300 for path, lines in lengths.items() if package in path.parents) <= 3


def test_rewards_are_imported_at_once() -> None:
    """Which is so while they load nothing but the standard library."""
    code = "import sys; before = {*sys.modules}; import tempsamp_fast.rewards; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = frozenset(done.stdout.split())
    assert "tempsamp_fast.rewards" in loaded and top_level(loaded) == {"tempsamp_fast"}


def test_a_wheel_in_an_empty_folder_finds_its_files(tmp_path: Path) -> None:
    """Recipes and published results, out of the checkout; the video extension is left out here."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build", "--build-base", str(tmp_path / "build"), "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = os.environ | {"PKG_CONFIG_LIBDIR": str(tmp_path)}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    packed = {path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed/tempsamp_fast").rglob("*.*")}
    kept = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "tempsamp_fast").rglob("*.*")}
    assert packed == {path for path in kept if path.suffix not in (".pyc", ".so")}
    (tmp_path / "empty").mkdir()
    code = (
        "from tempsamp_fast.arguments import RECIPES, parse_args\n"
        "from tempsamp_fast.evaluation.published import published_results\n"
        "import tempsamp_fast, tempsamp_kernels\n"
        "recipes = sorted(path.stem for path in RECIPES.glob('*.yaml'))\n"
        "assert published_results() and parse_args(['--config', 'charades_qwen2_5_vl_7b', '--videos', 'v'])\n"
        "print(tempsamp_fast.__file__, len(recipes))"
    )
    path = {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, number = done.stdout.split()
    assert file.startswith(str(tmp_path / "installed"))
    assert int(number) == len(list((REPOSITORY / "tempsamp_fast/configs").glob("*.yaml")))
