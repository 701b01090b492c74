"""Models: our architectures for small images, the zoo, loading, and teachers.

`cifar` has the architectures; importing this package registers them in timm. `zoo` reads the recipes in ``hub_configs/``,
`files` checks a model's files, `loading` makes a model from a name, `split_bn` gives each view BatchNorm layers of its own, and
`teacher` wraps a model for distillation.
"""

from timm_sfr.models import cifar

SMALL_IMAGE_MODELS = tuple(cifar.default_cfgs)
