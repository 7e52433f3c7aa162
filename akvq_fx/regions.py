"""Regions: like layers are compiled once. A rewritten graph is cut into regions; those of one kind share one callable.

Most of a first call's time goes to the inner compiler, which would lower, schedule and generate the same code for every
layer. So the graph is cut once between each two attention calls, where fewest tensors cross: at the residual stream.
Regions are of one kind where their nodes, constants, shapes and strides are equal; weights, buffers and numbers are
their inputs. The first of each kind is compiled, and its callable runs them all. Stretches that are like no other stay
together: embedding and first layer, for example, are one region.

A cut stands before the residual's add rather than behind it, which lets the add fuse with the norm that follows.
Numbers (sizes) never cross: a region computes them again from the graph's own inputs.
"""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from akvq_fx import torch_internals
from akvq_fx.cuda_graph import picker
from akvq_fx.passes.patterns.attention import is_attention
from akvq_fx.passes.patterns.nodes import NoMatch, op, outputs, value
from akvq_fx.passes.patterns.values import (
    SYMBOLIC,
    expression,
    is_number,
    memory,
    symbols,
    tensors_in,
    values_of,
    written,
)
from akvq_fx.report import Regions

log = logging.getLogger(__name__)
FEWEST = 3  # attention calls in a graph: the first and the last layer are seldom like others
ALIGNED = 16  # bytes: compiled code relies on whether a tensor begins at a multiple, on nothing else of where it begins
# names of calls after which something else than tensors is different until the opposite call
OPENING, CLOSING, SETTING = ("_enter_", "_increment_nesting"), ("_exit_", "_decrement_nesting"), "_set_"
NO_PLACE = (
    "there is no place to cut it: between attention calls something crosses that is no plain tensor, or is written"
)
Compile = Callable[[GraphModule, list], Callable]


def compile_in_regions(
    gm: GraphModule, examples: list, compile_one: Compile, inference: bool = True
) -> tuple[Callable, Regions]:
    """A graph through `compile_one(graph, its example inputs)`, each kind of its regions once, else whole.

    inference   its results need no gradients. What crosses a cut has none, so that other graphs are not cut

    The report says how many regions there were, or why it was compiled whole.
    """
    layers = sum(map(attends, gm.graph.nodes))
    try:
        if not inference:
            raise NoMatch("its results may need gradients")
        compiled, report = Cut(gm, examples, layers).compile(compile_one)
    except NoMatch as miss:
        reason = f"{miss.reason} [{miss.node}]" if miss.node is not None else miss.reason
        compiled, report = None, Regions(layers, reason=reason)
    log.debug("regions: %s", report)
    return compiled or compile_one(gm, examples), report


def attends(node: Node) -> bool:
    return node.target is torch.ops.akvq.attend.default or is_attention(node)


class Cut:
    """A graph's regions. Raises NoMatch where there is nothing to share.

    nodes   everything but inputs, outputs and what each region has a copy of, in order
    last    node -> place of its last reader in `nodes`
    deep    what depends on an attention call: the residual stream is, a mask that all layers read is not
    """

    def __init__(self, gm: GraphModule, examples: list, layers: int):
        if layers < FEWEST:
            raise NoMatch(f"it has fewer than {FEWEST} attention calls")
        self.gm, self.graph, self.layers = gm, gm.graph, layers
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.examples = dict(zip(self.placeholders, examples, strict=True))
        fakes = [x for n in self.graph.nodes for x in tensors_in(value(n)) if isinstance(x, FakeTensor)]
        self.env = fakes[0].fake_mode.shape_env
        given = {n: x for n, x in self.examples.items() if isinstance(x, FakeTensor)}
        self.values = values_of(self.graph, fakes[0].fake_mode, given)
        self.changed = self.find_changed()
        self.copied = set(self.placeholders)
        for node in self.graph.nodes:
            if node.op == "get_attr" or self.is_size(node):
                self.copied.add(node)
        self.nodes = [n for n in self.graph.nodes if n not in self.copied and n.op != "output"]
        place = {n: i for i, n in enumerate(self.nodes)}
        self.last = {n: max((place[u] for u in n.users if u in place), default=i) for n, i in place.items()}
        self.deep: set[Node] = set()
        for node in self.nodes:
            if attends(node) or self.deep.intersection(node.all_input_nodes):
                self.deep.add(node)
        self.hindrance: Node | None = None  # the first node that may not cross a cut
        self.facts: dict[tuple, frozenset] = {}

    def find_changed(self) -> set[int]:
        """Memory that the graph writes in place."""
        found: set[int] = set()
        for node in self.graph.nodes:
            for target in written(node):
                if self.values[target] is None:
                    raise NoMatch(f"cannot tell what {op(node)} writes to", node)
                found |= memory(self.values[target])
        return found

    def is_size(self, node: Node) -> bool:
        """A number that every region can compute again from the graph's inputs."""
        if node.op == "placeholder" or not is_number(self.values[node]) or written(node):
            return False
        return bool(node.all_input_nodes) and self.copied.issuperset(node.all_input_nodes)

    # ---- where to cut ------------------------------------------------------------------------------------------------

    def may_cross(self, node: Node) -> bool:
        """A plain tensor that nothing writes: then who runs first, and which of its memory is shared, cannot matter."""
        x = self.values[node]
        plain = isinstance(x, torch.Tensor) and not is_traceable_wrapper_subclass(x)
        return plain and not memory(x) & self.changed and not free_unbacked_symbols(x)

    def places(self) -> list[bool]:
        """Whether there may be a cut before each node."""
        found, closed = [], self.closed()
        barred = 0  # the first place that nothing hinders
        for i, node in enumerate(self.nodes):
            found.append(i >= barred and closed[i])
            if self.last[node] > i and not self.may_cross(node):
                barred = max(barred, self.last[node] + 1)
                self.hindrance = self.hindrance or node
        return found

    def closed(self) -> list[bool]:
        """Whether autocast, grad mode, vmap and the like are before each node as they are at the graph's ends."""
        found, depth, away = [], 0, set()
        settings = {op(n): n.args for n in self.nodes if op(n).startswith(SETTING)}
        for node in self.nodes:
            found.append(depth == 0 and not away)
            name = op(node)
            depth += any(word in name for word in OPENING) - any(word in name for word in CLOSING)
            if name in settings:
                (away.discard if node.args == settings[name] else away.add)(name)
        return found

    def cuts(self) -> list[int]:
        """Between each two attention calls, the last place that fewest tensors cross which depend on attention."""
        allowed, crossing, alive = self.places(), [], set()
        for i, node in enumerate(self.nodes):
            alive = {n for n in alive if self.last[n] >= i}
            crossing.append(alive)
            if node in self.deep:
                alive = {*alive, node}
        place = {n: i for i, n in enumerate(self.nodes)}
        found = []
        calls = [i for i, n in enumerate(self.nodes) if attends(n)]
        for first, second in itertools.pairwise(calls):
            between = [i for i in range(first + 1, second + 1) if allowed[i]]
            if between:
                best = min(between, key=lambda i: (len(crossing[i]), -i))
                only = next(iter(crossing[best])) if len(crossing[best]) == 1 else None
                before = place.get(only, 0)
                found.append(before if op(only) == "add" and before in between else best)
        return found

    def regions(self) -> list[Region]:
        """All nodes in regions, in order; those that are like no other are joined with their neighbours."""
        cuts = self.cuts()
        found = {(a, b): self.region(a, b) for a, b in itertools.pairwise(cuts)}
        if cuts:
            self.take_last_layer(found, cuts[-1])
        kinds = [region.kind for region in found.values()]
        shared = sorted(ends for ends, region in found.items() if kinds.count(region.kind) > 1)
        if not shared:
            raise NoMatch("no two of its layers are alike") if cuts else NoMatch(NO_PLACE, self.hindrance)
        regions, done = [], 0
        for start, end in [*shared, (len(self.nodes), len(self.nodes))]:
            if done < start:
                regions.append(self.region(done, start))
            if start < end:
                regions.append(found[start, end])
            done = end
        return regions

    def take_last_layer(self, found: dict[tuple[int, int], Region], start: int) -> None:
        """No attention call follows the last layer, so its end is where it is like one of the others."""
        kinds = {region.kind for region in found.values()}
        for length in dict.fromkeys(b - a for a, b in reversed(found)):
            if start + length < len(self.nodes):
                last = self.region(start, start + length)
                if last.kind in kinds:
                    found[start, start + length] = last
                    return

    def region(self, start: int, end: int) -> Region:
        region = Region(self, self.nodes[start:end])
        region.kind = (region.signature(), self.facts_of(region.symbols))
        return region

    def facts_of(self, found: tuple[sympy.Symbol, ...]) -> frozenset[str]:
        """What PyTorch knows about these sizes before anything is compiled, by guards and by ranges, sizes renamed."""
        if self.env is None or not found:
            return frozenset()
        if found not in self.facts:
            names = {s: renamed(s, i) for i, s in enumerate(found)}
            guards = [g for g in torch_internals.guards(self.env) if g.free_symbols & names.keys()]
            ranges = (f"{name} in {self.env.bound_sympy(s)}" for s, name in names.items())
            self.facts[found] = frozenset([*(str(g.xreplace(names)) for g in guards), *ranges])
        return self.facts[found]

    # ---- compiling ---------------------------------------------------------------------------------------------------

    def compile(self, compile_one: Compile) -> tuple[Callable, Regions]:
        regions, compiled = self.regions(), {}
        for region in regions:
            if region.kind not in compiled:
                known = len(torch_internals.guards(self.env))
                compiled[region.kind] = compile_one(region.graph(), region.examples())
                self.bind_others(regions, region, known)
        return self.chain(regions, compiled), Regions(self.layers, len(regions), len(compiled))

    def bind_others(self, regions: list[Region], seen: Region, known: int) -> None:
        """Guards that the inner compiler added on sizes of the region that it saw become guards of others like it."""
        new = torch_internals.guards(self.env)[known:]
        for region in regions:
            names = dict(zip(seen.symbols, region.symbols, strict=True)) if region.kind == seen.kind else {}
            for guard in new:
                own = guard.xreplace(names)
                if own != guard and not torch_internals.holds(self.env, own):
                    raise NoMatch(f"the inner compiler needs {guard}, and {own} is not so")

    def chain(self, regions: list[Region], compiled: dict[Any, Callable]) -> Chain:
        """Values have slots: the graph's inputs, then the results of each region."""
        slot = {n: i for i, n in enumerate(self.placeholders)}
        for region in regions:
            slot |= {n: len(slot) + i for i, n in enumerate(region.results)}
        results = [(slot[n], None) if isinstance(n, Node) else (None, n) for n in outputs(self.graph)]
        last = {slot[n]: step for step, region in enumerate(regions) for n in (*region.inputs, *region.results)}
        kept = {i for i, _ in results}
        steps = []
        for step, region in enumerate(regions):
            dead = [i for i, end in last.items() if end == step and i >= len(self.placeholders) and i not in kept]
            steps.append((compiled[region.kind], picker([slot[n] for n in region.inputs]), dead))
        return Chain(steps, results)


class Region:
    """A stretch of nodes as a graph of its own.

    inputs    the graph's inputs and other regions' results that it reads, numbers first
    body      its nodes, with copies of what computes their sizes
    results   nodes that others read
    symbols   of the sizes of its inputs, in the order in which its signature names them
    """

    def __init__(self, cut: Cut, nodes: list[Node]):
        self.cut, self.inputs, self.body = cut, [], []
        inside = set(nodes)
        done: set[Node] = set()
        for node in nodes:
            self.add(node, inside, done)
        self.results = [n for n in nodes if any(u not in inside for u in n.users)]
        self.bind_sizes()
        self.inputs.sort(key=lambda n: not is_number(cut.values[n]))  # stable
        self.symbols: tuple = ()
        self.kind: Any = None

    def add(self, node: Node, inside: set[Node], done: set[Node]) -> None:
        """The node, behind whatever it needs."""
        if node in done:
            return
        done.add(node)
        if node.op == "placeholder" or node not in inside and node not in self.cut.copied:
            self.inputs.append(node)
            return
        for needed in node.all_input_nodes:
            self.add(needed, inside, done)
        self.body.append(node)

    def bind_sizes(self) -> None:
        """Take more of the graph's inputs where no input has a size that the shapes of others are made of."""
        values = self.cut.values
        own = lambda n: {expression(x) for x in (*getattr(values[n], "shape", ()), values[n]) if is_symbol(x)}
        needed = {s for n in self.inputs for s in symbols(values[n])} - {s for n in self.inputs for s in own(n)}
        for node in sorted(self.cut.placeholders, key=lambda n: not is_number(values[n])):
            if needed & own(node):
                needed -= own(node)
                self.inputs.append(node)
        if needed:
            raise NoMatch(f"no input of the graph says what {min(map(str, needed))} is")

    def examples(self) -> list:
        return [self.cut.examples[n] if n in self.cut.examples else self.cut.values[n].detach() for n in self.inputs]

    def graph(self) -> GraphModule:
        graph, env = Graph(), {}
        for node in self.inputs:
            if node.op == "placeholder":
                env[node] = graph.node_copy(node)
            else:
                env[node] = graph.placeholder(node.name)
                env[node].meta["example_value"] = self.cut.values[node]
        for node in self.body:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[n] for n in self.results))
        graph.lint()
        return GraphModule(self.cut.gm, graph)

    def signature(self) -> tuple:
        """Equal for regions that one compiled graph can serve. Names sizes and memory by their order of appearance."""
        names = {n: f"%{i}" for i, n in enumerate((*self.inputs, *self.body))}
        sizes, places = {}, {}
        shown = lambda n: Name(names[n])

        def size(x) -> str:
            if not isinstance(x, SYMBOLIC):
                return repr(x)
            for s in sorted(expression(x).free_symbols, key=str):
                sizes.setdefault(s, renamed(s, len(sizes)))
            return str(expression(x).xreplace(sizes))

        def tensor(x, node: Node) -> tuple:
            if is_traceable_wrapper_subclass(x):
                parts, context = x.__tensor_flatten__()
                inside = [getattr(x, name) for name in parts]  # a DTensor's device mesh is among them
                inner = tuple(tensor(part, node) if isinstance(part, torch.Tensor) else repr(part) for part in inside)
                return type(x), repr(context), inner, *map(size, (*x.shape, *x.stride())), str(x.dtype), str(x.device)
            begin = x.storage_offset()
            if isinstance(begin, int) and not memory(x) & given_back:
                begin = begin * x.element_size() % ALIGNED
            memories = [places.setdefault(part, len(places)) for part in sorted(memory(x))]
            numbers = tuple(map(size, (*x.shape, "stride", *x.stride(), "from", begin)))
            grad = node.op == "placeholder" and x.requires_grad
            return numbers, str(x.dtype), str(x.device), x.layout, grad, x.is_conj(), x.is_neg(), tuple(memories)

        def given(node: Node) -> tuple:
            x = self.cut.values[node]
            kind = str(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))
            return isinstance(x, torch.nn.Parameter), kind, tensor(x, node) if isinstance(x, torch.Tensor) else size(x)

        given_back = set().union(*(memory(self.cut.values[n]) for n in self.results))
        inputs = tuple(map(given, self.inputs))
        calls = tuple((n.op, called(n.target), repr(torch.fx.map_arg((n.args, n.kwargs), shown))) for n in self.body)
        self.symbols = tuple(sizes)
        return inputs, calls, tuple(names[n] for n in self.results)


def called(target: Any) -> Any:
    """What a node calls. Up to PyTorch 2.12 dynamo makes a function for each use of a DTensor method, and the arguments
    are in its closure: they are the same where code and arguments are."""
    if not isinstance(target, types.FunctionType) or not target.__closure__:
        return target
    held = [held_in(cell.cell_contents) for cell in target.__closure__]
    return target.__code__, held_in(target.__defaults__), *held


def held_in(x: Any) -> Any:
    """A value that compares and hashes by its contents, as far as they do."""
    if isinstance(x, (list, tuple)):
        return type(x), *map(held_in, x)
    if isinstance(x, dict):
        return dict, *((name, held_in(item)) for name, item in x.items())
    return x if isinstance(x, Hashable) else id(x)


def renamed(symbol: sympy.Symbol, number: int) -> sympy.Symbol:
    return sympy.Symbol(f"S{number}", **symbol.assumptions0)


class Name(str):
    """A node's name within a signature."""

    __repr__ = str.__str__


def is_symbol(x) -> bool:
    return isinstance(x, SYMBOLIC) and isinstance(expression(x), sympy.Symbol)


class Chain:
    """Regions called one after the other. Keeps nothing between calls, so threads may call it concurrently.

    steps     (function, its arguments out of all values, slots that nobody reads any more)
    results   (slot, None), or (None, constant)
    """

    def __init__(self, steps: list[tuple[Callable, Callable, list[int]]], results: list[tuple[int | None, Any]]):
        self.steps, self.results = steps, results

    def __call__(self, *inputs) -> Sequence:
        values = list(inputs)
        for function, arguments, dead in self.steps:
            values += function(*arguments(values))
            for i in dead:
                values[i] = None
        return tuple([constant if i is None else values[i] for i, constant in self.results])
