"""AKVQ-VL's own choices (arXiv 2501.15021, section III): token classes, WHT, 2 bits, clip 0.8. Packed."""

from akvq_fx.recipes.recipe import Recipe

AKVQ_VL = Recipe("akvq-vl", "arXiv 2501.15021", {"center_keys": False, "balance_keys": False, "value_rotation": "fold"})
