"""Have a graph take and return every cache tensor by itself, where the model keeps several in one tensor.

Before   both = cat([past, stack([k, v])], 3); sdpa(q, both[0], both[1], ...); return both
After    keys = cat([past_0, k], 2); values = cat([past_1, v], 2); sdpa(q, keys, values, ...); return keys, values

This stands before the pipeline, whose passes see a graph of which nobody could tell how its caller keeps its caches.
`Apart` tells the caller (akvq_fx/together.py) which arguments to take apart and which results to put together again.

A tensor that came in packed says how caches lie in it (akvq_fx/packed_bundle.py). Of others the reads tell
(patterns/together.py). Where one of its caches is not packed in the end, the tensor stays as it was, with the reason:
the graph is then rewritten anew without it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from akvq_fx.passes.apart.parts import Parts, plain
from akvq_fx.passes.patterns.axes import permutation
from akvq_fx.passes.patterns.cache_write import is_mutation, why_unread, written_views
from akvq_fx.passes.patterns.nodes import (
    ALLOCATIONS,
    NOOPS,
    NoMatch,
    ancestors,
    argument,
    dimension,
    is_tensor,
    op,
    outputs,
    same_size,
    shape,
    tensors_of_cat,
    value,
)
from akvq_fx.passes.patterns.together import (
    Level,
    index_of,
    is_part_of_each,
    is_slices,
    level_of,
    reads_of,
    sizes_read,
    users_of,
    write_of,
    written_into,
)
from akvq_fx.passes.patterns.unknown_caches import PARTS

GONE = ("stack", "cat", "unbind", "split", "getitem", *NOOPS)  # ops that are there for a whole alone


@dataclass
class Together:
    """One result of the model's, of which the graph returns the parts; None in place of a part: a tensor by itself."""

    how: str
    axis: int
    parts: list[Together | None]

    @property
    def count(self) -> int:
        return sum(1 if part is None else part.count for part in self.parts)


@dataclass
class Apart:
    """A graph that takes and returns single cache tensors.

    inputs   example inputs of `gm`
    bundles  position of an argument of the model's -> how many parts it has
    outputs  for each result of the model's how it is made of those of `gm`; None as it comes
    left     number of a result -> why it stays one tensor
    """

    gm: GraphModule
    inputs: list
    bundles: dict[int, int] = field(default_factory=dict)
    outputs: list[Together | None] = field(default_factory=list)
    left: dict[int, NoMatch] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.bundles) or any(self.outputs)

    def nodes(self, number: int, results: list) -> list:
        """Those of the graph's results that make result `number` of the model's."""
        counts = [1 if made is None else made.count for made in self.outputs]
        return results[sum(counts[:number]) : sum(counts[: number + 1])]


class Stays(Exception):
    """A result that cannot be taken apart: its number, and why."""

    def __init__(self, number: int, miss: NoMatch):
        super().__init__(miss.reason)
        self.number, self.miss = number, miss


def take_apart(gm: GraphModule, example_inputs: list, left: dict[int, NoMatch]) -> Apart:
    """left: results of the model's that stay as they are."""
    left = dict(left)
    while any(map(is_bundle, gm.graph.nodes)) or any(told(node)[1] for node in kept_in(gm, left)):
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        try:
            return Taker(GraphModule(gm, graph), example_inputs, left).apart()
        except Stays as why:
            left[why.number] = why.miss
    return Apart(gm, list(example_inputs), outputs=[None] * len(outputs(gm.graph)), left=left)


def not_packed(state) -> dict[int, NoMatch]:
    """Results that were taken apart in vain: some part of each is not packed after the passes."""
    failed = {}
    for number, together in enumerate(state.apart.outputs):
        packed = state.apart.nodes(number, state.program.outputs)
        if together is not None and not all(packed):
            parts = state.apart.nodes(number, state.results)
            failed[number] = why_not([part for part, how in zip(parts, packed, strict=True) if how is None], state)
    return failed


def why_not(parts: list[Node], state) -> NoMatch:
    """Why these are not packed: what was refused of attention that reads them, else what reads the first of them."""
    of_parts = (refused for refused in state.refused if set(parts) & set(ancestors(refused[3])))
    refused = next(of_parts, None)
    written_out = next(iter(state.written_out.values()), None)
    if refused:
        reason = refused[2]
    elif written_out:
        reason = f"its attention is written out (matmul, softmax), and {written_out.reason}"
    else:
        reason = why_unread(parts[0], {}).reason
    return NoMatch(f"{PARTS}, and {reason}")


def kept_in(gm: GraphModule, left) -> list[Node]:
    """Results that may be several caches."""
    results = [(i, written_into(n)) for i, n in enumerate(outputs(gm.graph)) if is_tensor(n)]
    return [n for i, n in results if i not in left and op(n) != "placeholder"]


def told(node: Node) -> tuple[Node, Level | None]:
    """(the tensor of several caches that a result is, or is some tokens of; how they lie in it, None for another)."""
    while level_of(node) is None and (op(node) in NOOPS or is_slices(node)):
        node = node.args[0]
    return (node, None) if op(node) == "placeholder" else (node, level_of(node))


def is_bundle(node: Node) -> bool:
    return op(node) == "placeholder" and type(value(node)).__name__ == "PackedBundle"


class Taker:
    """One graph that is taken apart in place."""

    def __init__(self, gm: GraphModule, example_inputs: list, left: dict[int, NoMatch]):
        self.gm, self.graph, self.inputs, self.left = gm, gm.graph, list(example_inputs), left
        self.levels: dict[Node, Level] = {}  # of the wholes that were taken apart
        self.parts = Parts(self.graph)
        self.number = 0  # of the result that is being taken apart
        self.buffers: list[tuple[int, Node]] = []  # what results have of buffers that are written in place
        self.dead: list[Node] = []  # nodes that others stand for now, those behind the last

    def apart(self) -> Apart:
        """Raises Stays for a result that cannot be taken apart."""
        self.told = {node: told(node) for node in kept_in(self.gm, self.left)}  # before anything changes
        bundles = self.take_inputs()
        results, made = [], []
        for number, node in enumerate(outputs(self.graph)):
            try:
                self.number = number
                together, parts = (None, [node]) if number in self.left else self.taken(node)
            except NoMatch as miss:
                raise Stays(number, miss) from None
            made.append(together)
            results += parts
        self.graph.output_node().args = (tuple(results),)
        for node in [n for n in reversed(list(self.graph.nodes)) if n in self.parts.own]:
            if node in self.parts.own:
                self.forget(node)
        for node in self.dead:
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            for source in sources:
                if op(source) in GONE:
                    self.forget(source)
        for node in [n for n in reversed(list(self.graph.nodes)) if n in self.levels]:
            if node in self.levels:
                self.forget(node)
        there = set(self.graph.nodes)
        for number, node in self.buffers:
            if node in there:
                why = next((op(user) for user in node.users if op(user) != "output"), "the caller")
                raise Stays(number, NoMatch(f"{PARTS}, which {why} uses as a whole", node))
        for node in self.parts.wholes:
            if node in there and (written := written_views(node)):
                raise NotImplementedError(
                    f"akvq: packed caches in one tensor are written by {op(written[0][0])}, which their parts cannot "
                    "take; pass cache.dequantize() to go on with their tokens as plain numbers"
                )
        self.graph.lint()
        self.gm.recompile()
        return Apart(self.gm, self.inputs, bundles, made, self.left)

    def forget(self, node: Node) -> None:
        """Erase a node that nothing reads any more, and what was there for it alone."""
        if node.op in ("placeholder", "output") or node.users or node.is_impure():
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        self.parts.own.discard(node)
        self.levels.pop(node, None)
        for source in sources:
            if op(source) in GONE:
                self.forget(source)

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def take_inputs(self) -> dict[int, int]:
        bundles, inputs = {}, []
        for position, node in enumerate([n for n in self.graph.nodes if n.op == "placeholder"]):
            if not is_bundle(node):
                inputs.append(self.inputs[position])
                continue
            leaves = value(node).leaves
            bundles[position] = len(leaves)
            inputs += leaves
            whole = self.part_inputs(node, value(node), f"{node.name}_part")
            node.replace_all_uses_with(whole)
            self.graph.erase_node(node)
            self.follow_bundle(whole, value(node))
        self.inputs = inputs
        return bundles

    def part_inputs(self, node: Node, bundle, name: str) -> Node:
        """A node that is the bundle, of placeholders that are put in the place of `node`."""
        parts = []
        for i, part in enumerate(bundle.parts):
            if type(part) is type(bundle):
                parts.append(self.part_inputs(node, part, f"{name}_{i}"))
                continue
            with self.graph.inserting_before(node):
                made = self.graph.placeholder(f"{name}_{i}")
            made.meta["example_value"] = part
            parts.append(made)
        after = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(after):
            target = torch.stack if bundle.how == "stack" else torch.cat
            whole = self.graph.call_function(target, (parts, bundle.axis))
        whole.meta["example_value"] = plain(bundle)
        self.parts.wholes.append(whole)
        return whole

    def follow_bundle(self, whole: Node, bundle) -> None:
        self.follow(whole, Level(bundle.how, bundle.axis, bundle.sizes))
        for node, part in zip(tensors_of_cat(whole), bundle.parts, strict=True):
            if type(part) is type(bundle):
                self.follow_bundle(node, part)

    # ---- results -----------------------------------------------------------------------------------------------------

    def taken(self, node) -> tuple[Together | None, list]:
        """(how a result is made of others, these), (None, [itself]) for one that is no tensor of several caches."""
        node = written_into(node)
        if node not in self.levels and isinstance(node, Node):
            whole, level = self.told.get(node) or told(node)
            if level is not None and may_be_taken(whole):
                self.parts.of(whole, level)  # raises where follow would stop
                self.follow(whole, level)
        level = self.levels.get(node)
        if level is None:
            return None, [node]
        below = [self.taken(part) for part in self.parts.of(node, level)]
        return Together(level.how, level.axis, [made for made, _ in below]), [n for _, nodes in below for n in nodes]

    # ---- wholes ------------------------------------------------------------------------------------------------------

    def follow(self, whole: Node, level: Level) -> None:
        """Put its parts in place of what reads them of a whole, and of all that is made of the whole."""
        if whole in self.levels:
            return
        try:
            parts = self.parts.of(whole, level)
        except NoMatch:
            return  # what is returned of it says so (taken)
        self.levels[whole] = level
        if op(whole) in ALLOCATIONS:
            self.buffers.append((self.number, whole))
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        for user in sorted(users_of(whole), key=order.get):
            if user in self.parts.own or user in parts:
                continue
            reads = reads_of(user, whole, level)
            if reads is not None:
                for read in reads:
                    self.put(read, parts[read.part])
                self.parts.own.add(user)  # unbind and the like
            elif sizes_read(user):
                self.put_size(user, level, parts[0])
            elif is_mutation(user, whole):
                user.replace_all_uses_with(whole)  # its result is the tensor that it writes into
                self.put_write(user, whole, level, parts)
            elif (after := self.level_after(user, whole, level)) is not None:
                self.follow(user, after)

    def put(self, read, part: Node) -> None:
        """The part, or what a read takes of it, in place of what it reads of the whole."""
        node = read.node
        if op(node) == "setitem":
            node.args = (part, read.rest, node.args[2])
        elif read.rest is None:
            node.replace_all_uses_with(part)
            self.parts.own.add(node)
        else:
            node.args = (part, read.rest)

    def put_size(self, user: Node, level: Level, part: Node) -> None:
        """Sizes of a part in place of those of the whole."""
        for node, dim in sizes_read(user):
            inner = level.inner(dim % (len(shape(part)) + (level.how == "stack")))
            if inner is None:
                replace_by_number(node, sum(level.sizes))
                continue
            with self.graph.inserting_before(node):
                size = self.graph.call_method("size", (part, inner))
            size.meta["example_value"] = value(node)
            node.replace_all_uses_with(size)
        self.dead += [node for node, _ in sizes_read(user) if node is not user] + [user]

    def level_after(self, user: Node, whole: Node, level: Level) -> Level | None:
        """How caches lie in what an op makes of the whole; None where it is not another whole."""
        rank = len(shape(whole))
        if len(shape(user)) != rank or not user.args:
            return None
        if op(user) == "cat" and whole in tensors_of_cat(user):
            return level if dimension(user, 1, rank) not in (None, level.axis) else None
        if user.args[0] is not whole:
            return None
        if op(user) in NOOPS or is_part_of_each(user, whole, level):
            return level
        order = permutation(user)
        return None if order is None else Level(level.how, order.index(level.axis), level.sizes)

    def put_write(self, user: Node, whole: Node, level: Level, parts: list[Node]) -> bool:
        """Write tokens to each part, where they are written to all of them at once. False for another write."""
        name, rank = op(user), len(shape(whole))
        if name == "zero_":
            given = [()] * len(parts)
        elif name == "index_copy_" and (dim := dimension(user, 1, rank)) not in (None, level.axis):
            at, source = argument(user, 2, "index"), argument(user, 3, "source")
            given = [(level.inner(dim), at, new) for new in self.written_parts(source, rank, level)]
        elif name == "copy_" and is_tensor(user.args[1]):
            given = [(new,) for new in self.written_parts(user.args[1], rank, level)]
        elif name == "setitem" and (rest := level.rest_of(index_of(user, whole))) is not None:
            given = [(rest, new) for new in self.written_parts(user.args[2], rank, level)]
        elif name == "scatter_" and (write := write_of(user)) is not None and write.place.axis != level.axis:
            name, at = "index_copy_", write.place.at
            given = [(level.inner(write.place.axis), at, new) for new in self.written_parts(write.new, rank, level)]
        else:
            return False
        if not given:
            return False
        with self.graph.inserting_before(user):
            for part, args in zip(parts, given, strict=True):
                if name == "setitem":
                    node = self.graph.call_function(operator.setitem, (part, *args))
                else:
                    node = self.graph.call_method(name, (part, *args))
                node.meta = {**user.meta, "example_value": value(part)}
        self.dead.append(user)
        return True

    def written_parts(self, source, rank: int, level: Level) -> list[Node]:
        """What is written to each part, of a tensor that is written to the whole; [] where it is broadcast."""
        same = (
            is_tensor(source) and len(shape(source)) == rank and same_size(shape(source)[level.axis], sum(level.sizes))
        )
        return self.parts.of(source, level) if same else []


def replace_by_number(node: Node, number: int) -> None:
    for user in list(node.users):
        put = lambda n: number if n is node else n
        user.args, user.kwargs = (torch.fx.node.map_arg(given, put) for given in (user.args, user.kwargs))


def may_be_taken(node: Node) -> bool:
    """Nobody writes into it, but into a buffer that is made here."""
    return op(node) in ALLOCATIONS or not written_views(node)


__all__ = ["Apart", "Together", "not_packed", "take_apart"]
