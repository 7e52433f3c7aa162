"""GraphState: one graph on its way through the pipeline, and the program by which the runtime feeds the rewritten graph."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.cache_write import CacheWrite
from akvq_fx.passes.patterns.nodes import op, shape, value
from akvq_fx.passes.patterns.site import Site
from akvq_fx.report import Capture


@dataclass
class Buffers:
    """A packed tensor inside the graph: one node per field of its layout."""

    layout: Layout
    nodes: list[Node]

    def __getitem__(self, name: str) -> Node:
        return self.nodes[self.layout.fields.index(name)]


@dataclass
class Packed:
    """Graph output: consecutive buffers that become a new PackedKV of `length` tokens.

    classes    name of the node that gave the tokens' classes: outputs that share it hold the same tokens as text
    """

    layout: Layout
    length: Size
    prompt: Size
    static: bool
    owner: tuple[int, ...]
    classes: str


@dataclass
class Appended:
    """Graph output: the PackedKV of input `arg`, longer by the tokens appended."""

    arg: int


@dataclass
class Fold:
    """Weights, by position, that the graph takes as folded copies (akvq_fx/folding.py).

    rows, columns    [H, D] and [Hq, D]: rows of the value weight and columns of the output weight by head and channel
    """

    value_weight: int
    value_bias: int | None
    output_weight: int
    rows: Any
    columns: Any


@dataclass
class Program:
    """How to call the rewritten graph with the arguments of the original one.

    inputs    per placeholder: an argument's position, or (position, number) of a PackedKV's buffer
    outputs   per original output: None for "as it comes", Packed or Appended
    appends   per PackedKV argument that grows: (position, tokens)
    packed    positions of all PackedKV arguments that the graph takes as buffers
    unpacked  positions of PackedKV arguments that the graph takes as plain tensors
    owners    per PackedKV argument: positions of the weights that make its layer's keys and values
    folds     weights that the graph takes as folded copies
    vision    "make": the last output is the vision mask of this call; "take": the last input is, of vision_size tokens
    step      a decode step: every cache takes one new token
    """

    inputs: list[int | tuple[int, int]] = field(default_factory=list)
    outputs: list[None | Packed | Appended] = field(default_factory=list)
    appends: list[tuple[int, Size]] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)
    unpacked: list[int] = field(default_factory=list)
    owners: dict[int, tuple[int, ...]] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    vision: str | None = None
    vision_size: tuple[Size, Size] | None = None
    step: bool = False

    @property
    def inference(self) -> bool:
        """Nothing that the graph gives has a gradient: it writes codes or reads them."""
        return bool(self.packed or self.unpacked or any(output is not None for output in self.outputs))


@dataclass
class Split:
    """A decode graph in two: a prologue that knows how many tokens the caches hold, and a body that does not.

    Numbers below are positions among the rewritten graph's inputs unless they say otherwise.

    prologue   None where nothing is left for it to compute; its inputs are at `feeds`, its first results are `pads`' tensors
    body       takes the inputs at `held`, at `numbers`, at `moved`, then the prologue's tensors, then positions, all contiguous
               but the held ones
    held       tensors read and written where they lie: cache buffers, weights, buffers of modules, whatever the body writes
    numbers    sizes that do not change from step to step
    moved      tensors that lie elsewhere in every step
    pads       per tensor that the prologue makes for the body: None, or the input whose third size its last axis is filled
               up to, with False or -inf
    starts     per row of positions [n, q]: the position of the first of the q new tokens
    count      q
    sizes      (input, dimension) of every size of the body's inputs that is not a constant of the graph
    results    per result of the graph: ("body" or "prologue", which of its results), ("input", position) or ("constant", value)
    """

    prologue: GraphModule | None
    body: GraphModule
    feeds: list[int]
    held: list[int]
    numbers: list[int]
    moved: list[int]
    pads: list[int | None]
    starts: list[Size]
    count: int
    sizes: list[tuple[int, int]]
    results: list[tuple[str, Any]]


class Size:
    """A number known when the graph runs: a constant, or an expression over integer arguments and tensor sizes."""

    def __init__(self, number, sources: dict[sympy.Symbol, tuple[int, int | None]]):
        self.constant = number if isinstance(number, int) else None
        self.argument = None  # position of the integer argument that it is, if it is one
        if self.constant is None:
            expr = number.node.expr
            if expr.is_Integer:
                self.constant = int(expr)
            else:
                self.symbols = sorted(expr.free_symbols, key=str)
                self.sources = [sources[s] for s in self.symbols]
                self.function = compiled(expr, self.symbols)
                self.argument = self.sources[0][0] if expr.is_Symbol and self.sources[0][1] is None else None

    def __call__(self, args) -> int:
        if self.constant is not None:
            return self.constant
        values = [args[i] if dim is None else args[i].shape[dim] for i, dim in self.sources]
        return int(self.function(*values))


def compiled(expr: sympy.Expr, symbols: list[sympy.Symbol]) -> Callable[..., int | float]:
    """A size expression as a Python function of its symbols, printed as dynamo prints its guards: all of torch's functions."""
    names = [f"n{i}" for i in range(len(symbols))]
    renamed = expr.xreplace({s: sympy.Symbol(n, **s.assumptions0) for s, n in zip(symbols, names, strict=True)})
    namespace = {"math": math, "torch": torch, "Where": lambda condition, yes, no: yes if condition else no}
    return eval(f"lambda {', '.join(names)}: {SizePrinter().doprint(renamed)}", namespace)


class SizePrinter(PythonPrinter):
    """As dynamo prints its guards; torch 2.11 takes every exponent for a number."""

    def _print_Pow(self, expr: sympy.Pow) -> str:
        if expr.exp.is_number:
            return super()._print_Pow(expr)
        return f"(({self._print(expr.base)}) ** ({self._print(expr.exp)}))"


def traced(function: Callable) -> Callable:
    """A function of numbers as a call in the graph that its proxies belong to; the last argument, a dtype, is left out."""
    return staticmethod(lambda x, dtype: x.tracer.create_proxy("call_function", function, (x,), {}))


class NodeAnalysis(PythonReferenceAnalysis):
    """Size expressions as nodes: what torch's own analysis asks of numbers and proxies cannot answer."""

    int_truediv = staticmethod(operator.truediv)
    where = staticmethod(torch.sym_ite)
    modular_indexing = staticmethod(lambda x, by, modulus: x // by % modulus)
    trunc_to_int, floor_to_int = traced(math.trunc), traced(math.floor)
    ceil_to_int, round_to_int = traced(math.ceil), traced(round)


class GraphState:
    """A copy of dynamo's graph (editing the original breaks dynamo later), its sites, and the program so far."""

    def __init__(self, gm: GraphModule, config: AKVQConfig, weights):
        """weights: real tensors behind placeholders, by position."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        self.gm = GraphModule(gm, graph)
        self.graph = self.gm.graph
        self.config, self.weights = config, weights
        self.sites: list[Site] = []
        self.refused: list[tuple[str, int, str, Node]] = []  # label, layer, reason, node
        self.dequantized: list[tuple[str, int, str, Node]] = []  # the same for packed caches read through a copy
        self.program = Program()
        self.split: Split | None = None  # the same graph in two, where a CUDA graph may hold the larger part
        self.capture: Capture | None = None  # why there is no split, then what became of it; None in other modes
        self.reports: list = []
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        # what nothing read before we came is there for its effect (in-place writes, vmap levels, grad modes) and stays
        self.effects = {n for n in self.graph.nodes if not n.users}
        self.position = {n: i for i, n in enumerate(self.placeholders)}
        self.buffers: dict[Node, Buffers] = {}  # PackedKV placeholder -> its buffers
        self.made: dict[Node, Buffers] = {}  # the whole of a first/fill/converted cache -> new buffers
        self.shared: dict = {}  # nodes used by several sites: positions, masks of valid tokens, token classes
        self.vision: Node | None = None
        self.classes: dict[Node, Node] = {}  # whole -> its tokens' classes
        self.affine: dict[Node, Node | None] = {}  # whole -> its affine buffer, where keys are centred or balanced
        self.unmatched: dict[Node, Node] = {}  # PackedKV placeholder -> the append of a read that was not matched
        self.appended: dict[Node, Appended] = {}  # returned node -> the PackedKV it stands for
        self.stored_uses: dict[
            Node, list[tuple[Node, int]]
        ] = {}  # whole -> arguments that want its new tokens as stored
        self.query_uses: list[tuple[Site, Node]] = []  # attend nodes, whose queries must be turned as the keys are

    @contextlib.contextmanager
    def before(self, node: Node):
        with self.graph.inserting_before(node):
            yield

    def call(self, target, *args, **kwargs) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def share(self, key, make) -> Node:
        """One node for every site that needs the same thing; the first site in graph order makes it."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def sources(self) -> dict[sympy.Symbol, tuple[int, int | None]]:
        """Where the value of each size symbol can be read: an integer argument, else a tensor argument's size."""
        found: dict = {}
        for i, node in enumerate(self.placeholders):
            seen = value(node)
            if isinstance(seen, torch.SymInt) and seen.node.expr.is_Symbol:
                found[seen.node.expr] = (i, None)
        for i, node in enumerate(self.placeholders):
            for dim, size in enumerate(shape(node)):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, (i, dim))
        return found

    def size(self, number) -> Size:
        return Size(number, self.sources())

    def size_node(self, number):
        """A number as a graph argument: itself, or nodes that compute it from the graph's inputs."""
        if not isinstance(number, torch.SymInt):
            return number
        expr = number.node.expr
        if expr.is_Integer:
            return int(expr)
        key = ("size", expr)
        if key not in self.shared:
            self.shared[key] = self._size_nodes(expr)
        return self.shared[key]

    def _size_nodes(self, expr):
        tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
        environment = {}
        last = self.placeholders[-1]
        following = last.next
        while following.op == "placeholder":
            following = following.next
        with self.graph.inserting_before(following):
            for symbol in expr.free_symbols:
                i, dim = self.sources()[symbol]
                node = self.placeholders[i]
                if dim is not None:
                    node = self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                environment[symbol] = torch.fx.Proxy(node, tracer)
            return sympy_interp(NodeAnalysis, environment, expr).node

    def bind(self, placeholder: Node) -> Buffers:
        """Placeholders for the buffers of a PackedKV input, added after the existing ones in field order."""
        if placeholder in self.buffers:
            return self.buffers[placeholder]
        packed = value(placeholder)
        layout = Layout.parse(packed.layout_text)
        B, H = packed.shape[:2]
        text = packed.text_codes.shape[2] if layout.text_bits else 0
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        nodes = []
        for name in layout.fields:
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"{placeholder.name}_{name}")
            size, dtype = layout.buffer(name, B, H, packed.codes.shape[2], text)
            with packed.codes.fake_mode if hasattr(packed.codes, "fake_mode") else contextlib.nullcontext():
                node.meta["example_value"] = torch.empty(size, dtype=dtype, device=packed.device)
            nodes.append(node)
            last = node
        self.buffers[placeholder] = Buffers(layout, nodes)
        return self.buffers[placeholder]

    def positions(self, write: CacheWrite, x: Node) -> Node:
        """[q] int64: given by a static cache, else the q positions that follow the past."""
        if write.at is not None:
            return write.at
        total, count = shape(write.whole)[2], shape(x)[2]
        device = value(x).device
        if write.kind == "grow" and write.packed:
            key = ("at", str(total), str(count), device)
            make = lambda: self.call(
                torch.arange, self.size_node(total - count), self.size_node(total), device=device, dtype=torch.int64
            )
        else:
            key = ("at", "0", str(count), device)
            make = lambda: self.call(torch.arange, self.size_node(count), device=device, dtype=torch.int64)
        return self.share(key, make)

    def packed_output(self, write: CacheWrite, site: Site) -> Packed:
        """What the runtime needs to wrap the new buffers of a write."""
        length, tokens = shape(write.whole)[2], shape(write.new)[2]
        prompt = self.size(tokens if write.static else length)
        layout, classes = self.made[write.whole].layout, self.classes[write.whole].name
        return Packed(layout, self.size(length), prompt, write.static, self.owner(site), classes)

    def owner(self, site: Site) -> tuple[int, ...]:
        """Positions of the weights that make a site's keys and values; () where they come from somewhere else."""
        found = {self.position[w] for w in site.owner if w in self.position}
        return tuple(sorted(found))

    def capacity(self, write: CacheWrite):
        """Capacity of a new packed cache as a graph argument: the buffer's for a static one, else T rounded up to a step."""
        length = shape(write.whole)[2]
        if write.static:
            return self.size_node(length)
        step = self.config.capacity_step
        return self.size_node((length + step) // step * step)


def is_single_token(write: CacheWrite) -> bool:
    """A decode step: exactly one new token, known when the graph was traced."""
    return write.new is not None and shape(write.new)[2] == 1


__all__ = [
    "Appended",
    "Buffers",
    "Fold",
    "GraphState",
    "Packed",
    "Program",
    "Size",
    "Split",
    "is_single_token",
    "op",
]
