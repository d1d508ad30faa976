"""The old name of :mod:`pathlift.tensors.shards`."""

from pathlift.tensors.shards import is_sharded, largest_around, local_factors, local_part

__all__ = ["is_sharded", "largest_around", "local_factors", "local_part"]
