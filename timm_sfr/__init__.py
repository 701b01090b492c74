"""Self-Feature Regularization for timm: train any image model with its own deep features, no teacher."""

from timm_sfr import models as models
from timm_sfr.channels import match_channels
from timm_sfr.config import RunConfig, SFRConfig
from timm_sfr.errors import UserError
from timm_sfr.losses import DynamicLabelSmoothing, emd_l2, gaussian_l2
from timm_sfr.taps import TapPlan, choose_taps
from timm_sfr.task import SFRTask
from timm_sfr.transport import transport_plan
from timm_sfr.version import __version__

__all__ = [
    "DynamicLabelSmoothing",
    "RunConfig",
    "SFRConfig",
    "SFRTask",
    "TapPlan",
    "UserError",
    "__version__",
    "choose_taps",
    "emd_l2",
    "gaussian_l2",
    "match_channels",
    "transport_plan",
]
