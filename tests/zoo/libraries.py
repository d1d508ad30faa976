"""What real architectures need: torchvision importable, and norms that hide no mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torchvision has no CPU build for this torch; it imports once its two operators have a schema
# (which lasts as long as the library object).
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def randomise_(model: nn.Module) -> None:
    """Untouched norms and zero layer scales hide mistakes: give all of them generic values."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.uniform_(0.5, 1.5).mul_(torch.sign(torch.randn(parameter.shape)))
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
