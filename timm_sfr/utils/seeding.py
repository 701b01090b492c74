"""Random numbers that depend on a place in the training alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the random numbers of Python, NumPy and torch (CPU) as they were, whatever is seeded inside.

    In a data loading process nothing else draws any: there it does nothing.
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


def seed_cpu(*entropy: int) -> None:
    """Seeds Python, NumPy and torch (CPU) from `entropy`."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def reseed(*entropy: int) -> None:
    """Seeds Python, NumPy and torch (all devices) from `entropy`: dropout, mixup and erasing of (seed, epoch, process)."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
