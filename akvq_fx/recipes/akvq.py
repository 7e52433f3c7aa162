"""akvq: AKVQ-VL plus two exact identities without which keys with a bias collapse at 2 bits, and half its window. Packed.

Why each, and what it was measured to be worth: docs/design.md and docs/fidelity.md.
"""

from akvq_fx.recipes.recipe import Recipe

# 128 recent tokens are more than half of a cache of 640 tokens; 64 of them cost 0.01 to 0.02 nats of text (docs/fidelity.md)
OPTIONS = {"center_keys": True, "balance_keys": True, "window": 64}
AKVQ = Recipe("akvq", "arXiv 2501.15021, and docs/design.md", OPTIONS)
