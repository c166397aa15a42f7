"""The video language model: loading it, what distinguishes the families, and packed rows through it.

How a checkpoint of a run is written is in `run/`; how the weights change, in `learning/`.
"""
