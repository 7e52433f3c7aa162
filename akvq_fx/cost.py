"""The cost model: bytes and bits of a packed cache as sympy expressions, from the same table that allocates it.

B batch, H KV heads, C capacity, Ct text slots, T tokens. `bytes_of` with real sizes put in equals what `Layout.allocate` makes.
"""

from __future__ import annotations

import functools

import sympy

from akvq_fx.kernels.layout import Layout

B, H, C, CT, T = sympy.symbols("B H C Ct T", positive=True, integer=True)


@functools.cache
def bytes_of(layout: Layout) -> sympy.Expr:
    """Bytes of one packed key or value tensor, an expression in B, H, C and Ct."""
    total = sympy.Integer(0)
    for name in layout.fields:
        shape, dtype = layout.buffer(name, B, H, C, CT)
        total += sympy.prod(shape) * dtype.itemsize
    return sympy.expand(total)


def bits_per_element(layout: Layout, heads: int, text_fraction: float = 0.0) -> sympy.Expr:
    """Bits per cached number at T tokens with no spare capacity, batch 1; an expression in T.

    text_fraction: share of text tokens, which a TSA layer stores again at text_bits.
    """
    exact = bytes_of(layout).subs({B: 1, H: heads, C: T, CT: text_fraction * T})
    return sympy.simplify(8 * exact / (heads * T * layout.head_dim))


def limit_bits(layout: Layout, heads: int) -> float:
    """Bits per element of a long cache: what the 16-bit overlays cost vanishes."""
    return float(sympy.limit(bits_per_element(layout, heads), T, sympy.oo))
