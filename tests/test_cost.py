"""The symbolic cost model is what gets allocated: bytes of any layout, bits at the paper's settings, cache_stats."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import akvq_fx
from akvq_fx import cost
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.plan_layers import layout_of
from akvq_fx.transformers_names import cache_of
from tests.kernel_cases import LAYOUTS
from tests.zoo import ZOO


@pytest.mark.parametrize("name", list(LAYOUTS))
@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 3), heads=st.integers(1, 4), capacity=st.integers(0, 70), text=st.integers(0, 40))
def test_bytes_are_what_is_allocated(name, batch, heads, capacity, text):
    layout = LAYOUTS[name]
    allocated = layout.allocate(batch, heads, capacity, text if layout.text_bits else 0)
    expected = cost.bytes_of(layout).subs({cost.B: batch, cost.H: heads, cost.C: capacity, cost.CT: text})
    assert sum(b.numel() * b.element_size() for b in allocated) == int(expected)


PAPER = Layout(128, torch.float16, body_bits=2, window=128, pivots=15, body_clip=0.8, rotated=True)


def test_bits_of_the_papers_settings():
    """(143*16 + (T-143)*2.25)/T by the design's count; a salient token is in the body too."""
    assert cost.limit_bits(PAPER, heads=32) == pytest.approx(2.25, abs=0.005)
    for tokens in (735, 4096, 32768):
        counted = (143 * 16 + (tokens - 143) * 2.25) / tokens
        exact = float(cost.bits_per_element(PAPER, 32).subs(cost.T, tokens))
        assert counted < exact < counted + 143 * 2.25 / tokens + 0.02


@pytest.mark.parametrize(
    "head_dim, heads, layers, text",
    [(64, 3, 30, 0), (64, 3, 30, 0.055), (64, 2, 24, 0), (64, 1, 24, 0), (64, 8, 16, 0.07)]
    + [(128, 32, 32, 0.3), (128, 4, 28, 0.28), (80, 32, 32, 0.17), (256, 1, 18, 0.27)],
    ids=str,
)
def test_two_bits_take_at_most_2_6(head_dim, heads, layers, text):
    """The default recipe outside the tokens at 16 bits, metadata counted; text: share of text, 0 without images."""
    config = akvq_fx.AKVQConfig(window=0, pivots=0)
    has_vision, tokens = (
        text > 0,
        1476,
    )  # as in the small vision model's prompts; in shorter ones the keys' map weighs more
    halves = [
        layout_of(config, half, head_dim, torch.float16, has_vision and layer in config.tsa_layers, has_vision)
        for layer in range(layers)
        for half in ("keys", "values")
    ]
    bits = sum(cost.bits_at(layout, heads, tokens, 1 - text) for layout in halves) / len(halves)
    assert bits <= 2.6


def test_bits_fall_with_length():
    bits = cost.bits_per_element(PAPER, 32)
    assert sympy.diff(bits, cost.T).subs(cost.T, 1000) < 0


def test_cache_stats_agrees():
    torch._dynamo.reset()
    model, inputs = ZOO["llama"]()
    model.compile(backend="akvq", options={"inner": "eager", "window": 8, "pivots": 3})
    cache = cache_of(model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True))
    stats = akvq_fx.cache_stats(cache)
    sizes = {cost.B: 2, cost.H: 2, cost.C: 128, cost.CT: 0}
    expected = sum(
        int(cost.bytes_of(t.layout_of).subs(sizes)) for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert stats.packed_bytes == expected
    tokens = stats.tokens["PSA"]
    assert sum(tokens.values()) == 2 * (inputs["input_ids"].shape[1] + 2)
    assert tokens["padding"] == int((inputs["attention_mask"] == 0).sum())
