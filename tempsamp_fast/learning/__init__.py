"""From answers to better weights: groups and their rewards, advantages, loss, the update, and the engine beneath it.

What a reward is stands in `rewards.py`, how answers are drawn in `rollout/`, in which order steps come in `run/`.
"""

from importlib.util import find_spec

if find_spec("tempsamp_kernels") is None:
    raise ModuleNotFoundError(
        "tempsamp-fast needs the package tempsamp-kernels, which is missing; in a checkout: pip install ./kernels .",
        name="tempsamp_kernels",
    )
