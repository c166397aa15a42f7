"""One self-contained HTML page about one or several runs: `python -m tempsamp_fast.report RUN [RUN...]`."""
