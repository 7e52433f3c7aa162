"""Decoders in mixtures of what people write (tests/drawn_decoders.py): each is packed, or refused with a reason; it is
never wrong and never raises. AKVQ_DRAWN=200 draws that many instead of a few; the share that was refused is printed.
"""

import collections
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.drawn_decoders import Choice, drawn, play

TOLERANCE = 1e-5
DRAWS = int(os.environ.get("AKVQ_DRAWN", 4))
BY_NUMBER = {"position": "int"}

PACKED = {
    "static, heads in channels, written out": Choice(axes="bt(hd)", write="index_copy_", attend="written"),
    "static, tokens first, by einsum": Choice(axes="tbhd", write="index_put_", attend="direct", product="einsum"),
    "a slice by numbers, read up to its end": Choice(write="x[:, :, a:b] = new", prefix=True, **BY_NUMBER),
    "copy_ into a narrow": Choice(axes="bthd", write="narrow().copy_", container="dicts", **BY_NUMBER),
    "copy_ into a slice": Choice(write="x[:, :, a:b].copy_", **BY_NUMBER),
    "the result of scatter_": Choice(write="scatter_", container="dataclasses"),
    "the caller's buffers": Choice(axes="bthd", write="index_copy_", owner="caller"),
    "the module's buffers": Choice(axes="bthd", write="x[:, :, a:b] = new", owner="module", **BY_NUMBER),
    "a slice, tokens before heads": Choice(axes="bthd", write="x[:, :, a:b] = new", prefix=True, **BY_NUMBER),
    "three axes": Choice(attend="sdpa 3-d", group="interleave"),
    "three axes, a window, a mask of rows": Choice(
        attend="sdpa 3-d", mask="-inf", shape="[B, H, q, T]", window="slice"
    ),
    "keys and values stacked": Choice(together="stacked", attend="written"),
    "keys and values fused, a window": Choice(together="split", window="slice"),
    "keys and values in one buffer": Choice(together="unbound", axes="bthd", write="x[:, :, at] = new"),
    "five axes, a mask of heads": Choice(attend="sdpa 5-d", mask="alibi", shape="[B, H, q, T]"),
}
PARTS = "keys and values, or several layers, are parts of one tensor"
REFUSED = {
    "made anew": (Choice(write="where"), "the cache is made anew by where"),
    "written through a view": (Choice(write="index_put_", padded=True), "the cache is written by index_put_"),
    "keys and values in one buffer of the caller's": (
        Choice(together="stacked", write="index_copy_", owner="caller"),
        f"{PARTS}, accepted of a buffer that the caller owns",
    ),
    "keys and values made anew together": (Choice(together="fused", write="where"), f"{PARTS}, and the cache is made"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    seen = play(PACKED[name], batches=(2,), layers=1)
    assert seen.error <= TOLERANCE and all(seen.packed), seen.report
    assert seen.packed and not seen.reasons and seen.graphs == 2


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    choice, reason = REFUSED[name]
    seen = play(choice, batches=(3,), layers=1)
    assert seen.error == 0 and not any(seen.packed)
    assert any(reason in row for row in seen.reasons), seen.reasons


@pytest.mark.parametrize("write", ["index_copy_", "x[:, :, a:b] = new"])
def test_axes_of_a_static_cache_change_no_code(write):
    """At 2 bits too: a cache that went back to 16 bits and was packed again would have other codes."""
    options = {"body_bits": 2, "window": 4, "pivots": 1, "tsa_layers": ()}
    results = []
    for axes in ("bhtd", "bthd"):
        choice = Choice(axes=axes, write=write, position="int")
        seen = play(choice, batches=(2,), sizes=(1,) * 6, layers=1, options=options, compare=False)
        assert all(seen.packed) and not seen.reasons
        results.append(torch.cat(seen.logits, 1))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


kinds = collections.Counter()


@settings(
    max_examples=DRAWS,
    derandomize=DRAWS < 50,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # an example compiles a model: shrinking a failing one takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_any_decoder_is_packed_or_refused_with_a_reason(data):
    choice = drawn(lambda name, options: data.draw(st.sampled_from(options), label=name))
    seen = play(choice, batches=(1, 3) if DRAWS > 10 else (3,))
    assert seen.error <= TOLERANCE, (str(choice), seen.error, seen.reasons)
    packed = bool(seen.packed) and all(seen.packed)
    assert packed or seen.reasons, f"{choice}: neither packed nor refused"
    kinds["packed" if packed else "refused"] += 1


def test_share_refused(capsys):
    """Of the test before, which draws."""
    with capsys.disabled():
        print(f"\ndecoders drawn: {dict(kinds)}, refused {kinds['refused'] / max(1, kinds.total()):.0%}")
