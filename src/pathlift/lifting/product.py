"""The old name of :mod:`pathlift.tensors.product`."""

from pathlift.tensors.product import Product, dense

__all__ = ["Product", "dense"]
