"""Recipes: published KV-cache quantization methods by name, one file each. They import nothing else of akvq_fx."""

from akvq_fx.recipes.akvq import AKVQ, AKVQ_EVEN
from akvq_fx.recipes.akvq_vl import AKVQ_VL
from akvq_fx.recipes.calibquant import CALIBQUANT
from akvq_fx.recipes.fp8 import FP8
from akvq_fx.recipes.kivi import KIVI, KIVI_G128
from akvq_fx.recipes.quarot import QUAROT
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulation, Simulator
from akvq_fx.recipes.rtn import RTN2, RTN4
from akvq_fx.recipes.skvq import SKVQ
from akvq_fx.recipes.smoothquant import SMOOTHQUANT
from akvq_fx.recipes.turboquant import TURBOQUANT

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        AKVQ_VL,
        AKVQ,
        AKVQ_EVEN,
        RTN2,
        RTN4,
        SMOOTHQUANT,
        KIVI,
        KIVI_G128,
        SKVQ,
        QUAROT,
        TURBOQUANT,
        CALIBQUANT,
        FP8,
    )
}

__all__ = ["RECIPES", "SIMULATORS", "Context", "Recipe", "Simulation", "Simulator"]
