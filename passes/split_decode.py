"""Split a decode graph, so that a CUDA graph can hold its larger part at every length of the cache.

Before   mask = f(T), at = arange(T, T + q), append(.., at), attend(q, key, value, T + q, mask), ...
After    prologue: mask = f(T)     body: append(.., positions[i]), attend(q, key, value, None, padded mask), ...
Needs    sites, exchanges, buffers, made, program   Gives    split, capture
Follows  clean_up                        Leaves   the graph as it was, and state.split; only where steps are captured

A CUDA graph has fixed shapes and no arguments, but the number T of tokens in a growing cache changes in every step.
Sizes of the cache's buffers do not: they change when it grows. So whatever has T in a size or among its arguments goes
into a prologue, with what it is computed from, and the rest is the body. Where the two meet, T is taken out: attention
asks the device how many tokens there are, masks are filled up to the capacity (columns past the end are not looked at),
and positions come from the host. A static cache has no T: the whole graph is its body. Every op on tensors runs exactly
once, in one of the two.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from akvq_fx import torch_internals
from akvq_fx.config import CAPTURED_MODE
from akvq_fx.kernels import attend, cache  # noqa: F401 - registers the ops
from akvq_fx.kernels.layout import CODES
from akvq_fx.passes.patterns.arguments import argument_of, place_of
from akvq_fx.passes.patterns.nodes import NoMatch, is_shared, op, outputs, shape, value
from akvq_fx.passes.patterns.values import (
    expression,
    is_number,
    memory,
    shape_of,
    symbols,
    tensors_in,
    values_of,
    written,
)
from akvq_fx.passes.state import GraphState
from akvq_fx.program import Size, Split
from akvq_fx.report import Capture, PassReport

APPEND, ATTEND = torch.ops.akvq.append.default, torch.ops.akvq.attend.default
APPEND_AT = place_of(APPEND, "at")
ATTEND_LENGTH, ATTEND_MASK, ATTEND_AT = (place_of(ATTEND, name) for name in ("length", "mask", "at"))
# int64 numbers: rows of positions start at multiples of 16 bytes, since kernels are compiled for aligned arguments
ALIGNED = 2
SMALL = 64  # numbers that are copied twice in each step without anybody noticing


def split_decode(state: GraphState) -> PassReport:
    report = PassReport("split_decode")
    program = state.program
    ours = state.sites or program.packed or program.unpacked or program.vision
    if not ours or not is_captured(state):
        return report
    reason = refusal(state)
    try:
        if reason:
            raise NoMatch(reason)
        state.split = Cut(state).split()
    except NoMatch as miss:
        state.capture = Capture(f"{miss.reason} [{miss.node}]" if miss.node is not None else miss.reason)
        report.miss("graph", miss.reason, miss.node)
    else:
        state.capture = Capture()
        report.match("graph")
    return report


def is_captured(state: GraphState) -> bool:
    """CUDA graphs are asked for by name, or made unasked: wherever the graph runs on a CUDA device."""
    if state.config.mode == CAPTURED_MODE:
        return True
    if not state.config.cuda_graphs or state.config.simulated:  # a simulation asks the device how much there is to read
        return False
    tensors = (value(node) for node in state.graph.nodes if node.op == "placeholder")
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in tensors)


def refusal(state: GraphState) -> str:
    """Why no part of the graph can be replayed; "" where the cut decides."""
    if state.program.unpacked:
        return "a static cache goes back to 16 bits in this graph"
    if state.windows.contact:
        return "static windows begin to slide in this graph, which runs once for a cache"
    if state.exchanges:
        return "static buffers are packed behind this graph, which runs once for them"
    if state.made:
        return "a cache is made in this graph, which runs once for it"
    if state.taken_rows:
        return "the batch is smaller than a static cache's, of which the graph takes the first rows"
    if not state.buffers:
        return "no packed cache in this graph"
    counts = [shape(site.key.new)[2] for site in state.sites if site.key.new is not None]
    if any(not isinstance(count, int) for count in counts):
        return "the number of new tokens is not fixed"
    return ""


class Cut:
    """Which nodes of a graph go where. Raises NoMatch where it cannot be cut.

    fixed   symbols of sizes that do not change from step to step
    rows    positions of appended tokens -> row of the body's last input
    pads    mask that grows with the cache -> codes of a cache that it looks at
    cuts    per append and attend: arguments that the body takes in another form, by position
    """

    def __init__(self, state: GraphState):
        self.state, self.graph = state, state.graph
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        self.place = {n: i for i, n in enumerate(self.placeholders)}
        self.buffers = {n for b in state.buffers.values() for n in b.nodes}
        self.fake_mode = value(next(iter(self.buffers))).fake_mode
        self.values = values_of(self.graph, self.fake_mode)
        fixed: list = [self.values[n] for n in self.buffers]
        for site in state.sites:
            if site.key.kind == "read" or site.key.static:  # nothing is appended to it, or its length is its capacity
                fixed += [shape(site.key.whole)[2], shape(site.value.whole)[2]]
        self.fixed = symbols(fixed)
        self.rows: dict[Node, int] = {}
        self.pads: dict[Node, Node] = {}
        self.count = 1
        self.cuts = self.find_cuts()

    def varies(self, node: Node) -> bool:
        """The node gives a number, or a tensor with a size, that changes from step to step."""
        if self.values[node] is None:
            return any(self.varies(i) for i in node.all_input_nodes if is_number(self.values[i]))
        return bool(symbols(self.values[node]) - self.fixed)

    def find_cuts(self) -> dict[Node, dict[int, Node | None]]:
        ends, cuts = {}, {}  # codes -> number of tokens after the appends so far
        for node in self.nodes:
            if node.target is APPEND and self.is_row(node.args[APPEND_AT]):
                at = node.args[APPEND_AT]
                ends[argument_of(node, "cache")[CODES]] = self.end_of(at)
                cuts[node] = {APPEND_AT: at}
            elif node.target is ATTEND:
                cuts[node] = self.cuts_of_attend(node, ends)
        return cuts

    def number(self, given):
        return self.values[given] if isinstance(given, Node) else given

    def end_of(self, at: Node):
        return expression(self.number(at.args[1]))

    def is_row(self, at) -> bool:
        """Positions as the passes write them, arange(first, end): as many in each row as in the first."""
        if not isinstance(at, Node) or at.target is not torch.arange or len(at.args) != 2:
            return False
        if at not in self.rows:
            count = self.values[at].shape[0]
            varying = any(self.varies(i) for i in at.all_input_nodes)
            if not varying or not isinstance(count, int) or self.rows and count != self.count:
                return False
            self.count, self.rows[at] = count, len(self.rows)
        return True

    def cuts_of_attend(self, node: Node, ends: dict[Node, object]) -> dict[int, Node | None]:
        cuts: dict[int, Node | None] = {}
        codes, length, mask = argument_of(node, "key")[CODES], node.args[ATTEND_LENGTH], node.args[ATTEND_MASK]
        at = node.args[ATTEND_AT]
        row = self.is_row(at)
        if isinstance(length, Node) and self.varies(length):
            # attention sees up to its fresh tokens, wherever their append stands; without any, up to what was appended
            end = ends.get(codes) if at is None else self.end_of(at) if row else None
            if end != expression(self.values[length]):
                raise NoMatch("attention sees another number of tokens than the cache holds", node)
            cuts[ATTEND_LENGTH] = None
        if isinstance(mask, Node) and self.varies(mask):
            if ATTEND_LENGTH not in cuts or symbols(list(shape_of(self.values[mask])[:-1])) - self.fixed:
                raise NoMatch("the mask does not grow as the cache does", mask)
            cuts[ATTEND_MASK] = mask
            self.pads.setdefault(mask, codes)
        if row:
            cuts[ATTEND_AT] = at
        return cuts

    def inputs(self, node: Node) -> list[Node]:
        """What a node is computed from, cut arguments left out."""
        found: list[Node] = []
        args = [a for i, a in enumerate(node.args) if i not in self.cuts.get(node, {})]
        torch.fx.map_arg((args, node.kwargs), found.append)
        return found

    def split(self) -> Split:
        varying = {n for n in self.nodes if self.varies(n) or any(map(self.varies, self.inputs(n)))}
        both = {n for n in self.nodes if n not in varying and self.is_free(n)}
        first = self.with_sources(varying) - both
        self.check_memory(first, both)
        results = self.results(first)
        wanted, kept = ([n for n, (where, _) in results if where == name] for name in ("prologue", "body"))
        second = self.live([n for n in self.nodes if n not in first], kept)
        self.check_devices(second)
        crossing = self.crossings(first, second)
        prologue, feeds = self.prologue(self.live([n for n in self.nodes if n in first | both], [*crossing, *wanted]),
                                        [*crossing, *wanted])  # fmt: skip
        held, numbers, moved = self.own_inputs(second)
        body = self.body(second, [*held, *numbers], [*moved, *crossing], kept)
        places = lambda nodes: [self.place[n] for n in nodes]
        return Split(
            prologue,
            body,
            feeds,
            places(held),
            places(numbers),
            places(moved),
            pads=[self.place[self.pads[n]] if n in self.pads else None for n in crossing],
            starts=[self.start(at) for at in self.rows],
            count=self.count,
            sizes=self.sizes([*held, *moved]),
            results=[where for _, where in results],
            states=places(self.states(held, second, kept)),
        )

    def is_free(self, node: Node) -> bool:
        """Nodes that may be in both parts: numbers, and modes that are entered and left."""
        if self.values[node] is None:
            return not any(tensors_in(self.values[i]) for i in node.all_input_nodes)
        return is_number(self.values[node]) and not written(node)

    def with_sources(self, nodes: set[Node]) -> set[Node]:
        """The nodes and everything that they are computed from."""
        found, queue = set(), list(nodes)
        while queue:
            node = queue.pop()
            if node in found or node.op == "placeholder":
                continue
            found.add(node)
            if not is_number(self.values[node]) and self.buffers.intersection(self.inputs(node)):
                raise NoMatch(
                    f"{op(node)} reads the cache, and the size of its result depends on the number of tokens", node
                )
            queue += self.inputs(node)
            if isinstance(self.values[node], (tuple, list)):  # parts can cross over, the whole cannot
                queue += [u for u in node.users if op(u) == "getitem"]
        return found

    def check_memory(self, first: set[Node], both: set[Node]) -> None:
        """The prologue runs before the body: no write may change places with another use of the same memory."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        uses: dict[int, list[Node]] = {}
        for node in self.nodes:
            for part in set().union(*(memory(self.values[n]) for n in (node, *node.all_input_nodes))):
                uses.setdefault(part, []).append(node)
        given = {part for n in self.placeholders for part in memory(self.values[n])}
        for writer in self.nodes:
            early = writer in first
            for part in {part for target in written(writer) for part in memory(self.values[target])}:
                others = [n for n in uses[part] if n not in both and (n in first) != early]
                swapped = [n for n in others if (order[writer] < order[n]) != early]
                if swapped or others and not early and part not in given:
                    raise NoMatch(f"writes in place what {op(others[0])} uses on the other side of the cut", writer)

    def check_devices(self, second: list[Node]) -> None:
        home = self.values[next(iter(self.buffers))].device
        for node in second:
            for n in (node, *self.inputs(node)):
                devices = [tensor.device for tensor in tensors_in(self.values[n]) if not tensor.is_meta]
                away = [str(device) for device in devices if device != home]
                if away:
                    raise NoMatch(f"a CUDA graph lives on one device: the cache is on {home}, this is on {away[0]}", n)

    def live(self, nodes: list[Node], results: list[Node]) -> list[Node]:
        """Those of the nodes that a result or an effect needs, in order."""
        inside, found = set(nodes), set()
        queue = [*results, *(n for n in nodes if n in self.state.effects or n.is_impure() or written(n))]
        while queue:
            node = queue.pop()
            if node in inside and node not in found:
                found.add(node)
                queue += self.inputs(node)
        return [n for n in nodes if n in found]

    def crossings(self, first: set[Node], second: list[Node]) -> list[Node]:
        """Tensors that the prologue makes and the body takes, in graph order."""
        taken = {i for n in second for i in self.inputs(n) if i in first}
        taken |= {self.cuts[n][ATTEND_MASK] for n in second if ATTEND_MASK in self.cuts.get(n, {})}
        for node in taken:
            if not isinstance(self.values[node], torch.Tensor):
                raise NoMatch(f"{op(node)} depends on the number of tokens in the cache and gives no tensor", node)
        return [n for n in self.graph.nodes if n in taken]

    def results(self, first: set[Node]) -> list[tuple[object, tuple[str, object]]]:
        """Each result of the graph, with an entry of Split.results."""
        found, counts = [], {"prologue": 0, "body": 0}
        for node in outputs(self.graph):
            if not isinstance(node, Node):
                found.append((node, ("constant", node)))
            elif node in self.place:
                found.append((node, ("input", self.place[node])))
            else:
                name = "prologue" if node in first else "body"
                found.append((node, (name, counts[name])))
                counts[name] += 1
        return [(n if isinstance(n, Node) else None, where) for n, where in found]

    def own_inputs(self, second: list[Node]) -> tuple[list[Node], list[Node], list[Node]]:
        """The body's own inputs: held in place, numbers, and tensors that lie elsewhere in every step."""
        changed = set().union(*(memory(self.values[target]) for n in second for target in written(n)))
        taken = {i for n in second for i in self.inputs(n)}
        held, numbers, moved = [], [], []
        for node in self.placeholders:
            if node not in taken:
                continue
            shard = is_shared(self.values[node]) and self.is_static(node)  # of a weight: this process has its part
            if is_traceable_wrapper_subclass(self.values[node]) and not shard:
                raise NoMatch(f"an input is a {type(self.values[node]).__name__}, which has no memory of its own", node)
            if is_number(self.values[node]) or torch_internals.is_object(self.values[node]):
                numbers.append(node)
            elif node in self.buffers or changed & memory(self.values[node]) or self.is_static(node):
                held.append(node)
            else:
                moved.append(node)
        return held, numbers, moved

    def states(self, held: list[Node], second: list[Node], results: list[Node]) -> list[Node]:
        """Small tensors of a cache that count its tokens, say: another generation has others, at other addresses.

        Copies of them may stand in for them where nothing else of the graph has the same memory.
        """
        changed = set().union(*(memory(self.values[target]) for n in second for target in written(n)))
        users = Counter(part for n in {*self.placeholders, *results} for part in memory(self.values[n]))
        found = []
        for node in held:
            mine, size = memory(self.values[node]), list(shape_of(self.values[node]))
            alone = all(users[part] == 1 for part in mine)
            small = all(isinstance(n, int) for n in size) and math.prod(size) <= SMALL
            weight = isinstance(self.state.weights.get(self.state.position.get(node, -1)), torch.nn.Parameter)
            if changed & mine and alone and small and not weight and node not in self.buffers:
                found.append(node)
        return found

    def is_static(self, node: Node) -> bool:
        """A weight, or a tensor that dynamo or its owner marked: it stays where it is."""
        example = self.state.weights.get(self.state.position.get(node, -1))
        marked = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        return isinstance(example, torch.nn.Parameter) or marked is not None

    def prologue(self, nodes: list[Node], results: list[Node]) -> tuple[GraphModule | None, list[int]]:
        if not results and not any(map(written, nodes)):
            return None, []
        graph, env = Graph(), {}
        taken = {*results, *(i for n in nodes for i in self.inputs(n))}
        for node in (*(n for n in self.placeholders if n in taken), *nodes):
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[n] for n in results))
        graph.lint()
        return GraphModule(self.state.gm, graph), [i for i, n in enumerate(self.placeholders) if n in taken]

    def body(self, nodes: list[Node], fixed: list[Node], moved: list[Node], results: list[Node]) -> GraphModule:
        graph, env = Graph(), {}
        for node in fixed:
            env[node] = graph.node_copy(node)
        for node in moved:
            seen, size = self.values[node], list(shape_of(self.values[node]))
            if node in self.pads:
                size[-1] = shape(self.pads[node])[2]
            env[node] = self.placeholder(graph, f"{node.name}_moved", size, seen)
        rows = self.placed_rows(graph)
        for node in nodes:
            cuts = self.cuts.get(node, {})
            args = list(torch.fx.map_arg([a for i, a in enumerate(node.args) if i not in cuts], env.__getitem__))
            for i, given in sorted(cuts.items()):
                args.insert(i, rows.get(given) or env.get(given))
            kwargs = torch.fx.map_arg(node.kwargs, env.__getitem__)
            env[node] = graph.create_node(node.op, node.target, tuple(args), kwargs, node.name)
            env[node].meta = dict(node.meta)
        graph.output(tuple(env[n] for n in results))
        graph.lint()
        return GraphModule(self.state.gm, graph)

    def placed_rows(self, graph: Graph) -> dict[Node, Node]:
        """The body's positions, [n, q] and a column where q is odd, as one [q] tensor for each row."""
        if not self.rows:
            return {}
        size = [len(self.rows), -(-self.count // ALIGNED) * ALIGNED]
        positions = self.placeholder(graph, "positions", size, self.values[next(iter(self.rows))])
        made = {}
        for at, row in self.rows.items():
            whole = graph.call_function(torch.select, (positions, 0, row))
            made[at] = graph.call_function(torch.narrow, (whole, 0, 0, self.count))
        return made

    def placeholder(self, graph: Graph, name: str, size: list, like: torch.Tensor) -> Node:
        node = graph.placeholder(name)
        with self.fake_mode:
            node.meta["example_value"] = torch.empty(size, dtype=like.dtype, device=like.device)
        return node

    def start(self, at: Node) -> Size:
        first, sources = self.number(at.args[0]), {}
        for i, node in enumerate(self.placeholders):
            if isinstance(self.values[node], torch.SymInt):
                sources.setdefault(expression(self.values[node]), (i, None))
        for i, node in enumerate(self.placeholders):
            for dim, size in enumerate(shape_of(self.values[node])):
                sources.setdefault(expression(size), (i, dim))
        if symbols(first) - set(sources):
            raise NoMatch("no input tells how many tokens the cache holds", at)
        return Size(first, sources)

    def sizes(self, nodes: list[Node]) -> list[tuple[int, int]]:
        """One place for every size of these inputs that is not a constant."""
        found: dict = {}
        for node in nodes:
            for dim, size in enumerate(shape_of(self.values[node])):
                if not isinstance(size, int):
                    found.setdefault(expression(size), (self.place[node], dim))
        return list(found.values())


split_decode.needs = ("sites", "exchanges", "buffers", "made", "program")
split_decode.gives = ("split", "capture")
split_decode.follows = ("clean_up",)
