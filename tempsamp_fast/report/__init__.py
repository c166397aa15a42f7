"""Pictures of a run, and a self-contained HTML page about several: `python -m tempsamp_fast.report RUN [RUN...]`.

Scores are made in `evaluation/`, records in `run/log.py`.
"""
