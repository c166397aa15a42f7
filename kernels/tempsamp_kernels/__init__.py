"""Fused GRPO loss kernels: group log-prob, soft advantage and clipped objective in one call."""
