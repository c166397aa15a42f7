"""The data set and the model that come with the package: drawn videos, and a small model.

How annotation files of any data set are read is in `data/`.
"""
