"""What is done to a graph before the pipeline, so that its passes see every cache as a tensor that grows or stays."""

from akvq_fx.passes.apart.take_apart import Apart, Together, not_packed, take_apart
from akvq_fx.passes.apart.unroll import Windows

__all__ = ["Apart", "Together", "Windows", "not_packed", "take_apart"]
