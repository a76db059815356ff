"""What one model says of itself: `tenuto.manifest` in its ONNX metadata, or `manifest.json` beside it.

Tensors are bound by name, never by order; unknown keys are refused; `check_graph` compares every statement
with the graph. docs/manifest.md, written from here by `make vocabulary`, is the reference for people.
"""

from .control import Control
from .generate import LEAST_TEMPERATURE, MOST_TEMPERATURE
from .graph import GraphTensor
from .manifest import METADATA_KEY, Manifest
from .part import Dim, Dtype
from .state import State, Value, initial
from .state_schema import state_schema
from .tensors import Exact, Input, Multiple, Output
from .wire import WireDtype

__all__ = [
    "LEAST_TEMPERATURE",
    "METADATA_KEY",
    "MOST_TEMPERATURE",
    "Control",
    "Dim",
    "Dtype",
    "Exact",
    "GraphTensor",
    "Input",
    "Manifest",
    "Multiple",
    "Output",
    "State",
    "Value",
    "WireDtype",
    "initial",
    "state_schema",
]
