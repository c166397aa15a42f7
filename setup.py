"""Build of the video extension; what else there is to say of the package is in pyproject.toml.

The extension needs FFmpeg's development packages and the headers of NVIDIA's decoders (ffnvcodec), but no GPU; without
them it is left out, and videos are decoded by torchcodec.
TEMPSAMP_SANITIZE=1 builds it with the address and undefined-behaviour sanitizers, to be run as
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 pytest
tests/video/test_corpus.py
"""

import os
import subprocess
import warnings
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

LIBRARIES = ["libavformat", "libavcodec", "libavutil", "libswscale", "ffnvcodec"]
DEBIAN_PACKAGES = "libavformat-dev libavcodec-dev libavutil-dev libswscale-dev libffmpeg-nvenc-dev pkg-config"
# GCC 12 warns about its own AVX-512 headers.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
]


def video_extension() -> list[Pybind11Extension]:
    """tempsamp_fast._video, or nothing (with a warning) where it cannot be built."""
    try:
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", *LIBRARIES], check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        warnings.warn(
            "FFmpeg's development packages or ffnvcodec's were not found: tempsamp_fast._video is not built, and "
            f"videos are decoded by torchcodec, at half the speed. To build it: apt-get install {DEBIAN_PACKAGES}",
            stacklevel=1,
        )
        return []
    sanitizers = SANITIZERS if os.environ.get("TEMPSAMP_SANITIZE") == "1" else []
    compile_flags = [flag for flag in flags if not flag.startswith(("-l", "-L"))]
    link_flags = [flag for flag in flags if flag.startswith(("-l", "-L"))]
    return [
        Pybind11Extension(
            "tempsamp_fast._video",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.h"),
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-pthread", *WARNINGS, *compile_flags, *sanitizers],
            extra_link_args=["-pthread", "-ldl", *link_flags, *sanitizers],
        )
    ]


ParallelCompile().install()
setup(
    packages=find_packages(include=["tempsamp_fast*"]),
    package_data={
        "tempsamp_fast": [
            "configs/*",
            "embedded/base/*",
            "evaluation/published.yaml",
            "report/page.css",
            "report/page.js",
            "py.typed",
            "_video.pyi",
        ]
    },
    ext_modules=video_extension(),
)
