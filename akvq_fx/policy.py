"""A policy: options decided by measuring a model, kept in a small JSON file; and the meaning of tsa_layers="auto".

    torch.compile(model, backend="akvq", options=akvq_fx.load_policy("policy.json"))
    torch.compile(model, backend="akvq", options={"tsa_layers": "auto"})

"auto" is settled when a prompt's graph is compiled, before any pass runs. It asks, in this order:
1. what akvq_fx.calibrate decided in this process for these very weights;
2. table I of the paper. A graph does not hold the model's name, so a row is found by the decoder's shape, which
   fine-tuned and other models may share. Calibrate where that matters: a measurement goes before the table.
Where neither knows the model, it is an error; layers are never guessed.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from akvq_fx.config import AKVQConfig
from akvq_fx.passes.canonicalize import canonicalize
from akvq_fx.passes.find_sites import find_sites
from akvq_fx.passes.patterns.nodes import op, shape
from akvq_fx.passes.state import GraphState

log = logging.getLogger(__name__)
AUTO = "auto"
FORMAT = "akvq-policy-1"
# arXiv 2501.15021, table I: (layers, width, query heads, KV heads, head dim, vocabulary) -> TSA layers
PAPER = {
    (32, 4096, 32, 32, 128, 32064): (0, 1),  # LLaVA-1.5-7B, LLaVA-1.6-vicuna-7B
    (32, 4096, 32, 8, 128, 32064): (),  # LLaVA-1.6-mistral-7B
    (28, 3584, 28, 4, 128, 152064): (0, 1),  # Qwen2-VL-7B
}
REMEMBERED = WeakTensorKeyDictionary()  # parameter -> TSA layers of the model that it belongs to


def remember(weights: Iterable[nn.Parameter], tsa_layers: tuple[int, ...]) -> None:
    """Keep what was decided for these weights, for tsa_layers="auto"; the last decision counts."""
    for weight in weights:
        REMEMBERED[weight] = tuple(tsa_layers)


def resolve(config: AKVQConfig, gm: torch.fx.GraphModule, example_inputs: list) -> AKVQConfig:
    """The config with layer numbers in place of tsa_layers="auto"; any other config as it is.

    Raises ValueError where the graph caches a prompt and nothing is known of its model.
    """
    if config.tsa_layers != AUTO:
        return config
    known, source = remembered(example_inputs), "calibrated"
    if known is None:
        state = sites_of(gm, example_inputs, config)
        known, source = PAPER.get(decoder_shape(state)), "the paper's table I"
        if known is None and any(prompt_site(site) for site in state.sites):
            raise ValueError(
                f'akvq: option tsa_layers="auto" knows nothing of this model (its shape is {described(state)}); '
                "accepted: a model that akvq_fx.calibrate(model, inputs) measured in this process, or one in the "
                "paper's table I. Calibrate first, or give layer numbers, e.g. tsa_layers=(0, 1)"
            )
    if known is not None:
        log.info("tsa_layers: %s (%s)", known, source)
    # not dataclasses.replace(), which would check the values that were filled in as if the user had given them
    settled = copy.copy(config)
    object.__setattr__(settled, "tsa_layers", known or ())
    return settled


def remembered(example_inputs: list) -> tuple[int, ...] | None:
    """What was decided for the first of these inputs that is a calibrated weight."""
    found = (REMEMBERED.get(x) for x in example_inputs if isinstance(x, nn.Parameter))
    return next((layers for layers in found if layers is not None), None)


def sites_of(gm: torch.fx.GraphModule, example_inputs: list, config: AKVQConfig) -> GraphState:
    """A copy of dynamo's graph, read as far as its attention sites; nothing is planned or rewritten."""
    tensors = {i: x for i, x in enumerate(example_inputs) if isinstance(x, Tensor)}
    state = GraphState(gm, config, tensors)
    canonicalize(state)
    find_sites(state)
    return state


def prompt_site(site) -> bool:
    """The site writes a prompt into an empty cache."""
    return site.key.kind in ("first", "fill")


def decoder_shape(state: GraphState) -> tuple | None:
    """(layers, width, query heads, KV heads, head dim, vocabulary) of a prompt's graph; None where one is missing."""
    sites = [site for site in state.sites if prompt_site(site) and site.weights[0] is not None]
    if not sites:
        return None
    first, width = sites[0], shape(sites[0].weights[0])[-1]
    embeddings = [shape(n.args[1]) for n in state.graph.nodes if op(n) == "embedding" and len(n.args) > 1]
    rows = [size[0] for size in embeddings if len(size) == 2 and size[1] == width]
    if not rows:
        return None
    heads = shape(first.attention.query)[1], shape(first.key.whole)[1]
    return len({site.layer for site in sites}), width, *heads, first.head_dim, max(rows)


def described(state: GraphState) -> str:
    names = ("layers", "width", "query heads", "KV heads", "head dim", "vocabulary")
    found = decoder_shape(state)
    return ", ".join(f"{n} {x}" for n, x in zip(names, found, strict=True)) if found else "not in one graph"


def load_policy(path: str | Path) -> dict[str, Any]:
    """The options of a policy file, ready for torch.compile(backend="akvq", options=...).

    Raises ValueError for a file that is no policy or holds options that the backend does not accept, OSError where it
    cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"akvq: {path} is no policy: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("options"), dict):
        raise ValueError(
            f'akvq: {path} is no policy; accepted: JSON with "format": "{FORMAT}" and "options", '
            "as Calibration.save writes"
        )
    AKVQConfig.from_options(found["options"])
    return found["options"]
