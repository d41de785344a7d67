"""The networks of the three papers, one file a paper, all registered with timm."""

from regard.models import cbam, residual_attention, sononet

FAMILIES = {
    "residual_attention": residual_attention,
    "cbam": cbam,
    "sononet": sononet,
}
