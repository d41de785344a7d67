"""The networks of the three papers, one file per paper, all registered with timm."""

import fnmatch

from timm import create_model as create_model
from timm.models import list_models as _timm_list_models

from regard.models import (
    attention_mobilenet,
    attention_resnet,
    residual_attention_variants,
    sononet,
)
from regard.models import graft as _graft  # noqa: F401 (registers `grafted`)
from regard.weights import shipped

FAMILIES = {
    "residual_attention_variants": residual_attention_variants,
    "attention_resnet": attention_resnet,
    "attention_mobilenet": attention_mobilenet,
    "sononet": sononet,
}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names of Regard's networks that match a shell pattern, sorted by family.

    Args:
        pattern: shell pattern of the names.
        pretrained: list the weights that come with Regard instead, such as "ag_sononet8.digits".
    """
    if pretrained:
        return sorted(name for name in shipped() if fnmatch.fnmatch(name, pattern))
    names = [name for module in FAMILIES for name in _timm_list_models(module=module)]
    return [name for name in names if fnmatch.fnmatch(name, pattern)]
