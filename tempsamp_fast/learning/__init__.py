"""From answers to better weights: groups and their rewards, advantages, loss, the update, and the engine beneath it.

What a reward is stands in `rewards.py`, how answers are drawn in `rollout/`, in which order steps come in `run/`.
"""
