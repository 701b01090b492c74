"""Small-image architectures; importing this package registers them in timm."""

from timm_sfr.models import cifar

SMALL_IMAGE_MODELS = tuple(cifar.default_cfgs)
