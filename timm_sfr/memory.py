"""How the C library's allocator treats the large blocks of training on a CPU."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names, <malloc.h>
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_blocks() -> bool:
    """Lets glibc use freed blocks of any size again; True where it has been told to.

    By default glibc maps every block of 32 MiB and more anew from the system and gives it back when it is freed, so that
    each batch pays the page faults of its large activations again: 13 % of a step of ``resnet18_cifar`` on 128 images of
    32 pixels (docs/performance.md). Environment variables that set the allocator, and other allocators, are left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  others have a mallopt of that name that does nothing
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST) and mallopt(_TRIM_THRESHOLD, _MOST))
