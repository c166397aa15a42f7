"""What a rented card lacks, in one folder that is carried along: `make gpu-kit`.

Wheels for the Python there, DeepSpeed built without anything compiled, and videos for the job and the decoders. It must
leave room for the tree itself within what may be carried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MIB = 52.0
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (
    "liger-kernel", "trl", "datasets", "dill", "multiprocess", "hjson", "pydantic", "pydantic-core", "annotated-types",
    "typing-extensions", "typing-inspection", "fla-core",
)  # fmt: skip
VIDEOS = ("--num-train", "48", "--num-val", "2", "--num-test", "8")


def main() -> int:
    """Make the folder that is named, anew. Exit code 1 where it is too large."""
    kit = Path(sys.argv[1])
    shutil.rmtree(kit, ignore_errors=True)
    wheels = kit / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    fixed = ["-c", str(ROOT / "constraints.txt"), "--no-deps"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    there = ["--only-binary=:all:", "--python-version", PYTHON, *platforms]
    call([*pip, "download", *fixed, *there, "-d", str(wheels), *WHEELS])
    call([*pip, "wheel", *fixed, "--no-build-isolation", "-w", str(wheels), "deepspeed"], DS_BUILD_OPS="0")
    call([sys.executable, "-m", "tempsamp_fast.embedded.videos", "--out", str(kit / "data/gpu"), *VIDEOS])
    sizes = {path: path.stat().st_size / 2**20 for path in kit.rglob("*") if path.is_file()}
    for path, mib in sorted(sizes.items(), key=lambda each: -each[1])[:8]:
        print(f"{mib:6.1f} MiB  {path}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MiB in {len(sizes)} files; at most {MOST_MIB:.0f} can be carried beside the tree")
    return int(total > MOST_MIB)


def call(command: list[str], **variables: str) -> None:
    """Without the constraints of this machine's own pip: the versions are of the card's."""
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PIP_CONSTRAINT": "", **variables}, check=True)


if __name__ == "__main__":
    sys.exit(main())
