"""Build of the two packages and of the video extension; all other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["tempsamp_fast*"]) + find_packages("kernels"),
    package_dir={"tempsamp_kernels": "kernels/tempsamp_kernels"},
    package_data={"tempsamp_fast": ["configs/*"]},
)
