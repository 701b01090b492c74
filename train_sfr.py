"""Trains any timm model with Self-Feature Regularization.

python train_sfr.py                                             trains a small model on the built-in digits
python train_sfr.py --model resnet18 --data-dir DIR             trains on DIR/train/CLASS/*.jpg
torchrun --nproc-per-node 2 train_sfr.py ...                    the same on two processes
python train_sfr.py ... --push-to-hub USER/NAME                 and publishes the best model
python train_sfr.py --help                                      lists the options
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `timm_sfr.cli.train.main`; Ctrl-C during the imports is one line, too."""
    try:
        from timm_sfr.cli.train import main as train
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    return train(arguments)


if __name__ == "__main__":
    sys.exit(main())
