"""From annotation files and videos to prompts: readers, subsets, texts, tokens, and loading ahead.

Decoding itself is in `video/`. `python -m tempsamp_fast.data check NAME` tells whether a data set is complete.
"""
