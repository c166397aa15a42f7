"""What a run owns, and what it leaves in its folder: the schedule of its steps, log, checkpoints, results, resuming.

How a step is computed is in `learning/`; the loop itself is `train.py`.
"""
