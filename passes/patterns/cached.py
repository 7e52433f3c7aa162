"""The caches behind an attention call, and whether they make one packable cache."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false

from akvq_fx.kernels.layout import DTYPE_NAMES, Layout
from akvq_fx.passes.patterns.attention import prefix_of, suffix_of, ungrouped
from akvq_fx.passes.patterns.cache_write import ALLOCATIONS, CacheWrite, first_slot, is_cache_cat
from akvq_fx.passes.patterns.nodes import VIEW, NoMatch, is_shared, op, same_size, shape, value

FILL_USERS = (  # ops that may use a static cache that this graph allocates
    "index_copy_", "getitem", "unsqueeze", "expand", "repeat_interleave", "output",
    "scaled_dot_product_attention", "extended_attention", "size", "shape", "contiguous", "to",
)  # fmt: skip


def read_from(argument: Node) -> tuple[Node, object]:
    """The cache behind an attention argument, and how many of its tokens attention sees: the first ones of a static
    cache, the last ones of a growing one."""
    node = ungrouped(argument)
    last, length = suffix_of(node)
    if last is not node and is_cache_cat(last):
        return last, length
    cut, length = prefix_of(node)
    static = op(cut) in ("placeholder", *ALLOCATIONS) or VIEW in cut.meta
    return (ungrouped(cut), length) if static else (node, shape(node)[2] if len(shape(node)) == 4 else None)


def are_swapped(key: CacheWrite, val: CacheWrite) -> bool:
    """What is read as keys was packed as values, which have no classes of their own, or the other way round. A
    simulation keeps both as they are."""
    layouts = [Layout.parse(value(write.past).layout_text) for write in (key, val)]
    return not layouts[0].simulate and [layout.shares_classes for layout in layouts] != [False, True]


def fix_heads(*writes: CacheWrite | None) -> None:
    """Make the number of heads a plain number, which a layout needs: int() of a symbol adds a guard."""
    for write in writes:
        if write is not None:
            int(shape(write.whole)[1])


def check_caches(attention, key: CacheWrite | None, val: CacheWrite | None, length, value_length, dying=()) -> None:
    """Raises NoMatch where keys and values do not make one packable cache.

    dying   nodes that are about to be replaced, so that their uses of the caches do not count
    """
    cached = [("keys", key and key.whole), ("values", val and val.whole)]
    if key is None or val is None:
        what, which = ("keys", attention.key) if key is None else ("values", attention.value)
        raise NoMatch(f"the {what} reach attention through {op(ungrouped(which))}, not straight from the cache", which)
    for what, node in (("query", attention.query), ("mask", attention.mask), *cached):
        if is_shared(value(node)):
            raise NoMatch(f"the {what} of this attention: a DTensor, accepted: what this process has of it", node)
    if key.kind != val.kind or key.packed != val.packed:
        raise NoMatch(f"keys and values are cached differently ({key.kind} and {val.kind})", attention.node)
    for name, write in (("keys", key), ("values", val)):
        size = shape(write.whole)
        if not isinstance(size[3], int) or size[3] % 8:
            raise NoMatch(f"the head dim of the {name} is {size[3]}, accepted: a multiple of 8", write.whole)
        if value(write.whole).dtype not in DTYPE_NAMES:
            raise NoMatch(f"the {name} are {value(write.whole).dtype}, accepted: floating point", write.whole)
        others = [u for u in write.whole.users if u is not attention.node and u not in dying]
        if write.kind == "fill" and not all(op(u) in FILL_USERS for u in others):
            raise NoMatch("the static cache is used by another op too", write.whole)
    kept = [shape(write.returned)[2] for write in (key, val)]
    if (key.kept is None) != (val.kept is None) or all(isinstance(n, int) for n in kept) and kept[0] != kept[1]:
        raise NoMatch("the cache keeps another number of keys than of values", attention.node)
    if key.packed and not guard_or_false(first_slot(key.past) == first_slot(val.past)):
        raise NoMatch("keys and values lie in different slots of their buffers", attention.node)
    if key.packed and are_swapped(key, val):
        raise NoMatch("keys are read from what was packed as values, or values from keys", attention.node)
    heads, kv_heads = shape(attention.query)[1], shape(key.whole)[1]
    if heads % kv_heads or shape(val.whole)[1] != kv_heads:
        raise NoMatch(f"{heads} query heads do not divide into {kv_heads} KV heads", attention.node)
    lengths = shape(key.whole)[2], shape(val.whole)[2]
    # symbols are not compared: each cache input has a length symbol of its own
    if all(isinstance(n, int) for n in lengths) and lengths[0] != lengths[1]:
        raise NoMatch("keys and values differ in length", attention.node)
    if not guard_or_false(shape(attention.query)[0] == shape(key.whole)[0]):
        raise NoMatch("the query's batch is not the cache's", attention.node)
    # two inputs have two length symbols, of which the mask ties down the keys' alone: requiring equality adds a guard
    if key.static and not guard_or_false(length == value_length):
        raise NoMatch("attention sees more of the keys than of the values", attention.node)
    if key.static and attention.mask is None and same_size(length, shape(key.whole)[2]):
        raise NoMatch("a static cache is read without a mask: unwritten slots would be attended to", attention.node)
