"""Runs a trained network outside PyTorch: compiled, as an ONNX graph, in integers, or as C."""

from snn_lib.inference.c_source import to_c
from snn_lib.inference.compiled import CompiledNetwork, compiled
from snn_lib.inference.integers import IntegerNetwork, quantise
from snn_lib.inference.onnx_graph import to_onnx

__all__ = ["CompiledNetwork", "IntegerNetwork", "compiled", "quantise", "to_c", "to_onnx"]
