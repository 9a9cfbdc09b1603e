"""The ERNIE-4.5 network: its config, its parameters and its forward pass. Knows no requests and no files."""

from tern.model.batch import Batch, KVCache
from tern.model.config import ErnieConfig
from tern.model.decoder import ErnieModel
from tern.model.mtp import MultiTokenPredictor
from tern.model.parameters import OPTIONAL_PARAMETERS, float32_parameters, parameter_shapes

__all__ = [
    "OPTIONAL_PARAMETERS",
    "Batch",
    "ErnieConfig",
    "ErnieModel",
    "KVCache",
    "MultiTokenPredictor",
    "float32_parameters",
    "parameter_shapes",
]
