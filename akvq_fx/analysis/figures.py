"""Pictures of a calibration and of ablations. Functions return a matplotlib Figure and touch no global state.

matplotlib is an extra, imported when a picture is asked for: pip install "akvq_fx[figures]".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from akvq_fx.analysis.ablation import Ablation
from akvq_fx.analysis.calibration import Calibration, LayerStatistics
from akvq_fx.analysis.measure import FORMS, PARTS

LABELS = {"recent": "recent window", "far_pivots": "pivots", "far_text": "other text", "far_vision": "other vision"}
MEASURES = {
    "kl": "KL divergence (nats)",
    "dnll": "change of NLL (nats)",
    "tv": "total variation",
    "agree": "top-1 agreement",
}
DPI = 150


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """(Figure, [rows, columns] axes). Raises ImportError that names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('akvq_fx.analysis: pictures need matplotlib; pip install "akvq_fx[figures]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def attention_mass(calibration: Calibration):
    """Per layer, the share of attention by modality, and by what the method does for a token; TSA layers are shaded."""
    figure, axes = new_figure(10, 6, 2)
    layers = [layer.layer for layer in calibration.layers]
    for ax, names in zip(axes[:, 0], (("text", "vision"), PARTS), strict=True):
        bottom = torch.zeros(len(layers), dtype=torch.float64)
        for name in names:
            part = torch.tensor([layer.share(name) for layer in calibration.layers], dtype=torch.float64)
            ax.bar(layers, part.tolist(), bottom=bottom.tolist(), label=LABELS.get(name, name))
            bottom += part
        for layer in calibration.tsa_layers:
            ax.axvspan(layer - 0.5, layer + 0.5, color="black", alpha=0.08, lw=0)
        ax.set(ylabel="share of attention", ylim=(0, 1), xlim=(min(layers) - 0.5, max(layers) + 0.5))
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes[0, 0].set_title("Attention of the last text tokens")
    axes[-1, 0].set_xlabel("layer (shaded: TSA)")
    return figure


def attention_heads(calibration: Calibration):
    """Layer by query head: the share of attention on text, on vision tokens, and on the first real token."""
    figure, axes = new_figure(12, 0.18 * len(calibration.layers) + 2, 1, 3)
    heads = max(len(layer.by_head("text")) for layer in calibration.layers)
    for ax, name in zip(axes[0], ("text", "vision", "sink"), strict=True):
        grid = torch.full((len(calibration.layers), heads), torch.nan)
        for i, layer in enumerate(calibration.layers):
            share = layer.by_head(name)
            grid[i, : len(share)] = share
        image = ax.imshow(grid.tolist(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set(title="first token" if name == "sink" else name, xlabel="query head", ylabel="layer")
        label_layers(ax, calibration)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="share of attention")
    return figure


def massive_activations(calibration: Calibration):
    """Largest |h| by layer against the median, and by layer and position for the first prompt."""
    shown = [layer for layer in calibration.layers if layer.massive]
    if not shown:
        raise ValueError(
            "akvq_fx.analysis: no residual stream was seen in these graphs, so there are no activations to draw"
        )
    figure, axes = new_figure(12, 5, 1, 2)
    left, right = axes[0]
    numbers = [layer.layer for layer in shown]
    for rank in range(3):
        kept = [(n, layer.top()) for n, layer in zip(numbers, shown, strict=True) if len(layer.top().values) > rank]
        left.plot(
            [n for n, _ in kept],
            [top.values[rank].item() for _, top in kept],
            marker=".",
            label=f"token {rank + 1} by |h|",
        )
    left.plot(numbers, [layer.top().median for layer in shown], color="gray", ls="--", label="median")
    left.set(yscale="log", xlabel="layer", ylabel="largest |h| at the layer's input")
    left.legend()
    grid = torch.stack([layer.massive[0].peaks for layer in shown]).clamp_min(1e-6).log10()
    image = right.imshow(grid.tolist(), aspect="auto", interpolation="nearest", vmin=grid.median().item())
    marks = [(at, row) for row, layer in enumerate(shown) for at in layer.massive[0].massive.tolist()]
    right.plot([at for at, _ in marks], [row for _, row in marks], "r.", ms=4, ls="", label="massive")
    right.legend(loc="upper right")
    right.set(xlabel="position in the first prompt", ylabel="layer")
    label_layers(right, calibration, shown)
    figure.colorbar(image, ax=right, label="log10 of the largest |h|")
    return figure


def channels(calibration: Calibration, layer: int | None = None):
    """Largest |x| of every KV head and channel of one layer, keys and values, before and after the rotation.

    layer: its number; None: the one whose keys' channels stand out most. Raises ValueError for a layer that was not
    measured.
    """
    chosen = pick(calibration, layer)
    figure, axes = new_figure(3.2 * len(FORMS), 3.2, 1, len(FORMS))
    highest = {
        kind: max(chosen.largest[form].max().item() for form in FORMS if form.startswith(kind))
        for kind in ("keys", "values")
    }
    for ax, form in zip(axes[0], FORMS, strict=True):
        for head, row in enumerate(chosen.largest[form]):
            ax.plot(row.tolist(), lw=0.8, label=f"head {head}")
        ax.set(title=form, xlabel="channel", ylim=(0, 1.05 * highest[form.split()[0]] or 1))
    axes[0, 0].set_ylabel(f"largest |x|, layer {chosen.layer}")
    if len(chosen.largest["keys"]) <= 8:
        axes[0, -1].legend(fontsize="small")
    return figure


def outliers(calibration: Calibration):
    """By layer: how far the largest channel of keys and values stands out, before and after the rotation."""
    figure, axes = new_figure(8, 4)
    layers = [layer.layer for layer in calibration.layers]
    for form in FORMS:
        axes[0, 0].plot(layers, [layer.outlier(form) for layer in calibration.layers], marker=".", label=form)
    axes[0, 0].set(xlabel="layer", ylabel="largest channel over mean channel", ylim=(0, None))
    axes[0, 0].legend()
    return figure


def ablation_curves(ablations: Sequence[Ablation], measure: str = "kl"):
    """One curve an option, with standard errors over windows where there are several."""
    if not ablations:
        raise ValueError("akvq_fx.analysis: no ablations to draw")
    figure, axes = new_figure(4 * len(ablations), 3.5, 1, len(ablations))
    for ax, found in zip(axes[0], ablations, strict=True):
        errors = [r.standard_error(measure) if len(r.values[measure]) > 1 else 0.0 for r in found.results]
        places = range(len(found.values))
        ax.errorbar(places, found.mean(measure), yerr=errors, marker="o", capsize=3)
        ax.set_xticks(list(places), [str(value) for value in found.values])
        ax.set(xlabel=found.option, ylabel=MEASURES.get(measure, measure))
    return figure


def pick(calibration: Calibration, layer: int | None) -> LayerStatistics:
    if layer is None:
        return max(calibration.layers, key=lambda found: found.outlier("keys"))
    chosen = [found for found in calibration.layers if found.layer == layer]
    if not chosen:
        known = ", ".join(str(found.layer) for found in calibration.layers)
        raise ValueError(f"akvq_fx.analysis: layer {layer} was not measured; accepted: {known}")
    return chosen[0]


def label_layers(ax, calibration: Calibration, shown: Sequence[LayerStatistics] | None = None) -> None:
    layers = shown or calibration.layers
    step = max(1, len(layers) // 16)
    ax.set_yticks(range(0, len(layers), step), [str(layer.layer) for layer in layers[::step]])


def save_figures(calibration: Calibration, folder: str | Path, ablations: Sequence[Ablation] = ()) -> list[Path]:
    """Write every picture as PNG into the folder, which must be there; returns the paths."""
    made = {
        "attention_mass": attention_mass(calibration),
        "attention_heads": attention_heads(calibration),
        "channels": channels(calibration),
        "outliers": outliers(calibration),
    }
    if any(layer.massive for layer in calibration.layers):
        made["massive_activations"] = massive_activations(calibration)
    if ablations:
        made["ablations"] = ablation_curves(ablations)
    paths = []
    for name, figure in made.items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths
