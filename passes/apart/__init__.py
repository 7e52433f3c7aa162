"""What is done to a graph before the pipeline, whose passes see every cache as a tensor by itself."""

from akvq_fx.passes.apart.take_apart import Apart, Together, not_packed, take_apart

__all__ = ["Apart", "Together", "not_packed", "take_apart"]
