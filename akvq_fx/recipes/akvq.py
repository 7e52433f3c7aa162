"""akvq: AKVQ-VL plus two exact identities without which keys with a bias collapse at 2 bits (docs/design.md). Packed."""

from akvq_fx.recipes.recipe import Recipe

AKVQ = Recipe("akvq", "arXiv 2501.15021, and docs/design.md", {"center_keys": True, "balance_keys": True})
