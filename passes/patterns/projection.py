"""Linear projections around attention: whose weight makes a tensor, which op takes the output."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from akvq_fx.passes.patterns.attention import layout_only
from akvq_fx.passes.patterns.nodes import NoMatch, ancestors, argument, op, shape

WEIGHT_ARGUMENT = {"linear": 1, "addmm": 2, "matmul": 1, "mm": 1}


@dataclass
class Chain:
    """A linear op and the layout-only ops between it and attention, in execution order."""

    linear: Node
    weight: Node
    bias: Node | None
    moves: list[Node]


def weight_of(node: Node) -> Node | None:
    """The 2-d parameter placeholder that a linear-like op multiplies by, perhaps transposed, or this process's part
    of it; None for other ops."""
    position = WEIGHT_ARGUMENT.get(op(node))
    if position is None or len(node.args) <= position:
        return None
    leaf = node.args[position]
    while op(leaf) in ("getattr", "t", "transpose", "to", "to_local"):
        leaf = leaf.args[0]
    return leaf if op(leaf) in ("placeholder", "get_attr") and len(shape(leaf)) == 2 else None


def weight_behind(node: Node | None) -> Node | None:
    """The parameter of the nearest projection that node is computed from."""
    if node is None:
        return None
    return next((w for w in map(weight_of, ancestors(node)) if w is not None), None)


def weights_behind(node: Node, source: Node | None) -> list[Node]:
    """Parameters and buffers that node is computed from, back to the layer's input `source`, norms and adapters too.

    Where no source is known, only the weights of the nearest linear ops.
    """
    found, seen, queue = [], {source}, [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if op(current) in ("placeholder", "get_attr"):
            found.append(current)
        elif source is None and weight_of(current) is not None:
            queue.extend(n for n in (weight_of(current), argument(current, 2, "bias")) if isinstance(n, Node))
        else:
            queue.extend(current.all_input_nodes)
    return found


def chain_from_linear(node: Node) -> Chain:
    """v <- layout-only ops <- linear. Raises NoMatch naming the op in the way."""
    moves = []
    current = node
    while layout_only(current):
        moves.insert(0, current)
        current = current.args[0]
        if not isinstance(current, Node):
            raise NoMatch("the values come from a list", node)
    return Chain(*dense_linear(current, "the values come through"), moves)


def chain_to_linear(node: Node) -> Chain:
    """attention output -> layout-only ops -> linear, and to nothing else. Raises NoMatch naming the op in the way."""
    moves = []
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1:
            raise NoMatch(f"the attention output is used {len(users)} times before the output projection", current)
        current = users[0]
        if op(current) in WEIGHT_ARGUMENT or not layout_only(current):
            break
        moves.append(current)
    return Chain(*dense_linear(current, "the attention output goes through"), moves)


def dense_linear(node: Node, where: str) -> tuple[Node, Node, Node | None]:
    """(linear, weight, bias) where both are parameters that nothing else in the graph uses."""
    if op(node) != "linear":
        raise NoMatch(f"{where} {op(node)}", node)
    weight, bias = sharded(node.args[1]), sharded(argument(node, 2, "bias"))
    for name, leaf in (("weight", weight), ("bias", bias)):
        if leaf is not None and op(leaf) != "placeholder":
            raise NoMatch(f"{where} a linear whose {name} is computed in the graph", node)
        if leaf is not None and len(leaf.users) > 1:
            raise NoMatch(f"{where} a linear whose {name} is used elsewhere too", leaf)
    return node, weight, bias


def sharded(leaf):
    """The parameter that several processes share, whose part here is what the node is; other nodes as they are."""
    return leaf.args[0] if op(leaf) == "to_local" and len(leaf.users) == 1 else leaf
