"""Tensors kept from one rollout to the next: what a recorded pass reads stays where it was, or is told to be gone."""

from __future__ import annotations

import torch

from tempsamp_fast.rollout.rooms import Rooms

CPU = torch.device("cpu")


def test_a_tensor_that_is_large_enough_is_taken_again() -> None:
    rooms = Rooms()
    first = rooms.take("keys", (4, 6), torch.float32, CPU)
    again = rooms.take("keys", (2, 3), torch.float32, CPU)
    assert again.shape == (2, 3) and again.data_ptr() == first.data_ptr() and again.stride() == first.stride()
    assert rooms.version == 0


def test_a_tensor_that_is_made_anew_counts() -> None:
    """By growing, in either dimension and in both where one was larger before; by another dtype; by doubling."""
    rooms = Rooms()
    rooms.take("keys", (4, 6), torch.float32, CPU)
    assert rooms.take("keys", (2, 8), torch.float32, CPU).shape == (2, 8) and rooms.version == 1
    assert rooms.whole("keys").shape == (4, 8)
    rooms.take("keys", (4, 8), torch.float64, CPU)
    assert rooms.version == 2
    rooms.whole("keys").fill_(3)
    rooms.double("keys", 1)
    assert rooms.version == 3 and rooms.whole("keys").shape == (4, 16)
    assert bool((rooms.whole("keys")[:, :8] == 3).all()) and not rooms.whole("keys")[:, 8:].any()
    rooms.take("values", (1, 1), torch.float32, CPU)
    assert rooms.version == 3
