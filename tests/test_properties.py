"""Any mix of spellings is packed or refused, never wrong: prompt and steps equal the eager model's."""

import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import akvq_fx
from akvq_fx.packed_kv import PackedKV
from tests import attention_models as models
from tests.attention_models import Attention, Decoder, evidence, mixed

# an example compiles a model: a failing one is shown as found, shrinking it would take minutes
phases = (Phase.explicit, Phase.reuse, Phase.generate)
slow = settings(max_examples=6, deadline=None, phases=phases, suppress_health_check=[HealthCheck.too_slow])

WRITES = (
    Attention,
    models.CatTuple,
    models.Concat,
    models.FlatStart,
    models.Direct,
    models.StaticIndexCopy,
    models.StaticSetItem,
    models.SlidingSlice,
)
READS = (
    Attention,
    models.UnsqueezeFlatten,
    models.Interleave,
    models.EnableGqa,
    models.TiledRepeat,
    models.EagerSoftmax,
    models.WrittenOut,
)
MASKS = (Attention, models.BoolMask, models.FloatMask, models.PerHeadMask)
ROPES = (Attention, models.RopeInterleaved, models.RopePartial, models.RopeComplex, models.NoRope)
NORMS = (Attention, models.NormBefore, models.NormAfter)
PROJECTIONS = (Attention, models.FusedSplit, models.FusedSlices, models.FusedChunk, models.FusedView)
OUTPUTS = (Attention, models.Unflatten, models.ChannelMajor, models.Gated)


@st.composite
def spellings(draw):
    """An attention class with one spelling of each kind, and padding where its masks carry it."""
    write, read, projection = (draw(st.sampled_from(axis)) for axis in (WRITES, READS, PROJECTIONS))
    mask, rope, norm, output = (draw(st.sampled_from(axis)) for axis in (MASKS, ROPES, NORMS, OUTPUTS))
    if read is models.EagerSoftmax and write in (models.StaticIndexCopy, models.StaticSetItem):
        read = Attention  # its own causal mask knows no free slots
    kv_heads = 4 if projection is models.FusedChunk else draw(st.sampled_from([1, 2, 4]))
    dim = draw(st.sampled_from([8, 16, 24] if rope is models.RopePartial else [8, 12, 16, 24]))
    sizes = {"kv_heads": kv_heads, "dim": dim, "bias": draw(st.booleans())}
    attention = mixed(mask, write, read, rope, norm, projection, output, **sizes)
    pads = write is not models.SlidingSlice and read is not models.EagerSoftmax
    return attention, draw(st.sampled_from([0, 2])) if pads else 0


def check(drawn, options: dict, tolerance: float, prompt: int) -> None:
    attention, pad = drawn
    seen = evidence(Decoder(attention), options, prompt=prompt, pad=pad)
    assert seen.error <= tolerance, (seen.error, str(akvq_fx.report(seen.model)))
    packed = [isinstance(t, PackedKV) for t in seen.cache[0]]
    report = akvq_fx.report(seen.model)
    event("packed" if all(packed) else "refused")
    assert all(packed) == bool(report.packed) == (not report.refused)
    assert all(row.reason for row in report.refused)


@slow
@given(spellings(), st.integers(3, 9))
def test_lossless_is_never_wrong(drawn, prompt):
    torch._dynamo.reset()
    check(drawn, models.LOSSLESS, 2e-6, prompt)


@slow
@given(spellings(), st.sampled_from(["fold", "online"]), st.integers(3, 9))
def test_two_bits_within_the_window_are_never_wrong(drawn, rotation, prompt):
    torch._dynamo.reset()
    check(drawn, {"tsa_layers": (), "value_rotation": rotation}, 1e-3, prompt)
