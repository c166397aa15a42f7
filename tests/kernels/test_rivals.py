"""The comparison with other code bases: what it says of one that is not there, and when ours counts as equal."""

from __future__ import annotations

import json
import sys

import torch

from bench import rivals


def test_a_missing_checkout_is_named_and_counts_as_not_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rivals.json"
    arguments = ["rivals", "--sources", str(tmp_path), "--only", "Liger-Kernel", "verl", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    rivals.main()
    found = json.loads(output.read_text())["rivals"]
    assert found == {name: {"not_run": f"no checkout {name} among the sources"} for name in ("Liger-Kernel", "verl")}
    assert "no checkout verl" in capsys.readouterr().out


def test_ours_counts_where_it_is_as_near_to_fp64_as_theirs_and_is_named_where_not():
    truth, near, far = [torch.ones(3).double()], [torch.ones(3)], [torch.ones(3) * 1.01]
    count = rivals.Count()
    count.add("equal", near, near, truth)
    count.add("nearer", near, far, truth)
    count.add("equally far", far, far, truth)
    count.add("farther", far, near, truth)
    assert count.passed == 3 and [case.split(":")[0] for case in count.differing] == ["farther"]


def test_a_file_of_another_package_is_loaded_without_it(tmp_path):
    """Its missing neighbours are mocks, and gone afterwards."""
    (tmp_path / "theirs.py").write_text("from .sibling import x\nimport prime_rl.a.b\ndef double(y): return 2 * y\n")
    assert rivals.load(tmp_path / "theirs.py").double(3) == 6
    assert "prime_rl" not in sys.modules and "rival" not in sys.modules
