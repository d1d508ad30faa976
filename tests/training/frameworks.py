"""Importing Lightning and transformers, or skipping, beside a torchvision without CPU operators."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from types import ModuleType

import pytest
import torch


def importorskip(name: str) -> ModuleType:
    """The module. Both frameworks import torchvision, which needs its operators' schemas."""
    if "torchvision" in sys.modules:
        return pytest.importorskip(name)
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        with suppress(ImportError, RuntimeError):
            importlib.import_module("torchvision")
        return pytest.importorskip(name)
    finally:
        library._destroy()  # tests/zoo defines them for itself
