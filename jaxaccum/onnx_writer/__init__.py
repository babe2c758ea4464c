"""JAX programs as ONNX, for runtimes that know no JAX. Needs the package onnx."""

from jaxaccum.onnx_writer.graph import BATCH, OPSET, UnwritableError
from jaxaccum.onnx_writer.suppression import best_of
from jaxaccum.onnx_writer.writer import to_onnx

__all__ = ["BATCH", "OPSET", "UnwritableError", "best_of", "to_onnx"]
