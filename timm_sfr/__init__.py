"""Self-Feature Regularization for timm: train any image model with its own deep features, no teacher."""

from timm_sfr import models as models
from timm_sfr.config import RunConfig
from timm_sfr.hub.push import push_to_hub
from timm_sfr.method.channels import match_channels
from timm_sfr.method.config import LossForm, SFRConfig
from timm_sfr.method.feature_loss import emd_l2, gaussian_l2, sinkhorn_divergence
from timm_sfr.method.smoothing import DynamicLabelSmoothing
from timm_sfr.method.taps import TapPlan, choose_taps
from timm_sfr.method.task import SFRTask
from timm_sfr.method.transport import transport_plan
from timm_sfr.models.loading import create_model
from timm_sfr.models.zoo import list_pretrained, register
from timm_sfr.utils.errors import HubError, UserError
from timm_sfr.version import __version__

__all__ = [
    "DynamicLabelSmoothing",
    "HubError",
    "LossForm",
    "RunConfig",
    "SFRConfig",
    "SFRTask",
    "TapPlan",
    "UserError",
    "__version__",
    "choose_taps",
    "create_model",
    "emd_l2",
    "gaussian_l2",
    "list_pretrained",
    "match_channels",
    "push_to_hub",
    "sinkhorn_divergence",
    "transport_plan",
]

register()
