"""Measure on a model's own prompts what matters in its cache: attention, massive activations, channels.

The command is python -m akvq_fx.analysis.
"""

from akvq_fx.analysis.ablation import Ablation, ablation
from akvq_fx.analysis.calibration import Calibration, LayerStatistics, Prompt
from akvq_fx.analysis.figures import save_figures

__all__ = ["Ablation", "Calibration", "LayerStatistics", "Prompt", "ablation", "save_figures"]
