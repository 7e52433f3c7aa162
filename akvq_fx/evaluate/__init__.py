"""What packing a cache costs in accuracy, on a model of your own: akvq_fx.evaluate.fidelity, python -m akvq_fx.evaluate."""

from akvq_fx.evaluate.fidelity import Fidelity, fidelity, windows_of

__all__ = ["Fidelity", "fidelity", "windows_of"]
