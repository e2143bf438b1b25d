"""A trained network at work, outside the training's PyTorch: compiled, or as an ONNX graph."""

from snn_lib.inference.compiled import CompiledNetwork, compiled

__all__ = ["CompiledNetwork", "compiled"]
