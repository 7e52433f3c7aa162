"""GraphState: one graph on its way through the pipeline, and what the passes found out about it.

Fields that passes fill are facts: each pass names those that it reads in its `needs`, and those that it writes in its
`gives`. How the runtime is to call the rewritten graph is collected in the program (akvq_fx/program.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes, Step
from akvq_fx.kernels.layout import SLACK, Layout
from akvq_fx.passes.apart.take_apart import Apart
from akvq_fx.passes.apart.unroll import Windows
from akvq_fx.passes.patterns.attention import layout_only
from akvq_fx.passes.patterns.cache_write import CacheWrite, first_slot
from akvq_fx.passes.patterns.nodes import NoMatch, outputs, settled, shape, value
from akvq_fx.passes.patterns.site import Site
from akvq_fx.program import Appended, Packed, Program, Size, Split
from akvq_fx.report import Capture
from akvq_fx.torch_internals import hint


@dataclass
class Original:
    """What a model wrote out where a call stands for it that no compiler should get: it stays, read by nothing, until
    attend_packed drops either of them.

    nodes   from the first product to the second, the last of which is what the model goes on with
    result  the call's, with axes and dtype as the model's
    dying   nodes, and what is read by them alone
    """

    nodes: list[Node]
    result: Node
    dying: set[Node]


@dataclass
class View:
    """A static buffer of the caller's that a node stands for: its placeholder, its axes, and this step's write."""

    buffer: Node
    axes: CacheAxes
    write: CacheWrite


@dataclass
class Buffers:
    """A packed tensor inside the graph: one node per field of its layout."""

    layout: Layout
    nodes: list[Node]

    def __getitem__(self, name: str) -> Node:
        return self.nodes[self.layout.fields.index(name)]


def traced(function: Callable) -> Callable:
    """function(x) as a call in the graph of the proxy x; the dtype that torch's analysis passes is dropped."""
    return staticmethod(lambda x, dtype: x.tracer.create_proxy("call_function", function, (x,), {}))


class NodeAnalysis(PythonReferenceAnalysis):
    """Turns size expressions into nodes, with other functions where torch's own analysis needs numbers."""

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
        # packed placeholder or returned node that the graph has as [B, H, T, D] -> the caller's axes of that cache
        self.kept_axes: dict[Node, CacheAxes] = {}
        self.unexchanged: dict[Node, NoMatch] = {}  # a cache of other axes -> why it stays as it is
        self.exchanged: dict[Node, tuple[Node, CacheAxes]] = {}  # a cache as the model has it -> as the graph does
        self.written_out: dict[Node, NoMatch] = {}  # softmax -> why attention around it was not made a call
        self.originals: dict[Node, Original] = {}  # call -> what it stands for
        self.apart = Apart(gm, [])  # how the model keeps caches together that the graph has one by one
        self.windows = Windows(gm)  # those that the model overwrites as a whole and the graph returns
        self.results = outputs(self.graph)  # before any pass
        self.sites: list[Site] = []
        self.exchanges: list[Site] = []  # over buffers of the caller's, which the runtime packs behind the graph
        self.refused: list[tuple[str, int, str, Node]] = []  # label, layer, reason, node
        self.dequantized: list[tuple[str, int, str, Node]] = []  # the same for packed caches read through a copy
        self.program = Program()
        self.split: Split | None = None  # the same graph in two, where a CUDA graph may hold the larger part
        self.capture: Capture | None = None  # why there is no split, then what became of it; None in other modes
        self.reports: list = []
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.last_input = self.placeholders[-1] if self.placeholders else None  # placeholders that passes add follow it
        # dynamo's nodes without readers are there for their effect (in-place writes, vmap levels, grad modes) and stay;
        # a view that nobody reads has none
        self.effects = {n for n in self.graph.nodes if not n.users and not layout_only(n)}
        self.position = {n: i for i, n in enumerate(self.placeholders)}
        self.arguments = {n: shape(n) for n in self.placeholders}  # as they come in, whatever a node stands for later
        self.views: dict[Node, View] = {}  # what attention reads -> the caller's plain buffer behind it
        self.taken_rows: dict[Node, object] = {}  # packed placeholder -> how many of its rows it stands for
        self.buffers: dict[Node, Buffers] = {}  # PackedKV placeholder -> its buffers
        self.made: dict[Node, Buffers] = {}  # the whole of a first/fill/converted cache -> new buffers
        self.shared: dict = {}  # nodes used by several sites: positions, masks of valid tokens, token classes
        self.first_slots: dict[Node, object] = {}  # PackedKV placeholder -> slot of its first token
        self.dropped: dict[Node, Node] = {}  # some of them -> placeholder of the tensor whose size tells this slot
        self.vision: Node | None = None
        self.classes: dict[Node, Node] = {}  # whole -> its tokens' classes
        self.affine: dict[Node, Node | None] = {}  # whole -> its affine buffer, where keys are centred or balanced
        self.unmatched: dict[Node, Node] = {}  # PackedKV placeholder -> the append of a read that was not matched
        self.appended: dict[Node, Appended] = {}  # returned node -> the PackedKV it stands for
        # whole -> arguments (node, position) that take its new tokens as stored, so rotated
        self.stored_uses: dict[Node, list[tuple[Node, int]]] = {}
        self.query_uses: list[tuple[Site, Node]] = []  # attend nodes, whose queries must be rotated as the keys are

    @property
    def begins_caches(self) -> bool:
        """It runs once for a cache: a prompt, or what packs buffers of the caller's."""
        made = all(site.key.kind in ("first", "fill") for site in self.sites)
        return bool(self.sites or self.exchanges) and made

    @contextlib.contextmanager
    def before(self, node: Node):
        with self.graph.inserting_before(node):
            yield

    def call(self, target, *args, **kwargs) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def moved(self, node: Node, steps: list[Step], seen) -> Node:
        """The node after methods that move elements; `seen` is its value, plain where it stands for a packed cache."""
        for method, *arguments in steps:
            node = self.graph.call_method(method, (node, *arguments))
            with seen.fake_mode:
                seen = getattr(seen, method)(*arguments)
            node.meta["example_value"] = seen
        return node

    def fake(self, like, size: tuple, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of this size, fake where `like` is, which may be packed."""
        with getattr(getattr(like, "codes", like), "fake_mode", contextlib.nullcontext()):
            return torch.empty(size, dtype=like.dtype if dtype is None else dtype, device=like.device)

    def forget(self, *nodes: Node) -> None:
        """Erase nodes that nothing reads, and what was there for them alone."""
        queue, gone = list(nodes), set()
        while queue:
            node = queue.pop()
            if node in gone or node.users or node in self.effects or node.is_impure():
                continue
            queue += node.all_input_nodes
            self.graph.erase_node(node)
            gone.add(node)
        self.shared = {key: made for key, made in self.shared.items() if made not in gone}

    def share(self, key, make) -> Node:
        """One node for every site that needs the same thing; the first site in graph order makes it."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def buffer_of(self, node: Node) -> Node:
        """The placeholder of a plain static buffer that a node stands for, else the node itself."""
        return self.views[node].buffer if node in self.views else node

    def outer_shape(self, placeholder: Node) -> tuple:
        """The shape of the argument that the runtime gets, whose axes may be the model's own."""
        return tuple(map(settled, self.arguments[placeholder]))

    @functools.cached_property
    def sources(self) -> dict[sympy.Symbol, tuple[int, int | None]]:
        """Where the value of each size symbol can be read: an integer argument, else a tensor argument's size."""
        found: dict = {}
        for i, node in enumerate(self.placeholders):
            seen = value(node)
            if isinstance(seen, torch.SymInt) and seen.node.expr.is_Symbol:
                found[seen.node.expr] = (i, None)
        for i, node in enumerate(self.placeholders):
            for dim, size in enumerate(self.outer_shape(node)):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, (i, dim))
        return found

    def size(self, number) -> Size:
        return Size(number, self.sources)

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
            told = {value(node).shape[0].node.expr: node for node in self.dropped.values()}
            for symbol in expr.free_symbols:
                i, dim = (None, 0) if symbol in told else self.sources[symbol]
                node = told[symbol] if symbol in told else self.placeholders[i]
                if dim is not None:
                    node = self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                environment[symbol] = torch.fx.Proxy(node, tracer)
            return sympy_interp(NodeAnalysis, environment, expr).node

    def placeholder(self, name: str, example) -> Node:
        """A new input of the graph, behind all others."""
        with self.graph.inserting_after(self.last_input):
            node = self.last_input = self.graph.placeholder(name)
        node.meta["example_value"] = example
        return node

    def bind(self, placeholder: Node) -> Buffers:
        """Placeholders for the buffers of a PackedKV input, added after the existing ones in field order."""
        if placeholder in self.buffers:
            return self.buffers[placeholder]
        packed = value(placeholder)
        layout = Layout.parse(packed.layout_text)
        B, H = packed.shape[:2]
        text = packed.text_codes.shape[2] if layout.text_bits else 0
        blocks = packed.means.shape[2] if layout.moved else None
        nodes = []
        for name in layout.fields:
            size, dtype = layout.buffer(name, B, H, packed.codes.shape[2], text, blocks)
            nodes.append(self.placeholder(f"{placeholder.name}_{name}", self.fake(packed, size, dtype)))
        self.buffers[placeholder] = Buffers(layout, nodes)
        return self.buffers[placeholder]

    def first_slot(self, past: Node):
        """The slot of a packed cache's first token, a number or a symbol.

        One symbol for all caches that agree when this is compiled, so that they share positions and masks: a guard.
        """
        if past not in self.first_slots:
            first = first_slot(past)
            if isinstance(first, torch.SymInt):
                same = lambda known: hint(known) == hint(first) and bool(known == first)
                symbols = [k for k in self.first_slots.values() if isinstance(k, torch.SymInt)]
                known = next(filter(same, symbols), None)
                if known is None:
                    self.dropped[past] = self.placeholder(f"{past.name}_dropped", value(past).dropped)
                first = first if known is None else known
            self.first_slots[past] = first
        return self.first_slots[past]

    def positions(self, write: CacheWrite, x: Node) -> Node:
        """[q] int64: given by a static cache, else the q positions that follow the past."""
        if write.at is not None:
            return write.at
        total, count = shape(write.whole)[2], shape(x)[2]
        if write.packed:
            total = total + self.first_slot(write.past)
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
        length, tokens = shape(write.returned)[2], shape(write.new)[2]
        prompt = self.size(tokens if write.static else length)
        layout, classes = self.made[write.whole].layout, self.classes[write.whole].name
        axes, slides = self.kept_axes.get(write.whole, STANDARD), write.kept is not None
        return Packed(layout, self.size(length), prompt, write.static, self.owner(site), classes, axes, slides)

    def owner(self, site: Site) -> tuple[int, ...]:
        """Positions of the weights that make a site's keys and values; () where they come from somewhere else."""
        found = {self.position[w] for w in site.owner if w in self.position}
        return tuple(sorted(found))

    def capacity(self, write: CacheWrite):
        """Capacity of a new packed cache, as a graph argument: a static buffer's, else T rounded up to a step."""
        length = shape(write.returned)[2]
        if write.static:
            return self.size_node(length)
        if write.kept is not None:
            length = length + SLACK
        step = self.config.capacity_step
        return self.size_node((length + step) // step * step)


def is_single_token(write: CacheWrite) -> bool:
    """A decode step: exactly one new token, known when the graph was traced."""
    return write.new is not None and shape(write.new)[2] == 1
