"""akvq: AKVQ-VL plus two exact identities without which keys with a bias collapse at 2 bits. Packed.

Also, keys of text in prompts with images keep 4 bits in every layer, not in the first two alone, the window is half
the paper's, and in layers that keep no text at more bits a key's channels have unequal bits, for long texts: akvq-even
is akvq without that. docs/recipes.md says why, docs/fidelity.md what each is worth.
"""

from akvq_fx.recipes.recipe import Recipe

# 128 recent tokens take more than half the bits of a 640-token cache; docs/fidelity.md measures no loss with 64
EVEN = {"center_keys": True, "balance_keys": True, "psa_text_key_bits": 4, "window": 64}
OPTIONS = {**EVEN, "center_blocks": True, "uneven_keys": True, "share_pairs": True, "symmetric_values": True}
AKVQ = Recipe("akvq", "arXiv 2501.15021, and docs/recipes.md", OPTIONS)
AKVQ_EVEN = Recipe("akvq-even", "arXiv 2501.15021, and docs/recipes.md", EVEN)
