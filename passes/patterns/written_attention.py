"""Attention that a model writes out, in whatever spelling.

    scores = product(q, k)           PRODUCTS   matmul, @, bmm, baddbmm, einsum, in any order of operands and axes
    scores = step(scores)            SCORES     scale, softcap, masks, biases, casts, reshapes, any number; then sinks
    weights = softmax(scores)
    weights = step(weights)          WEIGHTS    dropout that is off, casts, reshapes; what sinks took is dropped
    out = product(weights, v)        PRODUCTS

A new spelling is one function here, declared for the op that it is about. Everything reads; passes/rewrite_attention.py
edits. Axes are told apart by what the products do with them (patterns/axes.py), not by their place: the cached tokens
are those that softmax goes over, the head's channels those that the first product sums over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from akvq_fx.passes.patterns.axes import CASTS, Axes, Axis, after, before, flat, new_axes
from akvq_fx.passes.patterns.cache_write import is_mutation
from akvq_fx.passes.patterns.nodes import (
    NoMatch,
    argument,
    dimension,
    is_returned,
    is_tensor,
    op,
    same_size,
    shape,
    tensors_of_cat,
    value,
)

LOWEST = -1e4  # a masked score from here down has no weight beside one that is not masked


@dataclass
class Product:
    """left x right -> the node. A term names each axis by a letter, None where it is broadcast; equal letters are one
    axis. row: the letter of the left's own axis in a matrix product, None in an einsum, which has no such thing."""

    left: Node
    right: Node
    terms: tuple[tuple, tuple, tuple]
    row: tuple = (None, None)
    scale: float = 1.0
    bias: Node | None = None

    def axes(self, known: dict[Node, Axes]) -> tuple[Axes, Axes, Axes]:
        """Axes of left, right and the result; those of operands in `known` are given."""
        letters: dict = {}
        for tensor, term in zip((self.left, self.right), self.terms, strict=False):
            groups = known.get(tensor) or new_axes(tensor)
            for letter, group in zip(term, groups, strict=True):
                if letter is not None and (letter not in letters or tensor in known):
                    letters[letter] = group
        return tuple(tuple(() if letter is None else letters[letter] for letter in term) for term in self.terms)

    def summed(self, ends: list[Axes]) -> list[tuple]:
        """What the product sums over: the axes that both operands have, and the result has not."""
        left, right, out = self.terms
        return [ends[0][i] for i, x in enumerate(left) if x is not None and x in right and x not in out]

    def rows(self, operand: Node, axes: Axes) -> tuple[Axis, ...]:
        """The operand's own axis in a matrix product; () in an einsum."""
        side = 0 if operand is self.left else 1
        return flat(axes[self.terms[side].index(self.row[side])]) if self.row[side] is not None else ()


@dataclass
class Sinks:
    """One more score of each head, beside those of the cached tokens in softmax, and dropped after it.

    node, axes  what holds them, and its axes as those of scores; the empty group along the cached tokens
    beside      the axis of scores along which it stands
    first       it stands before the scores
    dropped     the slice of the weights without it
    """

    node: Node
    axes: Axes
    beside: tuple
    first: bool
    dropped: Node | None = None

    def drops(self, node: Node, axes: Axes, cached: tuple) -> bool:
        """Whether the node is weights[..., :-1], or [..., 1:] where the sink is first."""
        if op(node) != "getitem":
            return False
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if index.count(Ellipsis) == 1:
            place = index.index(Ellipsis)
            whole = [slice(None)] * (len(axes) - len(index) + 1)
            index = (*index[:place], *whole, *index[place + 1 :])
        index = (*index, *[slice(None)] * (len(axes) - len(index)))
        part = slice(1, None) if self.first else slice(None, -1)
        return index == tuple(part if flat(group) == cached else slice(None) for group in axes)


@dataclass
class Scores:
    """What happens to scores on their way to softmax: s -> scale * factors * s + mask.

    With a softcap: s -> scale * tanh(inside * factors * s) + mask, where inside is no longer None.
    """

    axes: Axes
    scale: float = 1.0
    inside: float | None = None
    factors: list[tuple[str, Node]] = field(default_factory=list)  # "mul" or "div" by a tensor of one element
    mask: list[tuple] = field(default_factory=list)  # ("add", x, axes, sign), ("fill", where, axes, x, negated), ...
    sinks: Sinks | None = None

    def multiply(self, by, how: str, node: Node) -> None:
        """Raises NoMatch for a tensor of more than one element."""
        self.ended(node)
        number = number_of(by)
        if number is not None:
            self.scale = self.scale * number if how == "mul" else self.scale / number
        elif not is_tensor(by) or any(not same_size(size, 1) for size in shape(by)):
            raise NoMatch(f"its scores are multiplied by a tensor of {list(shape(by))}, which is no scale", node)
        elif self.inside is not None:
            raise NoMatch("what its scores are multiplied by after tanh (softcap) is no plain number", node)
        else:
            self.factors.append((how, by))
        if self.mask:
            self.mask.append((how, by if number is None else number))

    def ended(self, node: Node) -> None:
        """Raises NoMatch where sinks stand beside the scores: what comes then would change them too."""
        if self.sinks is not None:
            raise NoMatch(f"its scores go through {op(node)} after a sink was put beside them", node)

    def cap(self, node: Node) -> None:
        self.ended(node)
        if self.mask or self.inside is not None:
            raise NoMatch("its scores go through tanh (softcap) after a mask, or twice", node)
        self.inside, self.scale = self.scale, 1.0

    @property
    def softcap(self) -> float:
        """c of c * tanh(s / c), 0.0 for none."""
        return 0.0 if self.inside is None else abs(self.scale)

    @property
    def scale_within(self) -> float:
        """What scores are multiplied by before all else: b * tanh(a * s) is c * tanh(a * b * s / c) with c = |b|."""
        return self.scale if self.inside is None else self.inside * self.scale

    def add(self, x, sign: int, node: Node) -> None:
        if number_of(x) is None:  # the same number for all scores changes no weight
            self.ended(node)
            self.mask.append(("add", x, self.axes, sign))

    def fill(self, where: Node, x, negated: bool, node: Node) -> None:
        """x takes the place of scores where `where` is true, or with negated where it is false.

        Raises NoMatch where x may have weight.
        """
        self.ended(node)
        number = number_of(x)
        if number is None or number > LOWEST:
            raise NoMatch(f"masked scores are set to {x}, accepted: a number up to {LOWEST:g}", node)
        if not is_tensor(where) or value(where).dtype != torch.bool:
            raise NoMatch("scores are masked by something that is not bool", node)
        self.mask.append(("fill", where, self.axes, number, negated))


@dataclass
class Written:
    """One attention: its nodes from the first product to the second, in graph order, and the axes of all ends.

    The roles of axes, groups of `Axis`: batch, heads (of keys), repeats (query heads for each of these), tokens (of
    queries), cached, channels (of keys) and value_channels.
    """

    softmax: Node
    nodes: list[Node]
    query: Node
    key: Node
    value: Node
    query_axes: Axes
    key_axes: Axes
    value_axes: Axes
    out_axes: Axes
    scores: Scores
    batch: tuple
    heads: tuple
    repeats: tuple
    tokens: tuple
    cached: tuple
    channels: tuple
    value_channels: tuple

    @property
    def out(self) -> Node:
        return self.nodes[-1]


Step = Callable[[Scores, Node, Node], None]
PRODUCTS: dict[str, Callable[[Node], Product | None]] = {}
SCORES: dict[str, Step] = {}
WEIGHTS: dict[str, Callable[[Node], None]] = {}


def declare(table: dict, *ops: str):
    """The decorated function says what these ops do."""

    def put(function):
        table.update(dict.fromkeys(ops, function))
        return function

    return put


# products


@declare(PRODUCTS, "matmul", "bmm", "__matmul__")
def matmul(node: Node) -> Product | None:
    """a @ b: the last axis of a against the last but one of b, axes before these in pairs."""
    return matrix_product(argument(node, 0, "input"), argument(node, 1, "mat2" if op(node) == "bmm" else "other"))


@declare(PRODUCTS, "baddbmm")
def baddbmm(node: Node) -> Product | None:
    """beta * bias + alpha * (a @ b)"""
    bias, a, b = argument(node, 0, "input"), argument(node, 1, "batch1"), argument(node, 2, "batch2")
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = matrix_product(a, b)
    if product is None or not isinstance(alpha, (int, float)) or beta not in (0, 1):
        return None
    product.scale, product.bias = float(alpha), bias if beta else None
    return product


def matrix_product(a, b) -> Product | None:
    left, right = shape(a), shape(b)
    if len(left) < 3 or len(right) < 3:
        return None
    rank = max(len(left), len(right)) - 2
    full = [largest(left[:-2], right[:-2], i - rank) for i in range(rank)]
    batch = tuple(range(rank))
    term = lambda sizes: tuple(
        i if same_size(size, full[i]) else None for i, size in enumerate(sizes[:-2], rank - len(sizes) + 2)
    )
    return Product(a, b, ((*term(left), "i", "c"), (*term(right), "c", "j"), (*batch, "i", "j")), ("i", "j"))


def largest(left: tuple, right: tuple, i: int):
    """Size i, counted from the end, of two shapes broadcast together."""
    sizes = [sizes[i] for sizes in (left, right) if -i <= len(sizes)]
    return next((size for size in sizes if not same_size(size, 1)), 1)


@declare(PRODUCTS, "einsum")
def einsum(node: Node) -> Product | None:
    """einsum("bhqd,bhkd->bhqk", a, b)"""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(len(shape(x)) >= 3 for x in operands):
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = [spelled_out(term, len(shape(x))) for term, x in zip(given.split(","), operands, strict=True)]
    if not arrow or any(len(set(term)) != len(term) for term in terms):
        return None
    widths = max((len(shape(x)) - len(t.replace("...", "")) for t, x in zip(given.split(","), operands, strict=True)))
    out = spelled_out(result, widths + len(result.replace("...", "")))
    a, b = operands
    if any(letter not in out and not (letter in terms[0] and letter in terms[1]) for letter in (*terms[0], *terms[1])):
        return None  # an axis of one operand is summed
    sizes: dict = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, size in zip(term, shape(x), strict=True):
            if not same_size(size, 1) or letter not in sizes:
                sizes[letter] = size
    terms = [
        tuple(letter if same_size(size, sizes[letter]) else None for letter, size in zip(term, shape(x), strict=True))
        for term, x in zip(terms, operands, strict=True)
    ]
    return Product(a, b, (*terms, out))


def spelled_out(term: str, rank: int) -> tuple:
    """Letters of a term, "..." as numbers counted from the end."""
    head, dots, tail = term.partition("...")
    missing = rank - len(head) - len(tail) if dots else 0
    return (*head, *range(-missing, 0), *tail)


# steps between the first product and softmax


@declare(SCORES, "mul", "imul", "mul_", "multiply")
def multiplied(scores: Scores, node: Node, source: Node) -> None:
    """scores * x, x * scores"""
    scores.multiply(other(node, source), "mul", node)


@declare(SCORES, "div", "truediv", "itruediv", "div_", "true_divide")
def divided_by(scores: Scores, node: Node, source: Node) -> None:
    """scores / x"""
    if node.args[0] is not source or node.kwargs.get("rounding_mode"):
        raise NoMatch("its scores divide something", node)
    scores.multiply(other(node, source), "div", node)


@declare(SCORES, "tanh", "tanh_")
def capped(scores: Scores, node: Node, source: Node) -> None:
    """torch.tanh(scores), between a division and a multiplication by the softcap"""
    scores.cap(node)


@declare(SCORES, "add", "iadd", "add_")
def added(scores: Scores, node: Node, source: Node) -> None:
    """scores + x, x + scores"""
    if node.kwargs.get("alpha", 1) != 1:
        raise NoMatch("its scores are added to with a factor", node)
    scores.add(other(node, source), 1, node)


@declare(SCORES, "sub", "isub", "sub_")
def subtracted(scores: Scores, node: Node, source: Node) -> None:
    """scores - x; their own maximum is no change to softmax"""
    if node.args[0] is not source or node.kwargs.get("alpha", 1) != 1:
        raise NoMatch("its scores are subtracted from something", node)
    if not is_maximum(other(node, source), source):
        scores.add(other(node, source), -1, node)


@declare(SCORES, "masked_fill", "masked_fill_")
def filled(scores: Scores, node: Node, source: Node) -> None:
    """scores.masked_fill(mask, -inf)"""
    if node.args[0] is not source:
        raise NoMatch("its scores are written into something", node)
    scores.fill(argument(node, 1, "mask"), argument(node, 2, "value"), False, node)


@declare(SCORES, "where")
def chosen(scores: Scores, node: Node, source: Node) -> None:
    """torch.where(mask, scores, -inf), torch.where(mask, -inf, scores)"""
    first, second, third = (argument(node, i, name) for i, name in enumerate(("condition", "input", "other")))
    if node.op == "call_method":  # scores.where(mask, -inf)
        first, second = second, first
    if second is source:
        scores.fill(first, third, True, node)
    else:
        scores.fill(first, second, False, node)


@declare(SCORES, "cat")
def joined(scores: Scores, node: Node, source: Node) -> None:
    """torch.cat([scores, sinks], -1)"""
    parts, dim = tensors_of_cat(node), dimension(node, 1, len(scores.axes))
    scores.ended(node)
    if len(parts) != 2 or dim is None or parts.count(source) != 1:
        raise NoMatch("more than a sink stands beside its scores in its softmax", node)
    first = parts[1] is source
    sink = parts[0 if first else 1]
    if not same_size(shape(sink)[dim], 1):
        raise NoMatch(f"{shape(sink)[dim]} scores stand beside its own in its softmax, accepted: one (a sink)", node)
    scores.sinks = Sinks(sink, (*scores.axes[:dim], (), *scores.axes[dim + 1 :]), scores.axes[dim], first)


@declare(SCORES, *CASTS, "contiguous", "clone", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
@declare(SCORES, "transpose", "permute", "mT", "getattr", "getitem")
def moved(scores: Scores, node: Node, source: Node) -> None:
    """scores.float(), scores.view(...): only their axes change"""
    scores.axes = moved_axes(node, source, scores.axes)


# steps between softmax and the second product


@declare(WEIGHTS, "dropout", "dropout_")
def dropped(node: Node) -> None:
    """F.dropout(weights, p, training), where it is off"""
    p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if isinstance(p, Node) or isinstance(training, Node):
        raise NoMatch("attention dropout is computed in the graph", node)
    if p and training:
        raise NoMatch(f"attention dropout is on (p={p})", node)


@declare(WEIGHTS, *CASTS, "contiguous", "clone", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
@declare(WEIGHTS, "transpose", "permute", "mT", "getattr", "getitem")
def kept(node: Node) -> None:
    """weights.to(dtype), weights.view(...): only their axes change"""


# reading


def softmaxes(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if op(n) in ("softmax", "_softmax") and len(shape(n)) >= 3]


def written_attention(softmax: Node) -> Written | None:
    """The attention around a softmax; None where no product of two activations leads to it.

    Raises NoMatch for one that is not, or not provably, what scaled_dot_product_attention computes.
    """
    miss = None
    for chain in chains(softmax):
        try:
            return read(chain, softmax)
        except NoMatch as why:
            miss = miss or why
    if miss is not None:
        raise miss
    return None


def chains(softmax: Node, reach: int = 12) -> Iterator[list[Node]]:
    """Every way from a product down to softmax, over ops that leave a tensor of scores."""
    queue, seen = [[softmax]], {softmax}
    while queue:
        chain = queue.pop(0)
        node = chain[0]
        if op(node) in PRODUCTS and PRODUCTS[op(node)](node) is not None:
            yield chain
        elif len(chain) <= reach and (node is softmax or op(node) in SCORES):
            sources = [x for x in node.all_input_nodes if len(shape(x)) >= 3 and x not in seen]
            seen.update(sources)
            queue += [[x, *chain] for x in sources]


def read(chain: list[Node], softmax: Node) -> Written:
    """The attention whose scores take this way from their product to softmax."""
    product, scores, nodes = PRODUCTS[op(chain[0])](chain[0]), Scores(()), []
    *ends, scores.axes = product.axes({})
    read_scores(product, scores, chain, nodes)
    dim = argument(softmax, 1, "dim")
    if not isinstance(dim, int):
        raise NoMatch("softmax goes over an axis that is not known", softmax)
    cached = flat(scores.axes[dim])
    weights, weight_axes = read_weights(softmax, scores, cached, nodes)
    values, value_axes, out_axes = values_of(nodes[-1], weights, weight_axes, cached)
    holds = [any(axis in cached for group in axes for axis in flat(group)) for axes in ends]
    if holds[0] == holds[1] or len(cached) != 1:
        raise NoMatch("softmax does not go over the tokens of one operand", softmax)
    operands = ((product.left, ends[0]), (product.right, ends[1]))
    (key, key_axes), (query, query_axes) = operands if holds[0] else operands[::-1]
    summed = product.summed(ends)
    if len(summed) != 1:
        raise NoMatch(f"its scores are summed over {len(summed)} axes", nodes[0])
    key, key_axes, factor = to_cache(key, key_axes)
    if scores.inside is None:
        scores.scale *= factor
    else:
        scores.inside *= factor
    if scores.inside is not None and not scores.scale:
        raise NoMatch("its scores are multiplied by 0 after tanh (softcap)", nodes[0])
    values, value_axes, factor = to_cache(values, value_axes)
    if factor != 1:
        raise NoMatch("its values are scaled after the cache", nodes[-1])
    channels = flat(summed[0])  # read after both ways back, on which axes are cut
    batch, heads = lead(key, key_axes, (*cached, *channels))
    value_channels = tuple(a for group in value_axes for a in flat(group) if a not in (*cached, *batch, *heads))
    if lead(values, value_axes, (*cached, *value_channels)) != (batch, heads) or len(value_channels) != 1:
        raise NoMatch("its values have other heads than its keys", nodes[-1])
    own = [axis for group in query_axes for axis in flat(group) if axis not in channels]
    if not all(axis in own for axis in (*batch, *heads) if axis.size != 1):
        raise NoMatch("its keys have heads that its queries have not", nodes[0])
    own = [axis for axis in own if axis not in (*batch, *heads)]
    tokens, repeats = queries(query, query_axes, own, product.rows(query, query_axes))
    return Written(
        softmax, nodes, query, key, values, query_axes, key_axes, value_axes, out_axes, scores,
        batch, heads, repeats, tokens, cached, channels, value_channels,
    )  # fmt: skip


def read_scores(product: Product, scores: Scores, chain: list[Node], nodes: list[Node]) -> None:
    """Follow scores from their product to softmax, the last of `chain`; `nodes` gets every node on the way."""
    order = {n: i for i, n in enumerate(chain[0].graph.nodes)}
    scores.scale = product.scale
    if product.bias is not None:
        scores.add(product.bias, 1, chain[0])
    nodes.append(chain[0])
    for source, node in zip(chain, chain[1:], strict=False):
        for statement in in_place(source, node, order):
            SCORES[op(statement)](scores, statement, source)
            nodes.append(statement)
        used_once(source, node, nodes)
        if node is not chain[-1]:
            SCORES[op(node)](scores, node, source)
        nodes.append(node)


def read_weights(softmax: Node, scores: Scores, cached: tuple, nodes: list[Node]) -> tuple[Node, Axes]:
    """Follow weights from softmax to their product, the last that `nodes` gets; weights and axes as it takes them."""
    weights, axes, sinks = softmax, scores.axes, scores.sinks
    if sinks is not None and flat(sinks.beside) != cached:
        raise NoMatch("a sink stands beside its scores on another axis than that of softmax", softmax)
    while True:
        users = [u for u in weights.users if is_tensor(u) or op(u) == "output"]
        user = next((u for u in users if op(u) in PRODUCTS), *users[:1]) if users else None
        if others := [u for u in users if u is not user]:
            raise NoMatch(f"its attention weights are {used(others[0])} too, so they are computed", weights)
        if user is None:
            raise NoMatch("its attention weights are not used", weights)
        nodes.append(user)
        if op(user) in PRODUCTS:
            if sinks is not None and sinks.dropped is None:
                raise NoMatch("what a sink takes of its attention weights meets the values", user)
            return weights, axes
        if sinks is not None and sinks.dropped is None and sinks.drops(user, axes, cached):
            weights = sinks.dropped = user
            continue
        step = WEIGHTS.get(op(user))
        moved = after(user, axes) if step is kept else axes
        if step is None or moved is None:
            raise NoMatch(f"its attention weights are {used(user)} before they meet the values", weights)
        step(user)
        weights, axes = user, moved


def values_of(out: Node, weights: Node, axes: Axes, cached: tuple) -> tuple[Node, Axes, Axes]:
    """(values, their axes, axes of the output) of the product of weights and values."""
    product = PRODUCTS[op(out)](out)
    if product is None or (product.left is weights) == (product.right is weights):
        raise NoMatch("its attention weights are multiplied with something that are no values", out)
    if product.scale != 1 or product.bias is not None:
        raise NoMatch("its output is scaled or added to in its product", out)
    *ends, out_axes = product.axes({weights: axes})
    if [flat(group) for group in product.summed(ends)] != [cached]:
        raise NoMatch("its values are not summed over the axis of softmax", out)
    return (product.right, ends[1], out_axes) if product.left is weights else (product.left, ends[0], out_axes)


def to_cache(node: Node, axes: Axes) -> tuple[Node, Axes, float]:
    """Back over ops that move or repeat elements, to what a cache may hold; and the number that it is multiplied by."""
    factor = 1.0
    while not is_returned(node) and op(node) not in ("placeholder", "cat"):
        number = number_of(node.args[1]) if op(node) in ("mul", "truediv", "div") and len(node.args) == 2 else None
        if number is not None and is_tensor(node.args[0]):
            factor = factor / number if "div" in op(node) else factor * number
            node = node.args[0]
            continue
        moved = before(node, axes)
        if moved is None:
            break
        node, axes = node.args[0], moved
    return node, axes, factor


def lead(node: Node, axes: Axes, rest: tuple) -> tuple[tuple, tuple]:
    """(batch, heads) of keys or values: their axes but tokens and channels, in order."""
    groups = [flat(group) for group in axes]
    apart = [group for group in groups if not any(axis in rest for axis in group)]
    if len(groups) == 4 and len(apart) == 2:
        return apart[0], apart[1]
    leaves = tuple(axis for group in groups for axis in group if axis not in rest)
    if len(leaves) not in (1, 2):
        raise NoMatch(f"keys or values are {list(shape(node))}: their batch and heads cannot be told apart", node)
    return leaves[:1], leaves[1:]


def queries(query: Node, axes: Axes, own: list[Axis], rows: tuple) -> tuple[tuple, tuple]:
    """(tokens, repeats) among the axes that queries have alone.

    A matrix product has one row for each token. Where an einsum does not tell, repeats are what is merged with another
    axis on the way back to the projection, and else what comes first, unless sizes say otherwise.
    """
    if len(own) == 1:
        return (own[0],), ()
    if len(own) != 2:
        raise NoMatch(f"its queries have {len(own)} axes of their own, accepted: tokens and repeated heads", query)
    tokens = own[1]
    if len(rows) == 1 and rows[0] in own:
        tokens = rows[0]
    else:
        node = query
        while (moved := before_or_none(node, axes)) is not None:
            node, axes = node.args[0], moved
        alone = [axis for axis in own if (axis,) in [flat(group) for group in axes]]
        if len(alone) != 1 and own[0].size == own[1].size != 1:
            raise NoMatch("its queries' tokens cannot be told from their heads", query)
        tokens = alone[0] if len(alone) == 1 else tokens
    return (tokens,), tuple(axis for axis in own if axis is not tokens)


def before_or_none(node: Node, axes: Axes) -> Axes | None:
    try:
        return before(node, axes)
    except NoMatch:
        return None


def moved_axes(node: Node, source: Node, axes: Axes) -> Axes:
    """Axes after an op that only moves elements. Raises NoMatch for any other."""
    moved = after(node, axes) if node.args[0] is source else None
    if moved is None:
        raise NoMatch(f"{op(node)} stands between its scores and the values", node)
    return moved


def other(node: Node, source: Node):
    """The operand of a two-sided op that is not `source`."""
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if first is source and second is source:
        raise NoMatch("its scores are used twice", node)
    return second if first is source else first


def in_place(source: Node, until: Node, order: dict) -> list[Node]:
    """Statements that change scores before the next op reads them: scores.masked_fill_(mask, -inf)."""
    found = [u for u in source.users if u is not until and is_mutation(u, source) and not u.users]
    for node in found:
        if op(node) not in SCORES or order[node] > order[until]:
            raise NoMatch(f"its scores are written by {op(node)}", node)
    return sorted(found, key=order.get)


def used_once(source: Node, node: Node, nodes: list[Node]) -> None:
    for user in source.users:
        for_its_form = not is_tensor(user) and op(user) not in ("output", "max")
        for_its_dtype = op(user) == "to" and user.args[0] is not source  # x.type_as(scores)
        if user is node or user in nodes or for_its_form or for_its_dtype or is_maximum(user, source):
            continue
        raise NoMatch(f"its scores are {used(user)} too, so they are computed", source)


def used(user: Node) -> str:
    return "returned" if op(user) == "output" else f"used by {op(user)}"


def is_maximum(node, source: Node) -> bool:
    """The largest of `source` along its last axis, kept as an axis of one: scores.max(-1, keepdim=True)."""
    if op(node) == "getitem" and node.args[1] == 0:
        node = node.args[0]
    if op(node) not in ("max", "amax") or node.args[0] is not source:
        return False
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return dim in (-1, len(shape(source)) - 1) and bool(argument(node, 2, "keepdim"))


def number_of(x) -> float | None:
    """x as a number: itself, or a tensor that the graph makes of one number."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, Node) or any(not same_size(size, 1) for size in shape(x)):
        return None
    if op(x) in ("tensor", "scalar_tensor", "as_tensor"):
        return number_of(x.args[0])
    if op(x) in ("full", "new_full", "full_like"):
        return number_of(argument(x, 2 if op(x) == "new_full" else 1, "fill_value"))
    if op(x) in (*CASTS, "view", "reshape", "unsqueeze", "expand", "detach") and value(x).is_floating_point():
        return number_of(x.args[0])
    return None


__all__ = ["Written", "softmaxes", "written_attention"]
