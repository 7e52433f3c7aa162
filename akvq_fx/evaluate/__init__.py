"""What packing a cache costs in accuracy, on a model of your own: `python -m akvq_fx.evaluate`, or the functions here.

fidelity, prompt_fidelity   how far predictions move, per position     ImageTasks, MileBench   tasks for fill
fill, markdown, Store       recipe x model x task, resumable
"""

from akvq_fx.evaluate.fidelity import Fidelity, Prompt, fidelity, prompt_fidelity, windows_of
from akvq_fx.evaluate.milebench import MileBench
from akvq_fx.evaluate.store import Store
from akvq_fx.evaluate.table import fill, markdown
from akvq_fx.evaluate.vision_tasks import ImageTasks

__all__ = [
    "Fidelity",
    "ImageTasks",
    "MileBench",
    "Prompt",
    "Store",
    "fidelity",
    "fill",
    "markdown",
    "prompt_fidelity",
    "windows_of",
]
