"""Carry packed caches through graphs whose attention was not matched: read them through a temporary 16-bit copy.

Before   whole = cat([packed, new], 2); read(whole)   After    append(buffers, new, at); read(dequantize(buffers))
Needs    sites, buffers, stored_uses                  Gives    buffers, unmatched, appended, dequantized, program
Follows  attend_packed                                Leaves   numbers equal to the dequantized cache's

Only for caches that an earlier graph packed. The copy lives for the layer that reads it. A packed cache that this graph
overwrites in a way that codes cannot take goes back to 16 bits, since no token is quantized twice.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.kernels.cache_axes import STANDARD
from akvq_fx.passes.patterns.cache_write import is_packed, keeps_numbers, kept_of, written_views
from akvq_fx.passes.patterns.nodes import dimension, op, outputs, shape, tensors_of_cat, value
from akvq_fx.passes.patterns.projection import weight_behind
from akvq_fx.passes.patterns.site import layer_of
from akvq_fx.passes.state import GraphState
from akvq_fx.program import Appended
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
SHAPE_READS = ("size", "numel", "dim", "getattr", "__len__", "sym_size", "nelement", "is_contiguous")


def read_unmatched(state: GraphState) -> PassReport:
    report = PassReport("read_unmatched")
    for past in [n for n in state.placeholders if is_packed(n)]:
        if value(past).axes != STANDARD:  # exchange_axes left it as it is
            unpack(state, past, next(iter(past.users), past), report)
            continue
        grown = [u for u in past.users if is_growth(u, past)]
        if grown and past not in state.buffers and (overwrites := overwritten(past)):
            unpack(state, past, overwrites[0], report)
            continue
        for whole in grown:
            replace_shape_reads(state, whole)
            kept = [n for n in outputs(state.graph) if isinstance(n, Node) and kept_of(whole, [n]) is not None]
            readers = [u for u in whole.users if op(u) != "output" and is_read(u, kept)]
            matched = past in state.buffers
            if not matched:
                append(state, past, whole)
            if readers:
                copy = read_before(state, past, whole) if matched else read_after(state, past, whole)
                whole.replace_all_uses_with(copy, delete_user_cb=lambda u, live=readers: u in live)
                report_copy(state, report, past, tensors_of_cat(whole)[1], readers[0])
            returned(state, past, whole, *kept)
        replace_shape_reads(state, past)
        read_rest(state, past, report)
    return report


def report_copy(state: GraphState, report: PassReport, past, new, reader) -> None:
    """Report a read through a copy, once a layer, which is named by the projection of its new tokens."""
    reason = f"read by {op(reader)}: dequantized for it"
    layer, label = layer_of(weight_behind(new), len(state.sites) + len(state.dequantized))
    report.miss(label, reason, reader)
    if label not in {known for known, *_ in state.dequantized}:
        state.dequantized.append((label, layer, reason, reader))


def is_growth(user, past) -> bool:
    if op(user) != "cat" or len(shape(user)) != 4 or dimension(user, 1, 4) != 2:
        return False
    parts = tensors_of_cat(user)
    if len(parts) != 2 or parts[0] is not past:
        return False
    # A wider dtype of the new tokens widens the result of cat. Codes keep their dtype all the same; a cache of plain
    # numbers is widened as in torch, which makes it a plain tensor.
    return value(user).dtype == value(past).dtype or not keeps_numbers(past)


def append(state: GraphState, past, whole) -> None:
    """An append for a growth that no attention was matched to; its tokens are rotated as the buffers are."""
    buffers = state.bind(past)
    new = tensors_of_cat(whole)[1]
    with state.before(whole):
        # not the shared positions, which may come later in the graph
        total = shape(whole)[2] + state.first_slot(past)
        first, end = (state.size_node(n) for n in (total - shape(new)[2], total))
        at = state.call(torch.arange, first, end, device=value(new).device, dtype=torch.int64)
        node = state.call(
            akvq.append.default, buffers.nodes, stored(state, buffers, new), at, None, None, str(buffers.layout)
        )
    state.unmatched[past] = node
    state.program.appends.append((state.position[past], state.size(shape(new)[2])))


def stored(state: GraphState, buffers, new):
    if buffers.layout.affine:
        return state.call(akvq.rotate_keys.default, new, buffers["affine"])
    return state.call(akvq.rotate.default, new) if buffers.layout.rotated else new


def read_after(state: GraphState, past, whole):
    """The whole cache after the append, so with the new tokens as stored."""
    with state.graph.inserting_after(state.unmatched[past]):
        return dequantized(state, past, shape(whole)[2], value(whole))


def read_before(state: GraphState, past, whole):
    """The whole cache before a matched attention's append: the stored tokens, then the new ones as they are."""
    with state.before(whole):
        old = dequantized(state, past, shape(past)[2], value(past))
        copy = state.call(torch.cat, [old, tensors_of_cat(whole)[1]], 2)
    copy.meta["example_value"] = value(whole)
    return copy


def dequantized(state: GraphState, past, length, like):
    buffers, first = state.bind(past), state.first_slot(past)
    node = state.call(akvq.dequantize.default, buffers.nodes, state.size_node(first + length), str(buffers.layout))
    if not (isinstance(first, int) and first == 0):
        node = state.call(torch.narrow, node, 2, state.size_node(first), state.size_node(length))
    node.meta["example_value"] = like
    return node


def returned(state: GraphState, past, whole, *kept) -> None:
    """The graph returns the same cache, longer; `kept` of it, its last tokens."""
    state.appended[whole] = Appended(state.position[past])
    for node in kept:
        state.appended[node] = Appended(state.position[past], state.size(shape(node)[2]))


def read_rest(state: GraphState, past, report: PassReport) -> None:
    """Handle other readers of the packed placeholder: static and read-only caches without a matched attention."""
    users = [u for u in past.users if op(u) != "output" and not is_growth(u, past)]
    writes = [u for u in users if op(u) == "index_copy_" and u.args[0] is past]
    if overwrites := overwritten(past):
        unpack(state, past, overwrites[0], report)
        return
    appends = [n for n, _ in state.stored_uses.get(past, []) if "append" in op(n)]
    matched = bool(appends)
    for write in writes if not matched else ():
        buffers = state.bind(past)
        with state.before(write):
            new, at = write.args[3], write.args[2]
            written = stored(state, buffers, new)
            appends.append(state.call(akvq.append.default, buffers.nodes, written, at, None, None, str(buffers.layout)))
    read_copies(state, past, writes, appends, report)
    for write in writes:
        write.replace_all_uses_with(past)
        state.graph.erase_node(write)
    if past in outputs(state.graph):
        state.appended[past] = Appended(state.position[past])


def read_copies(state: GraphState, past, writes, appends, report: PassReport) -> None:
    """A copy for the live readers of a placeholder; readers with a write between them get copies of their own."""
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    copies: dict = {}
    for whole in (past, *writes):
        for u in [u for u in whole.users if u not in writes and op(u) != "output" and not is_growth(u, past)]:
            if not reaches_output(u):
                continue
            before = [w for w in writes if order[w] < order[u]]
            done = sum(order[a] < order[u] for a in appends)
            copies.setdefault((len(before), done), (before[done:], []))[1].append((whole, u))
    for pending, readers in copies.values():
        first = min((u for _, u in readers), key=order.get)
        with state.before(first):
            copy = dequantized(state, past, shape(past)[2], value(past))
            for write in pending:  # its append comes later, at an attention
                copy = state.graph.call_method("index_copy", (copy, 2, write.args[2], write.args[3]))
                copy.meta["example_value"] = value(past)
        for whole, u in readers:
            u.replace_input_with(whole, copy)
        report_copy(state, report, past, writes[0].args[3] if writes else None, first)


def unpack(state: GraphState, past, write, report: PassReport) -> None:
    """The graph moves tokens inside a static cache (a full sliding window rolls), which codes cannot do.

    The runtime turns the cache back to 16 bits, once, before this graph first runs; the graph then reads and writes it
    as it is.
    """
    if past in state.buffers:
        raise AssertionError(f"akvq: {past.name} is both packed and overwritten by {op(write)}")
    state.program.unpacked.append(state.position[past])
    report.miss(past.name, f"overwritten by {op(write)}: back to 16 bits", write)


def overwritten(past) -> list:
    """What writes into it in another way than tokens come."""
    return [u for u, _ in written_views(past) if op(u) != "index_copy_" or u.args[0] is not past]


def is_read(node, kept: list) -> bool:
    """Numbers of the result depend on this node, not counting what the graph returns as the cache."""
    if node in kept:
        return any(op(user) != "output" and is_read(user, kept) for user in node.users)
    if kept and all(user in kept for user in node.users) and node.users:  # x[:, :, -n:].contiguous()
        return any(is_read(user, kept) for user in node.users)
    return reaches_output(node)


def reaches_output(node) -> bool:
    seen, queue = set(), [node]
    while queue:
        current = queue.pop()
        if op(current) == "output" or current.is_impure():
            return True
        if current not in seen:
            seen.add(current)
            queue.extend(current.users)
    return False


def replace_shape_reads(state: GraphState, node) -> None:
    """size(), shape and numel() of a packed tensor become numbers."""
    for user in list(node.users):
        if op(user) not in SHAPE_READS:
            continue
        seen = value(user)
        if isinstance(seen, (torch.Size, tuple, list)):
            with state.before(user):
                parts = [state.size_node(s) for s in seen]
            for reader in list(user.users):
                if op(reader) == "getitem" and isinstance(reader.args[1], int):
                    swap(state, reader, parts[reader.args[1]])
            if user.users:
                user.replace_all_uses_with(state.graph.call_function(tuple, (parts,)))
            state.graph.erase_node(user)
        elif isinstance(seen, (int, bool, torch.SymInt)):
            swap(state, user, state.size_node(seen))


def swap(state: GraphState, node, number) -> None:
    """Put a number or node in place of a node."""
    for user in list(node.users):
        user.args = torch.fx.node.map_aggregate(user.args, lambda a: number if a is node else a)
        user.kwargs = torch.fx.node.map_aggregate(user.kwargs, lambda a: number if a is node else a)
    state.graph.erase_node(node)


read_unmatched.needs = ("sites", "buffers", "stored_uses")
read_unmatched.gives = ("buffers", "unmatched", "appended", "dequantized", "program")
read_unmatched.follows = ("attend_packed",)
read_unmatched.required = "nothing else reads a packed cache outside of the attention that was found"
