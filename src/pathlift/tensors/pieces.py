"""How many entries of a tensor are worked on at a time where each needs a copy."""

from __future__ import annotations

import torch

# These fit a processor's cache, so that what is copied never goes to memory.
HOST = 1 << 18
# On an accelerator: enough to be worth a launch, and little beside its memory.
ACCELERATOR = 1 << 26


def entries_at_a_time(device: torch.device) -> int:
    """The number of entries of one piece."""
    return HOST if device.type == "cpu" else ACCELERATOR
