"""``python -m pathlift.cli``."""

from __future__ import annotations

import sys

from pathlift.cli import main

sys.exit(main())
