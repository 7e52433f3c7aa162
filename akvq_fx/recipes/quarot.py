"""QuaRot's cache (Ashkboos et al., arXiv 2404.00456): WHT of keys (after RoPE) and values, per-token groups. Packed.

Group 128 and clip 0.95 are the paper's. 2 bits here, to compare at equal bits; options={"body_bits": 4} gives the
paper's. No token is kept at 16 bits: neither its paper nor its code has a recent window.
"""

from akvq_fx.recipes.recipe import Recipe
from akvq_fx.recipes.rtn import PLAIN

QUAROT = Recipe("quarot", "arXiv 2404.00456", {**PLAIN, "rotate": True, "body_bits": 2, "body_clip": 0.95})
