"""Passes: verbs that rewrite one graph, in the order of PIPELINE. Each returns a PassReport of sites matched and missed."""

if not __name__.startswith("akvq_fx."):
    raise ImportError(f"import akvq_fx.passes, not {__name__}: its ops would register twice")

from akvq_fx.passes.attend_packed import attend_packed
from akvq_fx.passes.canonicalize import canonicalize
from akvq_fx.passes.clean_up import clean_up
from akvq_fx.passes.find_sites import find_sites
from akvq_fx.passes.fold_values import fold_values
from akvq_fx.passes.fuse_rotations import fuse_rotations
from akvq_fx.passes.pack_caches import pack_caches
from akvq_fx.passes.plan_layers import plan_layers
from akvq_fx.passes.read_unmatched import read_unmatched
from akvq_fx.passes.rotate_queries_keys import rotate_queries_keys
from akvq_fx.passes.rotate_values import rotate_values
from akvq_fx.passes.split_decode import split_decode

PIPELINE = (
    canonicalize,  # one spelling, so that patterns stay few
    find_sites,  # only reads: which attention calls go over a cache
    plan_layers,  # bits per token class, layouts
    fold_values,  # before packing: a layout says whether its buffers are rotated
    pack_caches,  # writes
    attend_packed,  # reads
    rotate_queries_keys,  # after both: every pack, append and attend is there to be turned
    rotate_values,
    read_unmatched,  # packed caches that nothing above answered for
    fuse_rotations,  # once nothing asks for turned tokens any more
    clean_up,
    split_decode,  # last: it reads the finished graph, and only for mode="reduce-overhead"
)


def check_order(pipeline) -> None:
    """Raise where a pass stands before one that it needs."""
    done: set[str] = set()
    for step in pipeline:
        missing = set(getattr(step, "needs", ())) - done
        if missing:
            raise AssertionError(f"{step.__name__} needs {sorted(missing)} before it")
        done.add(step.__name__)


check_order(PIPELINE)
