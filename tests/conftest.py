"""What all tests share: one torch thread a process, since the tests themselves run side by side, and no hub.

Small networks compute faster on one thread than two cores can agree on anything.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
