"""Rescale a network without changing it, so that it trains from a better-conditioned point."""

from pathlift.symmetry.group import RescalingGroup, rescaling_group

__all__ = ["RescalingGroup", "rescaling_group"]
