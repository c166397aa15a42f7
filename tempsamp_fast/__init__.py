"""TempSamp-R1 for video language models: temporal grounding trained with mixed-policy GRPO."""

__version__ = "0.1.0"
