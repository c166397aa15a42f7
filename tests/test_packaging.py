"""Wheels and source distributions: whose file is whose, what they say of themselves, and that they work elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import tempsamp_fast
from tempsamp_fast.__main__ import COMMANDS
from tempsamp_fast.__main__ import main as tempsamp

REPOSITORY = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; _, out = sys.argv; b.build_wheel(out); b.build_sdist(out)"
PACKAGES = {"tempsamp_fast": Path(), "tempsamp_kernels": Path("kernels")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of both packages' distributions, built from a copy without the video extension."""
    source, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("dist")
    made = shutil.ignore_patterns(".*", "*.egg-info", "*.so", "__pycache__")
    at_top = shutil.ignore_patterns("build", "dist", "runs", "data")
    ignored = lambda folder, names: {*made(folder, names), *(at_top("", names) if Path(folder) == REPOSITORY else ())}
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    for folder in PACKAGES.values():
        environment = os.environ | {"PKG_CONFIG_LIBDIR": str(out)}
        command = [sys.executable, "-c", BUILD, str(out)]
        subprocess.run(command, check=True, cwd=source / folder, env=environment, capture_output=True)
    return out


def names_in(path: Path) -> set[str]:
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    return {name.partition("/")[2] for name in tarfile.open(path).getnames()}


@pytest.mark.parametrize("suffix", ["whl", "tar.gz"])
def test_no_file_belongs_to_two_distributions(built: Path, suffix: str) -> None:
    fast, kernels = (names_in(next(built.glob(f"{name}-*.{suffix}"))) for name in PACKAGES)
    common = {name for name in fast & kernels if name.endswith(".py") and name != "setup.py"}
    assert common == set() and not any("tempsamp_kernels/" in name for name in fast)
    assert {"tempsamp_fast/embedded/base/model.safetensors", "tempsamp_fast/embedded/base/README.md"} <= fast
    assert "tempsamp_fast/py.typed" in fast and "tempsamp_kernels/py.typed" in kernels


def test_source_distributions_have_what_builds_them_and_no_tests(built: Path) -> None:
    fast, kernels = (names_in(next(built.glob(f"{name}-*.tar.gz"))) for name in PACKAGES)
    code = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "csrc").iterdir()}
    assert code | {"LICENSE", "README.md", "setup.py", "pyproject.toml", "tempsamp_fast/configs/zero2.json"} <= fast
    assert {"LICENSE", "README.md", "pyproject.toml", "tempsamp_kernels/grpo.py"} <= kernels
    strays = re.compile(r"^(tests|bench|kernels|runs)/|conftest|\.so$|\.pyc$")
    assert [name for name in fast | kernels if strays.search(name)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_says_what_it_is(built: Path, name: str) -> None:
    archive = zipfile.ZipFile(next(built.glob(f"{name}-*.whl")))
    info = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(archive.read(info).decode())
    assert said["Version"] == tempsamp_fast.__version__ and said["License-Expression"] == "Apache-2.0"
    licence = info.replace("METADATA", "licenses/LICENSE")
    assert archive.read(licence) == (REPOSITORY / "LICENSE").read_bytes()
    assert said["Project-URL"] and "Typing :: Typed" in said.get_all("Classifier", [])
    required = {re.split(r"[ <>=;~!]", each)[0]: each for each in said.get_all("Requires-Dist", [])}
    assert 'platform_system == "Linux"' in required["triton"]
    assert ("tempsamp-kernels" in required) == (name == "tempsamp_fast")


def run(code: str, site: Path, folder: Path, **environment: str) -> Any:
    """Python in an empty folder, where nothing of the checkout is on the path."""
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    given |= {"PYTHONPATH": str(site), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=given, capture_output=True, text=True)


@pytest.fixture
def installed(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """`installed(names)`: a folder with these wheels alone; what they need is the environment's."""

    def install(*names: str) -> Path:
        wheels = [str(next(built.glob(f"{name}-*.whl"))) for name in names]
        site = tmp_path / "-".join(names)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*command, *wheels], check=True, capture_output=True)
        return site

    return install


WITHOUT = (
    "import sys; sys.modules[{!r}] = None; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
)
LOSS = """
import torch, tempsamp_kernels as k
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
ids, rows = torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])
given = dict(rewards=torch.tensor([0.0, 1.0, 0.5]), group_ids=torch.zeros(3, dtype=torch.long))
given |= dict(is_off_policy=torch.tensor([False, False, True]), shaping="nonlinear")
loss, _ = k.fused_linear_grpo_loss(hidden, weight, ids, rows, impl={impl}, **given)
loss.backward()
print(loss.item(), hidden.grad.sum().item(), k.linear_logprob(hidden, weight, ids)[0].sum().item(), k.__file__)
"""


def test_the_kernels_work_alone_and_without_triton(installed: Callable[..., Path], tmp_path: Path) -> None:
    """To the same numbers; asked for Triton they say what is missing."""
    site = installed("tempsamp_kernels")
    found = []
    for missing in ("tempsamp_fast", "triton"):
        done = run(WITHOUT.format(missing) + LOSS.format(impl="None"), site, tmp_path)
        assert done.returncode == 0, done.stderr
        *numbers, file = done.stdout.split()
        assert file.startswith(str(site))
        found.append(numbers)
    assert found[0] == found[1]
    done = run(WITHOUT.format("triton") + LOSS.format(impl="'triton'"), site, tmp_path, TRITON_INTERPRET="1")
    assert "ValueError: impl 'triton' needs the package triton" in done.stderr


def test_the_trainer_says_so_where_the_kernels_are_missing(installed: Callable[..., Path], tmp_path: Path) -> None:
    site = installed("tempsamp_fast")
    hidden = WITHOUT.format("nothing")
    done = run(hidden + "import tempsamp_fast.learning.loss", site, tmp_path)
    assert "tempsamp-kernels, which is missing; in a checkout: pip install ./kernels ." in done.stderr
    done = run(hidden + "import tempsamp_fast.score, tempsamp_fast.rewards as r; print(r.__file__)", site, tmp_path)
    assert done.stdout.startswith(str(site)), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module(name: str) -> None:
    folder = REPOSITORY / "tempsamp_fast"
    assert (folder / f"{name}.py").is_file() or (folder / name / "__main__.py").is_file()


def test_commands_run_by_name_from_an_empty_folder(installed: Callable[..., Path], tmp_path: Path) -> None:
    site = installed("tempsamp_fast", "tempsamp_kernels")
    script = (site / "bin/tempsamp").read_text().partition("\n")[2]
    for words, said in (
        (["score", "--help"], "--predictions"),
        (["--version"], f"tempsamp-fast {tempsamp_fast.__version__}"),
    ):
        done = run(f"import sys; sys.argv[1:] = {words!r}\n{script}", site, tmp_path)
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_an_unknown_command_is_answered_with_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        tempsamp(["trian"])
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert "no command 'trian'; choose from demo, train, eval" in line and "mean 'train'" in line
    tempsamp([])
    said = capsys.readouterr().out
    assert all(f"\n  {name}" in said for name in COMMANDS)
