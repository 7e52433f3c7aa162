"""Ops of the packed cache. Each file: the op, its reference in plain PyTorch (which defines it) and its fake."""

if not __name__.startswith("akvq_fx."):
    # A checkout's root on sys.path makes this folder importable as "kernels", a name that transformers probes for.
    # Answer with an empty package: raising would break transformers, and importing our modules under a second name
    # would register ops twice.
    __path__ = []
