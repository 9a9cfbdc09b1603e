"""The engine's tests compute next to nothing: one thread each, so that parallel runs do not get in each other's way."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
