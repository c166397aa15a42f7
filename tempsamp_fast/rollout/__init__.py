"""Sampling answers: every prompt read once, all of its answers decoded side by side; or by vLLM.

How answers are scored is in `learning/groups.py`.
"""
