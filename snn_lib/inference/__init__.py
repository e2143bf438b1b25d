"""Runs a trained network outside PyTorch: as one compiled function, or as an ONNX graph."""

from snn_lib.inference.compiled import CompiledNetwork, compile_network
from snn_lib.inference.onnx_graph import to_onnx

__all__ = ["CompiledNetwork", "compile_network", "to_onnx"]
