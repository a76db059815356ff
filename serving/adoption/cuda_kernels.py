"""Which nodes of a graph ONNX Runtime's CUDA provider leaves to the CPU, at the price of two copies.

`_IMPLEMENTED` is the list of operators of ONNX's own domain under "Operators implemented by
CUDAExecutionProvider" in ONNX Runtime's docs/OperatorKernels.md (github.com/microsoft/onnxruntime, commit
001d12d2623fd411ce0f83d05abb5e82304a3389, which has the operators up to opset 24). The conditions of
recurrent layers are those of its source, cuda_execution_provider.cc. A list can be old: where CUDA is here,
it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import NodeProto

from .graph_facts import attribute, operator, word_set

_IMPLEMENTED = word_set(
    """
    Abs Add Affine And ArgMax ArgMin Attention AveragePool BatchNormalization Cast Ceil Clip Compress
    Concat ConcatFromSequence ConstantOfShape Conv ConvTranspose Cos Crop CumSum DepthToSpace
    DequantizeLinear Div Dropout DynamicSlice Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
    GridSample HardSigmoid HardSwish Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop MatMul MatMulInteger Max MaxPool
    Min Mod Mul Neg NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear
    RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round ScaledTanh Scan
    Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength Shape Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh TensorScatter ThresholdedRelu
    Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
)
_DEFAULTS = {
    "LSTM": (b"sigmoid", b"tanh", b"tanh"),
    "GRU": (b"sigmoid", b"tanh"),
    "RNN": (b"tanh",),
}


def left_to_cpu(nodes: Sequence[NodeProto]) -> dict[str, str]:
    """By operator, why at least one node of it does not run on CUDA."""
    found: dict[str, str] = {}
    for node in nodes:
        why = _why(node)
        if why:
            found.setdefault(operator(node), why)
    return found


def _why(node: NodeProto) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"of the domain {node.domain}: not looked up" if node.domain != "com.microsoft" else ""
    kind = node.op_type
    if kind in ("If", "Loop", "Scan"):
        return "control flow: the host decides, between two launches"
    if kind in _DEFAULTS:
        return _why_recurrent(node)
    if kind == "Constant" or kind in _IMPLEMENTED or _is_function(kind):
        return ""
    return "the CUDA provider has no kernel for it"


def _is_function(kind: str) -> bool:
    """Whether ONNX says how other operators make it up."""
    if not onnx.defs.has(kind):
        return False
    schema: Any = onnx.defs.get_schema(kind)
    return bool(schema.has_function or schema.has_context_dependent_function)


def _why_recurrent(node: NodeProto) -> str:
    kind = node.op_type
    for name in ("clip", "activation_alpha", "activation_beta"):
        if attribute(node, name) is not None:
            return f"cuDNN knows no {name}"
    activations = attribute(node, "activations")
    if isinstance(activations, list):
        wanted = _DEFAULTS[kind] * max(1, len(activations) // len(_DEFAULTS[kind]))
        if tuple(a.lower() for a in activations) != wanted:
            return "cuDNN knows the default activations alone"
    if kind == "LSTM" and len(node.input) > 7 and node.input[7]:
        return "cuDNN knows no peepholes"
    if kind == "LSTM" and attribute(node, "input_forget", 0):
        return "cuDNN knows no input_forget"
    if kind == "GRU" and not attribute(node, "linear_before_reset", 0):
        return "cuDNN knows linear_before_reset=1 alone"
    return ""
