"""Other people's programs, where the one who runs the benchmark has them; a reason where not.

- Torch-Pruning's dependency graph (`pip install --no-deps torch-pruning`), beside
  `rescaling_group`.
- The path-norm toolkit (`git clone https://github.com/agonon/pathnorm_toolkit`, its folder in the
  environment variable PATHNORM_TOOLKIT), beside `path_norm`. It runs a float32 forward pass.
- The paper's own code (`git clone https://github.com/Artim436/pathcond`, its folder in PATHCOND),
  beside `condition_` with continuous scales. It knows chains and a ResNet of its own
  (`pathcond-resnet18`), whose shortcuts all have a convolution.
- ENorm's cycle (Stock et al., ICLR 2019, section 3), written here from the paper for chains of
  linear maps, beside `condition_(criterion="weight-norm")`.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The work to be timed, or why there is none.
Work = Callable[[], Any] | str


def torch_pruning(name: str, model: nn.Module, x: Tensor) -> Work:
    """The dependency graph of a network."""
    try:
        import torch_pruning as tp
    except ImportError:
        return "torch-pruning is not installed"
    return lambda: tp.DependencyGraph().build_dependency(model, example_inputs=x)


def toolkit(name: str, model: nn.Module, x: Tensor) -> Work:
    """The l1 path norm of a torchvision network of the toolkit's list."""
    root = os.environ.get("PATHNORM_TOOLKIT")
    if root is None:
        return "PATHNORM_TOOLKIT is not set"
    sys.path.insert(0, str(Path(root) / "src"))
    here = Path.cwd()
    os.chdir(root)  # it reads its list of networks from there
    try:
        from pathnorm.path_norm import compute_path_norm as theirs

        listed = theirs.is_model_ok(name)
    finally:
        os.chdir(here)
    if not listed:
        return "not on the toolkit's list"

    def run() -> float:
        os.chdir(root)
        try:
            device = torch.device("cpu")
            return theirs.get_path_norm(model, name, device, exponent=1, in_place=False)
        finally:
            os.chdir(here)

    return run


_libraries: list[torch.library.Library] = []


def prepare_torchvision() -> None:
    """torchvision has no CPU build for every torch; it imports once its operators have a schema."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)  # the schemas last as long as it does
    for operator in ("nms", "qnms"):
        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _paper(module: str) -> Any:
    """A module of the paper's code."""
    root = os.environ.get("PATHCOND")
    if root is None:
        raise ImportError("PATHCOND is not set")
    if root not in sys.path:
        sys.path.insert(0, root)
    prepare_torchvision()
    return importlib.import_module(f"pathcond.{module}")


def paper_resnet18() -> nn.Module:
    """The paper's ResNet-18 for CIFAR-10."""
    return _paper("models").resnet18_c_cifar10()


def paper(name: str, model: nn.Module, x: Tensor) -> Work:
    """The paper's algorithm with its defaults (10 cycles, tolerance 1e-2), on a copy.

    Its one-line call leaves out the ResNets, so its two halves are called.
    """
    resnet = name == "pathcond-resnet18"
    if not resnet and not isinstance(model, nn.Sequential):
        return "the paper's code knows chains and a ResNet of its own"
    try:
        theirs = _paper("rescaling_polyn")
    except ImportError as error:
        return str(error)

    def run() -> None:
        rescaled = copy.deepcopy(model)
        logarithms, _ = theirs.optimize_rescaling_polynomial(rescaled, 10, 1e-2, resnet)
        theirs.reweight_model_inplace(rescaled, logarithms)

    return run


def enorm(name: str, model: nn.Module, x: Tensor) -> Work:
    """ENorm's cycles over a chain of linear maps until the sum of squares falls by less than 1e-8.

    Channel by channel the sum of squares of what enters and of what leaves it are made equal.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not isinstance(model, nn.Sequential) or len(layers) < 2:
        return "written for chains of linear maps"

    def run() -> None:
        chain = [copy.deepcopy(m) for m in layers]
        before = float("inf")
        with torch.no_grad():
            for _ in range(200):
                for left, right in pairwise(chain):
                    enters = left.weight.square().sum(1) + left.bias.square()
                    d = (right.weight.square().sum(0) / enters) ** 0.25
                    left.weight.mul_(d[:, None])
                    left.bias.mul_(d)
                    right.weight.div_(d)
                total = float(sum(p.square().sum() for m in chain for p in m.parameters()))
                if before - total < 1e-8 * total:
                    return
                before = total

    return run


PEERS = {"torch-pruning": torch_pruning, "toolkit": toolkit, "paper": paper, "ENorm": enorm}
