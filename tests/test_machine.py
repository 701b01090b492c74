"""The allocator uses large blocks again; what a user has set is left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc maps large blocks anew each time")
# Page faults of touching a fresh block of 64 MiB, the second time that one is taken and freed.
FAULTS = """
import ctypes, resource
from timm_sfr.training.devices import keep_freed_blocks
told = keep_freed_blocks() if {asked} else None
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = c.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    c.free(block)
print(told, faults)
"""


def second_time(asked: bool, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(asked=asked)],
        capture_output=True, text=True, check=True, env={**clean, **environment},
    )  # fmt: skip
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.slow
def test_large_blocks_are_used_again() -> None:
    told, faults = second_time(True)
    assert told == "True"
    # By default all of its pages (or huge pages) are new; now none is.
    assert faults == 0 < second_time(False)[1]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", *(pytest.param(name, marks=pytest.mark.slow)
                                                        for name in ("GLIBC_TUNABLES", "LD_PRELOAD"))])  # fmt: skip
def test_an_allocator_that_the_user_has_set_is_left_alone(name: str) -> None:
    told, faults = second_time(True, **{name: "glibc.malloc.check=0" if name == "GLIBC_TUNABLES" else ""})
    assert told == "False"
    assert faults > 0
