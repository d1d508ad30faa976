"""Preparing models for quantisation with the whole rescaling group; see :func:`equalize_`."""

from pathlift.quantization.bounded import BoundedReLU
from pathlift.quantization.equalize import equalize_
from pathlift.quantization.formats import FORMATS, Format
from pathlift.quantization.layers import quantised
from pathlift.quantization.report import EqualizationReport, LayerRow, LayerTable
from pathlift.quantization.streaming import StreamedReport, equalize_checkpoint

__all__ = [
    "FORMATS",
    "BoundedReLU",
    "EqualizationReport",
    "Format",
    "LayerRow",
    "LayerTable",
    "StreamedReport",
    "equalize_",
    "equalize_checkpoint",
    "quantised",
]
