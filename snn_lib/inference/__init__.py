"""Runs a trained network outside PyTorch: as one compiled function, or as an ONNX graph."""

from snn_lib.inference.compiled import CompiledNetwork, compiled
from snn_lib.inference.onnx_graph import to_onnx

__all__ = ["CompiledNetwork", "compiled", "to_onnx"]
