"""Running averages of weights (SWA, EMA), which follow the weights through a rescaling."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from pathlift.errors import ArgumentError
from pathlift.symmetry.group import RescalingGroup

# Full name of a class -> its attribute with the averaged weights.
_HOLDERS = {
    f"{AveragedModel.__module__}.AveragedModel": "module",
    "timm.utils.model_ema.ModelEma": "ema",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}


def rescale_average_(
    averaged_model: object,
    group: RescalingGroup,
    log2_scales: Tensor | NDArray[np.generic],
) -> None:
    """Rescale a running average of weights (SWA, EMA) in place, as the model itself was.

    A mean of weights that are all multiplied by ``2^k`` is multiplied by ``2^k``, so an average
    taken before a rescaling can go on afterwards. Averaged buffers and the number of averaged
    models stay.

    Args:
        averaged_model: an average of the model the group was computed for: an ``AveragedModel`` of
            ``torch.optim.swa_utils``, or timm's ``ModelEma``, ``ModelEmaV2`` or ``ModelEmaV3``.
        group: ``pathlift.rescaling_group(model, example_inputs)``.
        log2_scales: what the model was rescaled by, ``report.log2_scales``; shape (num_scales,).

    Raises:
        ArgumentError: not one of these, or an average of another model.
        RangeError: an averaged weight would leave the normal range of its dtype; no weight has
            changed.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> from torch.optim.swa_utils import AveragedModel
    >>> average = AveragedModel(model)
    >>> group = pathlift.rescaling_group(model, x)
    >>> report = pathlift.condition_(model, x)
    >>> pathlift.training.rescale_average_(average, group, report.log2_scales)
    >>> torch.equal(average.module[0].weight, model[0].weight)
    True
    """
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(averaged_model).__mro__}
    held = [getattr(averaged_model, where) for name, where in _HOLDERS.items() if name in names]
    if not held:
        raise ArgumentError(
            f"averaged_model must be a torch.optim.swa_utils.AveragedModel or timm's ModelEma; "
            f"found {type(averaged_model).__name__}. For another kind of average, call "
            f"group.rescale_(module, log2_scales) on the module that holds the averaged weights."
        )
    group.rescale_(held[0], torch.as_tensor(log2_scales))
