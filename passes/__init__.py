"""Passes: verbs that rewrite one graph, in the order of PIPELINE. Each returns a PassReport."""

if not __name__.startswith("akvq_fx."):
    raise ImportError(f"import akvq_fx.passes, not {__name__}: its ops would register twice")

from akvq_fx.passes.attend_packed import attend_packed
from akvq_fx.passes.batch_axes import batch_axes
from akvq_fx.passes.canonicalize import canonicalize
from akvq_fx.passes.clean_up import clean_up
from akvq_fx.passes.exchange_axes import exchange_axes
from akvq_fx.passes.exchange_buffers import exchange_buffers
from akvq_fx.passes.find_sites import find_sites
from akvq_fx.passes.fold_values import fold_values
from akvq_fx.passes.fuse_rotations import fuse_rotations
from akvq_fx.passes.mask_dropped import mask_dropped
from akvq_fx.passes.pack_caches import pack_caches
from akvq_fx.passes.plan_layers import plan_layers
from akvq_fx.passes.prefer_causal import prefer_causal
from akvq_fx.passes.read_unmatched import read_unmatched
from akvq_fx.passes.rewrite_attention import rewrite_attention
from akvq_fx.passes.rotate_queries_keys import rotate_queries_keys
from akvq_fx.passes.rotate_values import rotate_values
from akvq_fx.passes.split_decode import split_decode

DISABLE = "TORCH_AKVQ_DISABLE"  # environment variable: passes that do not run, to find the one that changes an answer
PIPELINE = (
    canonicalize,  # one spelling, so that patterns stay few
    batch_axes,  # calls of three or five axes too
    exchange_axes,  # caches of other axes become [B, H, T, D] inside the graph
    rewrite_attention,  # attention that a model writes out becomes a call
    find_sites,  # only reads: which attention calls go over a cache
    plan_layers,  # bits per token class, layouts
    exchange_buffers,  # sites over buffers of the caller's leave the list: their graph stays as it is
    fold_values,  # before packing: a layout says whether its buffers are rotated
    mask_dropped,  # before both: positions are slots from here on
    pack_caches,  # writes
    attend_packed,  # reads
    prefer_causal,  # after it: what is left is prompts
    rotate_queries_keys,  # after both: by now every pack, append and attend is in the graph
    rotate_values,
    read_unmatched,  # packed caches whose reader was not matched above
    fuse_rotations,  # after the last pass that uses rotated tokens
    clean_up,
    split_decode,  # last: it reads the finished graph
)


def check_order(pipeline) -> None:
    """Raise AssertionError where a pass is before one that it follows, or before every one that gives what it needs.

    Facts are the fields of GraphState (passes/state.py) that passes fill; a pass reads its `needs` and writes its
    `gives`.
    """
    done: set[str] = set()
    facts: set[str] = set()
    for step in pipeline:
        missing = sorted(set(step.follows) - done)
        if missing:
            raise AssertionError(f"{step.__name__} follows {missing}, which stand behind it")
        missing = sorted(set(step.needs) - facts)
        if missing:
            raise AssertionError(f"{step.__name__} needs {missing}, which no pass before it gives")
        done.add(step.__name__)
        facts.update(step.gives)


def without(pipeline, text: str) -> tuple:
    """The pipeline without the passes that `text` names, separated by commas: the value of TORCH_AKVQ_DISABLE.

    Raises ValueError for a name that no pass has, and for a pass without which results would be wrong.
    """
    named = {name.strip() for name in text.split(",")} - {""}
    optional = [step.__name__ for step in pipeline if not hasattr(step, "required")]
    for name in sorted(named - set(optional)):
        reasons = [f"{name} cannot be switched off: {step.required}" for step in pipeline if step.__name__ == name]
        reason = reasons[0] if reasons else f"{name!r} is no pass"
        raise ValueError(f"{DISABLE}={text}: {reason}; accepted: {', '.join(optional)}, separated by commas")
    return tuple(step for step in pipeline if step.__name__ not in named)


check_order(PIPELINE)
