"""How this step's keys or values meet the cache: the forms that caches take in dynamo graphs.

grow    cat([past, new], 2), returned               growing cache, or a tuple of tensors
first   cat([empty, new], 2) or new itself, returned  the prompt of a growing cache
fill    zeros, zeros.index_copy_(2, at, new), zeros returned   the prompt of a static cache, allocated in the graph
place   past.index_copy_(2, at, new)                static cache or registered buffer; where it is no PackedKV, in any
                                                    spelling of static_write.py (exchange_buffers)
read    past, neither written nor returned          cross-attention over a cache that is already full

A sliding window is grow or first where the graph returns whole[:, :, -n:] in place of whole.

Names play no part. A plain placeholder that is only read is not evidence of a cache: vision towers look the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.attention import LAYOUT_OPS, suffix_of
from akvq_fx.passes.patterns.nodes import (
    ALLOCATIONS,
    NoMatch,
    argument,
    dimension,
    is_packed,
    is_tensor,
    op,
    outputs,
    shape,
    tensors_of_cat,
    through_noops,
    value,
)
from akvq_fx.passes.patterns.static_write import FORMS, static_write
from akvq_fx.torch_internals import LEAST_SYMBOL

TOKENS = 2  # the token axis of a [B, H, T, D] cache
REPLACED = ("where", "index_copy", "index_put", "scatter", "masked_scatter", "slice_scatter", "index_fill")
SLICED = "the cache keeps a slice of what attention reads (sliding window)"
UNKNOWN_FORM = "no product of queries and keys was seen before its softmax"
STATIC_PLAIN = (
    "16-bit buffers that the caller owns are packed where each step writes tokens of all heads and channels, and "
    "attention reads all of it or its first tokens: x[:, :, at] = new, x[:b, s:e] = new; x, x[:, :, :n], x[:b, :e]"
)
ROLLS = "the cache is overwritten as a whole (a rolling window, or a recurrent state)"
OTHER_SLICE = "the cache keeps a slice of what attention reads, accepted: all of it, or its last tokens x[:, :, -n:]"


@dataclass
class CacheWrite:
    """One cache tensor of a graph.

    kind    one of the forms above
    past    the cache as it came in (a placeholder, or a permutation of a plain one), None for first and fill
    new     [B, H, q, D] this step's keys or values, None for read
    whole   the node that attention reads and, unless kind is place or read or kept is given, that the graph returns
    at      positions given to index_copy_, None where they follow from the length
    packed  the past is a PackedKV already
    kept    the last tokens of whole, which the graph returns in its place (a sliding window), None where it keeps all
    """

    kind: str
    past: Node | None
    new: Node | None
    whole: Node
    at: Node | None = None
    packed: bool = False
    kept: Node | None = None

    @property
    def returned(self) -> Node:
        """What the graph returns, unless kind is place or read."""
        return self.whole if self.kept is None else self.kept

    @property
    def static(self) -> bool:
        return self.kind in ("fill", "place")


def first_slot(past: Node | None):
    """The slot of a packed cache's first token, a number or a symbol: a sliding window drops tokens before it."""
    dropped = getattr(value(past), "dropped", None)
    return 0 if dropped is None else dropped.shape[0] - LEAST_SYMBOL


def keeps_numbers(past: Node) -> bool:
    """The packed cache holds numbers, not codes, so that all it does to new tokens is round them to its dtype."""
    return Layout.parse(value(past).layout_text).plain


def kept_of(whole: Node, returned: list[Node]) -> Node | None:
    """The last tokens of `whole` that the graph returns; None where it returns `whole` itself, or no such slice."""
    if whole in returned:
        return None
    for node in returned:
        source = through_noops(node)
        if source is not whole and suffix_of(source)[0] is whole and value(node).dtype == value(whole).dtype:
            return node
    return None


def is_empty(node) -> bool:
    return is_tensor(node) and 0 in shape(node) and len(shape(node)) in (1, 4)


def overwrites(write: Node, cache: Node) -> bool:
    """cache.copy_(...): all of it at once."""
    return op(write) == "copy_" and write.args[0] is cache


def is_buffer(node: Node) -> bool:
    """It could hold keys or values: it came in, or is allocated here."""
    known = op(node) in ("placeholder", *ALLOCATIONS) and len(shape(node)) >= 3
    return known and value(node).is_floating_point()


def is_made_anew(node: Node) -> bool:
    """where(here, new, old) and the like of a whole buffer: to store the result would quantize its tokens again, and
    to write it in place would change what the caller still has."""
    return op(node) in REPLACED and any(is_buffer(viewed(source)) for source in node.all_input_nodes)


def viewed(node: Node) -> Node:
    """The tensor that a node is a view of, or the node itself."""
    while op(node) in LAYOUT_OPS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def made_anew(node: Node) -> NoMatch:
    return NoMatch(f"the cache is made anew by {op(node)}, accepted: cat([past, new]), or a write in place", node)


def is_input(node: Node) -> bool:
    """A placeholder, or one whose axes exchange_axes put in order."""
    while op(node) in ("permute", "unflatten"):
        node = node.args[0]
    return op(node) == "placeholder"


def cache_write_of(whole: Node) -> CacheWrite | None:
    """The write behind a [B, H, T, D] node that attention reads.

    None means that the node is no cache: it has another rank, is a plain input that is only read, or is computed here
    and not returned. Nobody asked for that to be packed, so it is no refusal. Raises NoMatch where it is a cache that
    cannot be packed.
    """
    returned = [n for n in outputs(whole.graph) if isinstance(n, Node)]
    if len(shape(whole)) != 4:
        return None
    if op(whole) == "cat" and dimension(whole, 1, 4) == TOKENS:
        return grown(whole, returned)
    copies = [u for u in whole.users if op(u) == "index_copy_" and u.args[0] is whole]
    if op(whole) == "placeholder":
        if copies:
            return placed(whole, copies)
        if other := [u for u, _ in written_views(whole)]:
            if overwrites(other[0], whole):
                raise NoMatch(ROLLS, other[0])
            if op(other[0]) in FORMS and not is_packed(whole):
                return placed(whole, other)
            raise NoMatch(
                f"the cache is written by {op(other[0])}, accepted: cat, index_copy_ or x[:, :, at] = new", other[0]
            )
        return CacheWrite("read", whole, None, whole, packed=True) if is_packed(whole) else None
    if op(whole) in ALLOCATIONS and copies:
        if whole not in returned:
            raise NoMatch(
                "a buffer is allocated and written like a static cache, but the graph does not return it", whole
            )
        copy = placed(whole, copies)
        return CacheWrite("fill", None, copy.new, whole, copy.at)
    if op(whole) == "index_copy_" and is_tensor(whole.args[0]):
        return cache_write_of(whole.args[0])
    if whole in returned:
        if is_made_anew(whole):
            raise made_anew(whole)
        if other := [u for u, _ in written_views(whole)]:
            raise NoMatch(
                f"the cache is written by {op(other[0])}, accepted: cat, index_copy_ or x[:, :, at] = new", other[0]
            )
        return CacheWrite("first", None, whole, whole)
    if op(whole) != "placeholder" and (kept := kept_of(whole, returned)) is not None:
        return CacheWrite("first", None, whole, whole, kept=kept)
    return None


def is_cache_cat(node) -> bool:
    """cat([past, new], 2), where past is empty or came in."""
    parts = tensors_of_cat(node) if op(node) == "cat" and len(shape(node)) == 4 else []
    return bool(parts) and dimension(node, 1, 4) == TOKENS and (is_empty(parts[0]) or is_input(parts[0]))


def grown(whole: Node, returned: list[Node]) -> CacheWrite | None:
    """cat([past, new]) and its prompt form. None where no cache grows: nothing is returned, or no past is there.

    Raises NoMatch where a cache is grown in a form that cannot be packed.
    """
    parts = tensors_of_cat(whole)
    if not parts or not all(isinstance(p, Node) for p in parts):
        return None
    past, new, kept = parts[0], parts[-1], kept_of(whole, returned)
    is_kept = whole in returned or kept is not None
    from_cache = is_empty(past) or is_input(past)
    if len(parts) != 2:
        if from_cache and is_kept:
            raise NoMatch(f"the cache is a cat of {len(parts)} tensors, accepted: cat([past, new])", whole)
        return None
    if not from_cache or len(shape(new)) != 4:
        return CacheWrite("first", None, whole, whole, kept=kept) if is_kept else None
    if not is_kept:
        slices = [u for u in whole.users if op(u) == "getitem" and u in returned]
        if slices:
            raise NoMatch(OTHER_SLICE, slices[0])
        if is_packed(past):
            raise NoMatch("what attention reads is not what the cache keeps", whole)
        return None
    if is_empty(past):
        return CacheWrite("first", None, new, whole, kept=kept)
    if is_packed(past) and keeps_numbers(past) and value(whole).dtype != value(past).dtype:
        raise NoMatch(
            f"the cache holds {value(past).dtype} and this step brings {value(new).dtype}: in lossless mode it becomes "
            f"a plain {value(whole).dtype} tensor, as without packing",
            whole,
        )
    if is_packed(past) and (other := written_views(past)):
        raise NoMatch(f"the cache is also written by {op(other[0][0])}", other[0][0])
    return CacheWrite("grow", past, new, whole, packed=is_packed(past), kept=kept)


def placed(whole: Node, copies: list[Node]) -> CacheWrite:
    """past.index_copy_(2, at, new), or another spelling of it that canonicalize leaves as it is."""
    if len(copies) > 1:
        raise NoMatch("the cache is written twice in one step", copies[1])
    copy = copies[0]
    if op(copy) in FORMS:
        write = static_write(copy)
        dim, at, new = write.place.axis, write.place.at, write.new
        if at is None or write.place.one:
            raise NoMatch(STATIC_PLAIN, whole)
    else:
        dim, at, new = (argument(copy, i, name) for i, name in ((1, "dim"), (2, "index"), (3, "source")))
    if not isinstance(dim, int) or dim % 4 != TOKENS or len(shape(new)) != 4:
        raise NoMatch("index_copy_ does not go along the token axis", copy)
    if other := [u for u, _ in written_views(whole) if u is not copy]:
        raise NoMatch(f"the cache is also written by {op(other[0])}", other[0])
    return CacheWrite("place", whole, new, whole, at, packed=is_packed(whole))


def is_mutation(user: Node, cache: Node) -> bool:
    name = op(user)
    in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return in_place and bool(user.args) and user.args[0] is cache


def written_views(cache: Node) -> list[tuple[Node, Node]]:
    """Each op that writes into the tensor or into a view of it, and what it writes into."""
    found, queue = [], [cache]
    while queue:
        node = queue.pop()
        found += [(user, node) for user in node.users if is_mutation(user, node)]
        queue += [user for user in node.users if op(user) in LAYOUT_OPS and op(user) != "clone"]
    return found


def cache_like(graph: Graph, written_out: dict[Node, NoMatch]) -> list[tuple[Node, NoMatch]]:
    """Cache tensors of the graph that no attention call was matched to, each with the reason to give.

    written_out: why a written-out attention was not made a call, by its softmax.

    Looks from the cache side: a cat of an empty tensor or placeholder along the tokens that is returned (whole or
    sliced), and buffers written along the tokens.
    """
    found = []
    returned = {n for n in outputs(graph) if isinstance(n, Node)}
    for node in graph.nodes:
        if is_cache_cat(node):
            if node in returned or kept_of(node, list(returned)) is not None:
                found.append((node, why_unread(node, written_out)))
            elif any(op(u) == "getitem" and u in returned for u in node.users):
                found.append((node, NoMatch(OTHER_SLICE, node)))
        elif op(node) == "index_copy_" and len(shape(node)) == 4 and argument(node, 1, "dim") in (TOKENS, -2):
            if op(node.args[0]) in ("placeholder", *ALLOCATIONS):
                found.append((node.args[0], why_unread(node.args[0], written_out)))
        elif (
            op(node) == "copy_"
            and op(node.args[0]) in ("placeholder", *ALLOCATIONS)
            and op(node.args[1]) in ("roll", "getitem")
        ):
            found.append((node.args[0], NoMatch(ROLLS, node.args[0])))
    return found


def why_unread(cache: Node, written_out: dict[Node, NoMatch], reach: int = 40) -> NoMatch:
    """Why no attention call was matched to a cache: what its first consumers are."""
    seen, queue = set(), [cache]
    while queue and len(seen) < reach:
        node = queue.pop(0)
        if op(node) == "softmax":
            miss = written_out.get(node, NoMatch(UNKNOWN_FORM, node))
            return NoMatch(f"its attention is written out (matmul, softmax), and {miss.reason}", miss.node or node)
        if node not in seen and op(node) != "output":
            seen.add(node)
            queue.extend(node.users)
    return NoMatch("no scaled_dot_product_attention reads this cache directly", cache)


__all__ = ["CacheWrite", "cache_like", "cache_write_of", "is_packed"]
