"""Train any timm model with Self-Feature Regularization: parse, configure, fit.

python train_sfr.py                                             trains a small model on the built-in digits
python train_sfr.py --model resnet18 --data-dir DIR             trains on DIR/train/CLASS/*.jpg
accelerate launch train_sfr.py ...                              the same on many processes
python train_sfr.py ... --push-to-hub USER/NAME                 and publishes the best model
python train_sfr.py --help                                      lists the options
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # while it is loading, too
        print("error: interrupted; --resume RUN goes on from the last checkpoint", file=sys.stderr)
        return 2


def _main(arguments: Sequence[str] | None) -> int:
    from timm_sfr.cli import INTERRUPTED, PUSH_FAILED, fail, parse
    from timm_sfr.fit import fit
    from timm_sfr.utils.errors import HubError, Interrupted, UserError, one_line
    from timm_sfr.utils.processes import start_cpu_processes

    try:
        config, resume = parse(arguments)
        status = start_cpu_processes(__file__, sys.argv[1:] if arguments is None else arguments)
        if status is not None:
            return status
        fit(config, resume)
    except HubError as error:
        return fail(one_line(error), PUSH_FAILED)
    except UserError as error:
        return fail(one_line(error))
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
