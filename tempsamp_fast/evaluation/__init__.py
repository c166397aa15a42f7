"""Asking a model about held-out videos and scoring what it says, beside the published results.

`scoring` and `published` know nothing of torch. The rewards of training are in `rewards.py`.
"""
