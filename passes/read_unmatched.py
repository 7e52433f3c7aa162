"""Carry packed caches through graphs whose attention was not matched: read them through a temporary 16-bit copy.

Before   whole = cat([packed, new], 2); anything(whole)     After   append(buffers, new, at); anything(dequantize(buffers))
Needs    attend_packed                                      Leaves  numbers equal to the dequantized cache's

Only for caches that an earlier graph packed. The copy lives for the layer that reads it. A packed cache that this graph overwrites
in another way goes back to 16 bits: codes cannot take it, and no token is quantized twice.
"""

from __future__ import annotations

import torch

from akvq_fx.passes.patterns.cache_write import CacheWrite, is_mutation, is_packed
from akvq_fx.passes.patterns.nodes import dimension, op, outputs, shape, tensors_of_cat, value
from akvq_fx.passes.pack_caches import positions
from akvq_fx.passes.state import Appended, GraphState
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
SHAPE_READS = ("size", "numel", "dim", "getattr", "__len__", "sym_size", "nelement", "is_contiguous")


def read_unmatched(state: GraphState) -> PassReport:
    report = PassReport("read_unmatched")
    for past in [n for n in state.placeholders if is_packed(n)]:
        grown = [u for u in past.users if is_growth(u, past)]
        for whole in grown:
            replace_shape_reads(state, whole)
            readers = [u for u in whole.users if op(u) != "output" and reaches_output(u)]
            if past not in state.buffers:
                append(state, past, whole)
            if readers:
                with state.graph.inserting_after(last_write(state, past, whole)):
                    copy = dequantized(state, past, shape(whole)[2], value(whole))
                whole.replace_all_uses_with(copy, delete_user_cb=lambda u: op(u) != "output")
                report.miss(past.name, f"read by {op(readers[0])}: dequantized for it", readers[0])
            returned(state, whole, past)
        replace_shape_reads(state, past)
        read_rest(state, past, report)
    return report


def is_growth(user, past) -> bool:
    if op(user) != "cat" or len(shape(user)) != 4 or dimension(user, 1, 4) != 2:
        return False
    parts = tensors_of_cat(user)
    return len(parts) == 2 and parts[0] is past


def append(state: GraphState, past, whole) -> None:
    """An append for a growth that no attention was matched to; its tokens are turned as the buffers are."""
    buffers = state.bind(past)
    new = tensors_of_cat(whole)[1]
    write = CacheWrite("grow", past, new, whole, packed=True)
    with state.graph.inserting_after(new):
        marker = state.call(torch.ops.aten.detach.default, new)
    with state.before(marker):
        at = positions(state, write, new)
        node = state.call(akvq.append.default, buffers.nodes, stored(state, buffers, new), at, None, None, str(buffers.layout))
    state.graph.erase_node(marker)
    state.unmatched[past] = node
    state.program.appends.append((state.position[past], state.size(shape(new)[2])))


def stored(state: GraphState, buffers, new):
    if buffers.layout.affine:
        return state.call(akvq.rotate_keys.default, new, buffers["affine"])
    return state.call(akvq.hadamard.default, new) if buffers.layout.rotated else new


def last_write(state: GraphState, past, whole):
    if past in state.unmatched:
        return state.unmatched[past]
    appends = [node for node, position in state.stored_uses.get(whole, []) if "append" in op(node)]
    return appends[-1] if appends else whole


def dequantized(state: GraphState, past, length, like):
    buffers = state.bind(past)
    node = state.call(akvq.dequantize.default, buffers.nodes, state.size_node(length), str(buffers.layout))
    node.meta["example_value"] = like
    return node


def returned(state: GraphState, whole, past) -> None:
    """The graph returns the same cache, longer."""
    state.appended[whole] = Appended(state.position[past])


def read_rest(state: GraphState, past, report: PassReport) -> None:
    """What still reads the packed placeholder itself: static caches and read-only ones without a matched attention."""
    users = [u for u in past.users if op(u) != "output" and not is_growth(u, past)]
    writes = [u for u in users if op(u) == "index_copy_" and u.args[0] is past]
    overwrites = [u for u in users if is_mutation(u, past) and u not in writes]
    if overwrites:
        unpack(state, past, overwrites[0], report)
        return
    for write in writes:
        matched = any("append" in op(n) for n, _ in state.stored_uses.get(past, []))
        if not matched:
            buffers = state.bind(past)
            with state.before(write):
                new, at = write.args[3], write.args[2]
                state.call(akvq.append.default, buffers.nodes, stored(state, buffers, new), at, None, None, str(buffers.layout))
        write.replace_all_uses_with(past)
        state.graph.erase_node(write)
    readers = [u for u in past.users if op(u) != "output" and not is_growth(u, past)]
    live = [u for u in readers if reaches_output(u)]
    if live:
        first = min(live, key=list(state.graph.nodes).index)
        with state.before(first):
            copy = dequantized(state, past, shape(past)[2], value(past))
        for u in live:
            u.replace_input_with(past, copy)
        report.miss(past.name, f"read by {op(first)}: dequantized for it", first)
    if past in outputs(state.graph):
        state.appended[past] = Appended(state.position[past])


def unpack(state: GraphState, past, write, report: PassReport) -> None:
    """The graph moves tokens inside a static cache (a full sliding window rolls): codes would have to be quantized again.

    The runtime turns the cache back to 16 bits, once, before this graph first runs; the graph then reads and writes it as it is.
    """
    if past in state.buffers:
        raise AssertionError(f"akvq: {past.name} is both packed and overwritten by {op(write)}")
    state.program.unpacked.append(state.position[past])
    report.miss(past.name, f"overwritten by {op(write)}: back to 16 bits", write)


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


read_unmatched.needs = ("attend_packed",)
