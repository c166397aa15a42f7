"""What pip leaves undone in the environment of `make test-vllm`: run by that environment's Python.

The checkout is put on its search path. PyPI's torchvision for Linux on x86 is built for CUDA: beside a torch without
CUDA its operators cannot be loaded, and its own registration of two fails on import. They are declared, and never run.
"""

from __future__ import annotations

import site
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
DECLARATION = """
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    folder = Path(site.getsitepackages()[0])
    (folder / "tempsamp_fast_checkout.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n")
    torchvision = find_spec("torchvision")
    assert torchvision is not None and torchvision.submodule_search_locations
    extension = Path(torchvision.submodule_search_locations[0]) / "extension.py"
    if DECLARATION not in extension.read_text():
        with extension.open("a") as file:
            file.write(DECLARATION)


if __name__ == "__main__":
    main()
