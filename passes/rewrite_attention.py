"""Make one scaled_dot_product_attention call of attention that a model writes out, where it reads a packable cache.

Before   matmul(softmax(matmul(q, k.mT) * scale + mask), v)      After   sdpa(q, k, v, attn_mask=mask, scale=scale)
Needs    none                                                    Gives   written_out, originals, kept_axes
Follows  exchange_axes                                           Leaves  numbers as they were, but for their rounding

Spellings are declared in patterns/written_attention.py. What has no equal call (weights that are used elsewhere), and
what reads no cache that can be packed, stays as the model has it. Query heads are not expanded here: keys go into the
call as the cache holds them.

Softcap and sinks are no arguments of that call. Where a model has them, extended_attention (kernels/attend.py) takes
its place, and what the model wrote stays beside it: attend_packed drops one of the two. So a prompt, which attends to
its own 16-bit tokens, computes what the model wrote.

Rows that see nothing: a finite fill (finfo.min, -1e9) gives every token the same weight, and so does this call's float
mask. With -inf the model's row is nan, which no model uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

from akvq_fx.kernels.attend import extended_attention
from akvq_fx.passes.exchange_axes import Exchanged, committed, exchanged, kept_or_said
from akvq_fx.passes.patterns.attention import Attention
from akvq_fx.passes.patterns.axes import Axes, flat
from akvq_fx.passes.patterns.cache_write import cache_write_of, is_mutation
from akvq_fx.passes.patterns.cached import check_caches, fix_heads, read_from
from akvq_fx.passes.patterns.kept import Roles
from akvq_fx.passes.patterns.nodes import NoMatch, op, same_size, shape, value
from akvq_fx.passes.patterns.values import expression
from akvq_fx.passes.patterns.written_attention import Sinks, Written, before_or_none, softmaxes, written_attention
from akvq_fx.passes.state import GraphState, Original
from akvq_fx.report import PassReport

SHARED = "rewrite_attention"  # first in the keys of nodes that this pass shares between sites
HIDDEN = -6e4  # what is added to a score of float16 that does not count: its lowest number is -65504


def rewrite_attention(state: GraphState) -> PassReport:
    report, calls = PassReport("rewrite_attention"), []
    for softmax in softmaxes(state.graph):
        try:
            written = written_attention(softmax)
            if written is None:
                continue
            stop_sharing_from_behind(state, written, calls)
            with state.before(written.out):
                call = called(state, written)
        except NoMatch as miss:
            state.written_out[softmax] = miss
            report.miss(softmax.name, miss.reason, miss.node)
            continue
        if call is not None:
            calls.append(call)
            report.match(call.name)
    return report


def stop_sharing_from_behind(state: GraphState, written: Written, calls: list[Node]) -> None:
    """Where softmaxes and outputs are in different orders, this call cannot use what was made for one behind it."""
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    if any(order[call] > order[written.out] for call in calls):
        state.shared = {key: made for key, made in state.shared.items() if key[0] != SHARED}


def called(state: GraphState, written: Written) -> Node | None:
    """The call in place of what was written; None where keys and values lead to no cache.

    Raises NoMatch where they lead to one that cannot be packed; the graph is then as it was.
    """
    there = set(state.graph.nodes)
    try:
        halves = in_order(state, written)
        (key, length), (val, value_length) = read_from(written.key), read_from(written.value)
        known = [half and half.write for half in halves]
        writes = [write or cache_write_of(whole) for write, whole in zip(known, (key, val), strict=True)]
        if writes == [None, None]:
            why = NoMatch(f"its keys reach it through {op(written.key)}", written.key)
            state.written_out[written.softmax] = why  # said where a cache is found that leads here all the same
            return None
        check_layout(written)
        if writes[0] is not None and writes[0].new is not None:
            check_tokens(written, writes[0].new)
        extended = written.scores.softcap or written.scores.sinks is not None
        if extended and any(half and half.kept for half in halves):  # what the model wrote must be able to come back
            why = "its cache is not [batch, heads, tokens, channels], which is accepted without softcap and sinks"
            raise NoMatch(why, written.softmax)
        gone = dying(written)
        fix_heads(*writes)
        query = query_of(state, written)
        some_mask = next((step[1] for step in written.scores.mask if step[0] in ("add", "fill")), None)
        provisional = Attention(written.out, query, written.key, written.value, some_mask, False, None)
        check_caches(provisional, *writes, length, value_length, dying=gone)
        call = sdpa(state, written, query)
        heads = (*written.heads, *written.repeats)
        out = arranged(state, call, (written.batch, heads, written.tokens, written.value_channels), written.out_axes)
    except NoMatch:
        state.forget(*[node for node in state.graph.nodes if node not in there])
        raise
    if value(out).dtype != value(written.out).dtype:
        out = new(state, "to", out, value(written.out).dtype)
    out.meta = {**written.out.meta, "example_value": value(out)}
    written.out.replace_all_uses_with(out)
    if call.target is extended_attention:
        state.originals[call] = Original(written.nodes, out, gone)
    else:
        state.effects -= set(written.nodes)
        state.forget(*written.nodes)
    for half in [half for half in halves if half and half.kept]:
        state.kept_axes.update(committed(state, half))
    return call


def in_order(state: GraphState, written: Written) -> list[Exchanged | None]:
    """Have attention read caches of other axes as [B, H, T, D]: what was made for its keys and values, None for those
    that need nothing."""
    lead = written.batch, written.heads, written.cached
    channels = {"key": written.channels, "value": written.value_channels}
    paths = {name: [(getattr(written, name), getattr(written, f"{name}_axes"))] for name in channels}
    kept = {name: kept_or_said(state, path, Roles(*lead, channels[name])) for name, path in paths.items()}
    if written.key is written.value:
        return [None, None]  # keys that are values are a residual stream
    halves = {name: exchanged(state, path, Roles(*lead, channels[name]), kept[name]) for name, path in paths.items()}
    for name, half in halves.items():
        if half is not None:
            setattr(written, name, half.read or half.whole)
            setattr(written, f"{name}_axes", (*lead, channels[name]))
    return list(halves.values())


def check_layout(written: Written) -> None:
    """Raises NoMatch where keys or values are no [B, H, T, D], have two dtypes, or are written while they are read."""
    for node, axes, channels in (
        (written.key, written.key_axes, written.channels),
        (written.value, written.value_axes, written.value_channels),
    ):
        if tuple(map(flat, axes)) != (written.batch, written.heads, written.cached, channels):
            raise NoMatch("its cache is not [batch, heads, tokens, channels]", node)
    if value(written.value).dtype != value(written.key).dtype:
        raise NoMatch("its keys and values have two dtypes", written.value)
    order = {n: i for i, n in enumerate(written.out.graph.nodes)}
    for cache in {written.key, written.value}:
        late = [u for u in cache.users if is_mutation(u, cache) and order[u] > order[written.nodes[0]]]
        if any(order[u] < order[written.out] for u in late):
            raise NoMatch("the cache is written while it is read", late[0])


def check_tokens(written: Written, stored: Node) -> None:
    """Queries are as many as the tokens that this step stores: exchange tokens and repeats where they say otherwise.

    Raises NoMatch where neither does.
    """
    count = expression(shape(stored)[2])
    if written.repeats and written.tokens[0].size != count:
        if written.repeats[0].size != count:
            raise NoMatch("its queries' tokens cannot be told from their heads", written.query)
        written.tokens, written.repeats = written.repeats, written.tokens


def dying(written: Written) -> set[Node]:
    """The nodes that nothing reads any more when the call is in the graph."""
    found = set(written.nodes)
    queue = list(written.nodes)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in found and source.op != "placeholder" and all(u in found for u in source.users):
                found.add(source)
                queue.append(source)
    return found


def query_of(state: GraphState, written: Written) -> Node:
    """The queries as [batch, heads, tokens, channels]."""
    order = written.batch, (*written.heads, *written.repeats), written.tokens, written.channels
    node, axes = nearest(written.query, written.query_axes, order, value(written.key).dtype)
    return arranged(state, node, axes, order)


def nearest(node: Node, axes: Axes, order: Axes, dtype: torch.dtype) -> tuple[Node, Axes]:
    """The first node on the way back that has these axes, in the cache's dtype; else the node itself."""
    here = node, axes
    while here is not None:
        if tuple(map(flat, here[1])) == order and value(here[0]).dtype == dtype:
            return here
        source = before_or_none(*here)
        here = None if source is None else (here[0].args[0], source)
    if value(node).dtype != dtype:
        raise NoMatch(f"its queries are {value(node).dtype} and the cache is {dtype}", node)
    return node, axes


def sdpa(state: GraphState, written: Written, query: Node) -> Node:
    """scaled_dot_product_attention, or extended_attention, over keys and values as the cache has them."""
    for how, factor in written.scores.factors:
        query = new(state, how, query, factor)
    mask = mask_of(state, written, value(query).dtype)
    arguments = {"query": query, "key": written.key, "value": written.value}
    arguments |= {"attn_mask": mask} if mask is not None else {}
    arguments["scale"] = written.scores.scale_within
    softcap, sinks = written.scores.softcap, written.scores.sinks
    if softcap or sinks is not None:
        arguments |= {"softcap": softcap, "sinks": None if sinks is None else of_heads(state, written, sinks)}
        call = state.graph.call_function(extended_attention, (), arguments)
    else:
        arguments |= {"enable_gqa": True} if written.repeats else {}
        call = state.graph.call_function(F.scaled_dot_product_attention, (), arguments)
    seen = value(query)
    with seen.fake_mode:
        call.meta["example_value"] = seen.new_empty((*seen.shape[:3], value(written.value).shape[3]))
    return call


def of_heads(state: GraphState, written: Written, sinks: Sinks) -> Node:
    """[Hq]: a sink of each query head. Raises NoMatch where they differ along another axis."""
    node, axes = sinks.node, sinks.axes
    while len(shape(node)) > 1 and (earlier := before_or_none(node, axes)) is not None:
        node, axes = node.args[0], earlier
    present = [axis for group in axes for axis in flat(group) if axis.size != 1]
    heads = [axis for axis in (*written.heads, *written.repeats) if axis.size != 1]
    if present != heads:
        raise NoMatch("the sinks beside its scores are not one for each head", sinks.node)
    return node if len(shape(node)) == 1 else new(state, "flatten", node)


def mask_of(state: GraphState, written: Written, dtype: torch.dtype) -> Node | None:
    """What is added to scores, or (bool) which scores count; None for all of them."""
    dtype = torch.float32 if dtype == torch.float16 else dtype  # so that a fill is far below every score
    mask, steps = None, written.scores.mask
    for step in steps:
        how, x, *rest = step
        if how in ("mul", "div"):
            mask = new(state, how, mask, x)
            continue
        axes, how_much, *negated = rest
        x = spread(state, written, x, axes)
        if how == "add":
            x = x if value(x).is_floating_point() else new(state, "to", x, dtype)
            x = new(state, "neg", x) if how_much < 0 else x
            mask = x if mask is None else new(state, "add", mask, x)
            continue
        if len(steps) == 1 and how_much == -torch.inf:
            return x if negated[0] else new(state, "logical_not", x)
        x = new(state, "logical_not", x) if negated[0] else x
        finite_last = step is steps[-1] and how_much != -torch.inf
        mask = zero(state, written, dtype) if mask is None else mask
        mask = new(state, "masked_fill", mask, x, torch.finfo(value(mask).dtype).min if finite_last else how_much)
    if mask is None or value(mask).dtype in (dtype, torch.float32):
        return mask
    if value(mask).dtype == torch.float16:  # beside its lowest number scores of float16 vanish, of float32 they do not
        hidden, mask = new(state, "lt", mask, HIDDEN), new(state, "to", mask, dtype)
        return new(state, "masked_fill", mask, hidden, torch.finfo(dtype).min)
    return new(state, "to", mask, dtype)


def zero(state: GraphState, written: Written, dtype: torch.dtype) -> Node:
    like = value(written.query)
    node = state.call(torch.zeros, (), dtype=dtype, device=like.device)
    with like.fake_mode:
        node.meta["example_value"] = torch.zeros((), dtype=dtype, device=like.device)
    return node


def spread(state: GraphState, written: Written, x: Node, axes: Axes) -> Node:
    """x, which is broadcast to scores of these axes, as it is broadcast to [batch, heads, tokens, cached]."""
    axes = axes[len(axes) - len(shape(x)) :]
    axes = tuple(() if same_size(size, 1) else flat(group) for size, group in zip(shape(x), axes, strict=True))
    heads = (*written.heads, *written.repeats)
    wanted = written.batch, heads, written.tokens, written.cached
    if all(group in ((), right) for group, right in zip(axes[::-1], wanted[::-1], strict=False)) and len(axes) <= 4:
        return x if len(axes) > 1 else new(state, "unsqueeze", x, 0)
    present = {axis for group in axes for axis in group}
    if some := [axis for axis in heads if axis in present]:
        missing = [axis for axis in heads if axis not in present and axis.size != 1]
        if missing and some:
            return expanded(state, x, axes, wanted, present)
    return arranged(state, x, axes, tuple(tuple(axis for axis in group if axis in present) for group in wanted))


def expanded(state: GraphState, x: Node, axes: Axes, wanted: Axes, present: set) -> Node:
    """A mask that differs along one of heads and repeats, made as large as both."""
    batch, heads, tokens, cached = wanted
    if not all(isinstance(axis.size, int) for axis in heads):
        raise NoMatch("the number of heads is not fixed", x)
    only = lambda group: tuple(axis for axis in group if axis in present)
    parts = tuple((axis,) if axis in present else () for axis in heads)
    apart = arranged(state, x, axes, (only(batch), *parts, only(tokens), only(cached)))
    return new(state, "flatten", new(state, "expand", apart, -1, *(axis.size for axis in heads), -1, -1), 1, len(heads))


def arranged(state: GraphState, node: Node, axes: Axes, order: Axes) -> Node:
    """A tensor with other axes: cut where several are merged, put in order, merged, with ones where a group is empty.

    Raises NoMatch where merged axes have more than one size that is no number.
    """
    axes, order = tuple(map(flat, axes)), tuple(map(flat, order))
    if axes == order:
        return node
    dim = 0
    for group in axes:
        if len(group) > 1:
            sizes = [axis.size if isinstance(axis.size, int) else -1 for axis in group]
            if sizes.count(-1) > 1:
                raise NoMatch("axes of unknown size are merged", node)
            node = new(state, "unflatten", node, dim, tuple(sizes))
        elif not group:
            node = new(state, "squeeze", node, dim)
        dim += len(group)
    have = [axis for group in axes for axis in group]
    want = [axis for group in order for axis in group]
    if set(have) != set(want):
        raise NoMatch("a tensor has axes that attention has not", node)
    if have != want:
        node = new(state, "permute", node, *(have.index(axis) for axis in want))
    for dim, group in enumerate(order):
        if not group:
            node = new(state, "unsqueeze", node, dim)
        elif len(group) > 1:
            node = new(state, "flatten", node, dim, dim + len(group) - 1)
    return node


def new(state: GraphState, method: str, x: Node, *arguments) -> Node:
    """x.method(*arguments); one node for all sites that need it."""

    def make():
        node = state.graph.call_method(method, (x, *arguments))
        with value(x).fake_mode:
            node.meta["example_value"] = getattr(value(x), method)(*map(value, arguments))
        return node

    return state.share((SHARED, method, x, *arguments), make)


rewrite_attention.needs = ()
rewrite_attention.gives = ("written_out", "originals", "kept_axes")
rewrite_attention.follows = ("exchange_axes",)
