"""What a newcomer runs first: `__main__.py` trains one small model by three methods, side by side.

`pretrain.py` made that model, `tempsamp_fast/embedded/base/`, and `runs.py` runs the trainer for both.
"""
