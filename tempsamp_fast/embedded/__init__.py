"""The data set and the model that come with the package: drawn videos, and a million random weights."""
