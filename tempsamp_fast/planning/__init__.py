"""What a run will take, by arithmetic before anything is loaded: tokens, FLOPs, memory, traffic, seconds.

The FLOPs of a packed row are in `model/flops.py`; the command is `plan.py`.
"""
