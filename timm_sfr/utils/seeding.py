"""Seeds random numbers from the position in the training only."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch (CPU) at the end, whatever is seeded inside.

    Does nothing in a data loading process, where no other code draws random numbers.
    """
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def mixed(*entropy: int) -> int:
    """Returns a seed of 32 bits that depends on all of `entropy`."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_cpu(*entropy: int) -> int:
    """Seeds Python, NumPy and torch (CPU) from `entropy`; returns the seed."""
    seed = mixed(*entropy)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def reseed(*entropy: int) -> None:
    """Seeds Python, NumPy and torch (all devices) from `entropy`, such as (seed, epoch, process): for dropout, mixup, erasing."""
    torch.manual_seed(seed_cpu(*entropy))
