"""Files <-> tensors: finds a model, downloads it if need be, and loads its weights into the network.

Knows safetensors, the layouts that ERNIE-4.5 checkpoints are stored in, the hub and synthetic weights. Knows no
requests and no arithmetic. Only safetensors and JSON are ever read: no pickle, no code from a model's repository.
"""

from tern.checkpoint.generation import GenerationConfig
from tern.checkpoint.identity import weights_identity
from tern.checkpoint.loader import load_model, load_tensors, quantise_checkpoint
from tern.checkpoint.presets import PRESETS
from tern.checkpoint.quantisation import FP8_QUANTIZATIONS, QUANTIZATIONS
from tern.checkpoint.residence import split_bytes, weight_bytes
from tern.checkpoint.source import ModelSource, embedded_model_directory, resolve_model

__all__ = [
    "FP8_QUANTIZATIONS",
    "PRESETS",
    "QUANTIZATIONS",
    "GenerationConfig",
    "ModelSource",
    "embedded_model_directory",
    "load_model",
    "load_tensors",
    "quantise_checkpoint",
    "resolve_model",
    "split_bytes",
    "weight_bytes",
    "weights_identity",
]
