"""What a model's own prompts say about its cache: attention, massive activations, channels. python -m akvq_fx.analysis."""

from akvq_fx.analysis.ablation import Ablation, ablation
from akvq_fx.analysis.calibration import Calibration, LayerStatistics, Prompt
from akvq_fx.analysis.figures import save_figures

__all__ = ["Ablation", "Calibration", "LayerStatistics", "Prompt", "ablation", "save_figures"]
