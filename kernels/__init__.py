"""Ops of the packed cache. Each file: the op, its plain-PyTorch reference (the meaning and the CPU path) and its fake."""

if not __name__.startswith("akvq_fx."):  # ops would register twice
    raise ImportError(f"import akvq_fx.kernels, not {__name__}")
