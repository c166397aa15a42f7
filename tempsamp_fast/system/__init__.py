"""What any distributed program needs: ranks, devices, signs of life, files that survive a crash, a stopwatch.

Nothing here knows of models, data or training.
"""
