"""Trains any timm model with Self-Feature Regularization.

python train_sfr.py                                             trains a small model on the built-in digits
python train_sfr.py --model resnet18 --data-dir DIR             trains on DIR/train/CLASS/*.jpg
torchrun --nproc-per-node 2 train_sfr.py ...                    the same on two processes
python train_sfr.py ... --push-to-hub USER/NAME                 and publishes the best model
python train_sfr.py --help                                      lists the options
"""

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status."""
    return _call("train", arguments)


def timm_sfr(arguments: Sequence[str] | None = None) -> int:
    """Runs ``timm-sfr VERB ...``; returns the exit status."""
    return _call("main", arguments)


def _call(name: str, arguments: Sequence[str] | None) -> int:
    """Calls a function of `timm_sfr.cli.main`; Ctrl-C during the imports is one line, too."""
    try:
        if "timm_sfr" not in sys.modules:
            # timm_sfr/__init__ imports torch and timm for seconds: it runs when the options have been parsed
            # (timm_sfr.cli.parser.call), so that help and error messages appear immediately.
            spec = importlib.util.find_spec("timm_sfr")
            sys.modules["timm_sfr"] = importlib.util.module_from_spec(spec)
        module = importlib.import_module("timm_sfr.cli.main")
        return getattr(module, name)(arguments)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    finally:
        if not hasattr(sys.modules.get("timm_sfr"), "__all__"):  # a later import has to run it
            for known in [known for known in sys.modules if known.split(".")[0] == "timm_sfr"]:
                del sys.modules[known]


if __name__ == "__main__":
    sys.exit(main())
