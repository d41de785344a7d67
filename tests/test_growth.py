"""What a training step leaves behind: nothing, whatever the network and the precision."""

import gc
import warnings

import pytest
import torch

import regard
from regard.models.fused import fused_at_every_size, set_fused


def alive() -> int:
    """Tensors that Python knows of."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is looked at may be deprecated
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["cbam_resnet18", "se_resnet18", "cbam_mobilenet_070", "attention56_cifar", "ag_sononet8"],
)
def test_no_step_leaves_tensors_behind(name, precision):
    model = regard.create_model(name, num_classes=3).to(memory_format=torch.channels_last).train()
    set_fused(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.pretrained_cfg["input_size"][0], 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    counts = []
    for _ in range(4):
        with fused_at_every_size(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            outputs = model(images)
        regard.multi_head_cross_entropy(outputs.float(), torch.tensor([0, 1])).backward()
        model.zero_grad(set_to_none=True)
        del outputs
        counts.append(alive())
    assert counts[1] == counts[2] == counts[3]
