"""``timm-sfr list [PATTERN]``: lists the zoo."""

from __future__ import annotations

from argparse import Namespace

from timm_sfr.models.zoo import list_pretrained


def run(args: Namespace) -> int:
    """Prints the zoo; returns 0."""
    print(list_pretrained(args.filter))
    return 0
