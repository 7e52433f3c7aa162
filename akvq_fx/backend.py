"""akvq: the backend that torch.compile(model, backend="akvq") calls with every graph that dynamo captures.

dynamo graph -> passes.PIPELINE -> inner compiler (default: Inductor) -> Runtime. One module-level callable: a new
function object per call would recompile. The graph that dynamo passes in is never edited.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from akvq_fx import (
    ahead,
    compiled_generate,
    gave_up,
    kernels,
    policy,
    progress,
    records,
    torch_internals,
    versions,
    vision_carry,
)
from akvq_fx.config import CAPTURED_MODE, AKVQConfig
from akvq_fx.cuda_graph import DecodeStep
from akvq_fx.cuda_recorder import recorder_for
from akvq_fx.in_place import InPlace
from akvq_fx.passes import DISABLE, PIPELINE, without
from akvq_fx.passes.apart import unroll
from akvq_fx.passes.apart.take_apart import Apart, not_packed, take_apart
from akvq_fx.passes.apart.unroll import Windows
from akvq_fx.passes.patterns.nodes import NoMatch, value
from akvq_fx.passes.patterns.tokens import looked_up, starts_a_call
from akvq_fx.passes.patterns.values import written
from akvq_fx.passes.state import GraphState
from akvq_fx.regions import compile_in_regions
from akvq_fx.report import Regions
from akvq_fx.runtime import Runtime
from akvq_fx.together import Together

log = logging.getLogger(__name__)


def akvq(gm: GraphModule, example_inputs: list, *, mode: str | None = None, options: Mapping[str, Any] | None = None):
    """Compile one dynamo graph. `options` are the fields of AKVQConfig; `mode` is Inductor's.

    Raises ValueError for options that AKVQConfig does not accept.
    """
    versions.warn_of_untried()
    with gave_up.compiling_for(akvq):
        return compile_graph(gm, example_inputs, AKVQConfig.from_options(options, mode))


def compile_graph(gm: GraphModule, example_inputs: list, config: AKVQConfig):
    """One graph, rewritten where it holds a cache, ready to be called."""
    if config.inner == "inductor":
        ahead.begin_inductor()
    state = rewrite(gm, example_inputs, config)
    apart = state.apart
    record = records.add(state, apart.inputs)
    ahead.begin(record.report.kernels)
    program = state.program
    changed = state.sites or state.exchanges or program.packed or program.unpacked or program.vision
    kind, inner = record.report.kind, state.gm if changed else gm
    # what runs once a prompt, a vision tower say, is done before the inner compiler would be
    compiled = config.compile_uncached if kind == "no cache" else config.compile_prompts or not state.begins_caches
    compiled = compiled and not state.windows.contact  # that runs once for a cache, and its buffers grow first
    if not changed:
        if compiled:
            what = "a graph without a cache" if kind == "no cache" else "a graph whose cache stays at 16 bits"
            with shown_while_compiling(what, config):
                inner = compile_inner(gm, example_inputs, config)
        return Passthrough(inner, looked_up(gm.graph)) if starts_a_call(gm.graph) else inner
    if compiled:
        gradients = torch.no_grad() if program.inference else contextlib.nullcontext()
        count = len(state.sites) + len(state.exchanges)
        with gradients, shown_while_compiling(f"a graph of {count} attention layers", config):
            inner, record.report.regions = compile_rewritten(state, inner_examples(state, apart.inputs))
    runtime = Runtime(program, inner, config.capacity_step, starts_a_call(gm.graph))
    runtime.on_weights, runtime.on_left, runtime.on_images = record.add_weights, record.leave, record.add_images
    runtime.writes = any(map(written, state.graph.nodes))
    run = runtime
    if state.windows.changed:
        sliding = [i for i, site in enumerate((*state.exchanges, *state.sites)) if site.key.kept is not None]
        run = InPlace(runtime, state.windows, apart.gm, lambda why: [record.leave(i, why) for i in sliding])
    return Together(run, apart) if apart.changed else run


akvq.dynamo_gave_up = gave_up.warn_and_keep
gave_up.register_hook()
compiled_generate.install(akvq)


def register() -> None:
    """Make the name "akvq" known where no entry point does: in a checkout that is imported but not installed."""
    torch_internals.register("akvq", akvq)


class Passthrough:
    """Runs a graph without a cache that begins a call, and drops the vision mask that the previous call left.

    looked_up: positions of the arguments that are the token ids and the embedding's weight, None if unknown.
    """

    def __init__(self, inner, looked_up: tuple[int, int] | None):
        self.inner, self.looked_up = inner, looked_up

    def __call__(self, *args):
        vision_carry.begin(*(args[i] for i in self.looked_up or ()))
        return self.inner(*args)


def rewrite(gm: GraphModule, example_inputs: list, config: AKVQConfig) -> GraphState:
    """Run the pipeline over a copy of the graph, in which every cache is a tensor by itself (state.apart), and static
    windows grow (state.windows); once more without those that stay as they are."""
    left: dict[int, NoMatch] = {}
    rolling: frozenset[str] = frozenset()
    while True:
        apart = take_apart(gm, example_inputs, left)
        windows = unroll.unroll(apart.gm, apart.inputs, rolling)
        state = run_passes(apart, windows, config)
        failed, stay = not_packed(state), unroll.not_packed(state)
        if not failed and not stay:
            return state
        left, rolling = apart.left | failed, rolling | stay


def run_passes(apart: Apart, windows: Windows, config: AKVQConfig) -> GraphState:
    """Every pass leaves an artifact for TORCH_TRACE and a debug line."""
    tensors = {i: x for i, x in enumerate(apart.inputs) if isinstance(x, torch.Tensor)}
    state = GraphState(windows.gm, policy.resolve(config, windows.gm, apart.inputs), tensors)
    state.apart, state.windows = apart, windows
    done: list[str] = []
    disabled = os.environ.get(DISABLE, "")
    steps = without(PIPELINE, disabled)
    if len(steps) < len(PIPELINE):
        warn_of_disabled(disabled)
    for number, step in enumerate(steps):
        begin = time.perf_counter()
        try:
            report = step(state)
        except Exception as error:
            if type(error) not in (AssertionError, RuntimeError, TypeError, ValueError):
                raise
            raise type(error)(f"{error} (akvq pass {step.__name__}, after {', '.join(done) or 'none'})") from error
        done.append(step.__name__)
        state.reports.append(report)
        log.debug("%s, %.1f ms", report, 1e3 * (time.perf_counter() - begin))
        leave_artifact(state, number, step.__name__)
    return state


@functools.cache
def warn_of_disabled(names: str) -> None:
    """Once a process: a variable that was left set is easily forgotten."""
    log.warning("%s=%s: these passes do not run", DISABLE, names)


def leave_artifact(state: GraphState, number: int, name: str) -> None:
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"akvq_{number:02d}_{name}", "encoding": "string"},
        payload_fn=lambda: str(state.graph),
    )


def shown_while_compiling(what: str, config: AKVQConfig):
    """A line on a terminal, unless there is nothing to wait for."""
    if config.inner == "eager":
        return contextlib.nullcontext()
    return progress.shown(f"akvq: {config.inner} compiles {what}")


def inner_examples(state: GraphState, example_inputs: list) -> list:
    """Example inputs of the rewritten graph: dynamo's own, and fakes for the buffers."""
    examples = []
    for node in state.graph.nodes:
        if node.op != "placeholder":
            continue
        if node in state.position:
            example = example_inputs[state.position[node]]
            plain = state.position[node] in state.program.unpacked
            examples.append(
                state.fake(value(node), value(node).shape) if plain else torch_internals.as_replaced(example)
            )
        elif str(node.target) == "vision_tokens":
            examples.append(fake_vision(state))
        else:
            examples.append(node.meta["example_value"])
    return examples


def fake_vision(state: GraphState):
    query = value(state.sites[0].attention.query)
    return state.fake(query, (query.shape[0], query.shape[2]), torch.bool)


def compile_rewritten(state: GraphState, examples: list) -> tuple[Callable, Regions | None]:
    """The rewritten graph, whole or in the two parts that a captured decode step has, and how its layers went."""
    config, split = state.config, state.split
    if split is None:
        return compile_layers(state.gm, examples, config, state.program.inference)
    prologue = split.prologue
    if prologue is not None:
        prologue = compile_inner(prologue, [examples[i] for i in split.feeds], config)
    given = [examples[i] for i in (*split.held, *split.numbers)]
    moved = [value(n) for n in split.body.graph.nodes if n.op == "placeholder"][len(given) :]
    body, regions = compile_layers(split.body, [*given, *moved], config, state.program.inference)
    record = recorder_for(given[0].device, state.capture)
    asked = config.mode == CAPTURED_MODE
    return DecodeStep(split, prologue, body, state.capture, record, asked, config.kept_share), regions


def compile_layers(
    gm: GraphModule, examples: list, config: AKVQConfig, inference: bool
) -> tuple[Callable, Regions | None]:
    """A graph of layers through the inner compiler, those that are alike once."""
    if not config.share_layers or config.inner == "eager":  # where nothing is compiled, there is nothing to save
        return compile_inner(gm, examples, config), None
    return compile_in_regions(gm, examples, lambda part, given: compile_inner(part, given, config), inference)


def compile_inner(gm: GraphModule, example_inputs: list, config: AKVQConfig):
    """A graph through the inner compiler.

    Inductor's own CUDA graphs are never asked for: they would record a vision tower or a prompt anew for every size.
    """
    if config.inner == "eager":
        return gm
    if config.inner == "aot_eager":
        return torch_internals.aot_eager(gm, example_inputs)
    # Inductor's disk cache identifies an op by its name alone; the digest keeps it from mixing up versions of our ops
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag} akvq_fx {ops_digest()}"):
        return torch_internals.inductor(gm, example_inputs, None if config.mode == CAPTURED_MODE else config.mode)


@functools.cache
def ops_digest() -> str:
    """Changes with the source of the ops, whose outputs' shapes compiled graphs assert."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
