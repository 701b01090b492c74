"""Models: our architectures for small images, the zoo, and loading from anywhere.

`cifar` has the architectures, which importing this package registers in timm; `zoo` the recipes; `files` reads and checks a
model's files; `loading` makes a model from a name; `teacher` wraps one that teaches another.
"""

from timm_sfr.models import cifar

SMALL_IMAGE_MODELS = tuple(cifar.default_cfgs)
