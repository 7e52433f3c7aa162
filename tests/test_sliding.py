"""Sliding windows: caches that keep their last tokens stay packed, exact and bounded, and quantize no token twice."""

import io
import itertools

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import akvq_fx
from akvq_fx import PackedKV, sliding
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.layout import BLOCK, SLACK, STATE_END, STATE_RING, Layout
from akvq_fx.packed_kv import Storage
from akvq_fx.transformers_names import cache_argument, cache_of
from tests.attention_models import LOSSLESS, Decoder, SlidingReadsLast, SlidingSlice, WindowMask, mixed, token_ids
from tests.kernel_cases import assert_close, assert_same, drifting, f32, randn
from tests.test_cuda_graph import PLAIN, SMALL, recorder  # noqa: F401 - a fixture
from tests.test_packed_kv import body_of

REACH = BLOCK + 1  # a window keeps BLOCK tokens
STEPS = 2 * SLACK + 10  # of a full window: codes move to the front twice
EVERY_PART = {
    "lossless": Layout(16, f32),
    "ring": Layout(16, f32, body_bits=2, window=24, pivots=3),
    "text": Layout(16, f32, body_bits=2, text_bits=4, window=8),
    "blocks": Layout(16, f32, body_bits=2, window=BLOCK, symmetric=True, blocks=True, pivots=2),
}
every_layout = pytest.mark.parametrize("layout", EVERY_PART.values(), ids=EVERY_PART)


# storage


def sliding_cache(x: torch.Tensor, layout: Layout, room: int = 256) -> PackedKV:
    """A window as the backend makes it of its first tokens x [B, H, T, D]; their first two are pivots."""
    B, T = x.shape[0], x.shape[2]
    at, pivots = torch.arange(T), torch.arange(2, dtype=torch.int32).expand(B, -1) if layout.pivots else None
    buffers = ops.pack(x, at, torch.ones(B, T, dtype=torch.uint8), pivots, None, max(room, T), str(layout))
    storage = Storage(layout, buffers, T, 0, None)
    storage.slides = True
    storage.mark_dynamic()
    return PackedKV.view_of(storage, T)


def dropped(x: PackedKV, count: int) -> PackedKV:
    """All but the first `count` tokens, as a decode step returns them."""
    storage, length = x.storage, x.shape[2] - count
    storage.end = x.end
    return sliding.move_to_front(PackedKV.view_of(storage, length, x.end - length))


@every_layout
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), min_size=1, max_size=12), st.booleans())
def test_any_appends_and_drops_leave_the_tokens_as_a_plain_tensor_has_them(layout, schedule, held):
    """Codes are those of a cache that drops nothing, to the bit; `held`: a view of the first step stays alive."""
    x = drifting(60 + sum(q for q, _ in schedule), B=2)
    window, whole, first = sliding_cache(x[:, :, :60], layout), sliding_cache(x[:, :, :60], layout), 0
    views, end = [], 60
    for q, drop in schedule:
        window, whole = window.append(x[:, :, end : end + q]), whole.append(x[:, :, end : end + q])
        end += q
        count = min(drop, window.shape[2] - 1)
        window, first = dropped(window, count), first + count
        views = views or ([(window, body_of(window).clone())] if held else [])
        expected = whole.dequantize()[:, :, first:]
        assert window.shape == expected.shape
        assert_same("tokens", expected, window.dequantize())
        assert_same("codes", body_of(whole)[:, :, first:], body_of(window))
        assert_same("classes", whole.classes()[:, first:], window.classes())
        assert (
            window.first <= SLACK and window.storage.capacity <= 2 * -(-(window.shape[2] + 1 + SLACK) // SLACK) * SLACK
        )
        assert int(window.storage["state"][STATE_END]) == window.end == window.storage.end
        assert 0 <= int(window.storage["state"][STATE_RING]) <= window.end
    for view, codes in views:
        assert_same("an older view", codes, body_of(view))


@every_layout
def test_attention_leaves_out_what_was_dropped(layout):
    x, q = drifting(300, B=2), randn(2, 4, 1, 16, seed=3)
    window, values = (sliding_cache(t[:, :, :60], layout) for t in (x, x.flip(3)))
    for start in range(60, 300, 30):
        window, values = (
            dropped(w.append(t[:, :, start : start + 30]), 30) for w, t in ((window, x), (values, x.flip(3)))
        )
        mask = (torch.arange(window.end) >= window.first)[None, None, None]
        caches, text = (window.storage.buffers, values.storage.buffers), str(layout)
        out = torch.ops.akvq.attend(q, *caches, window.end, mask, None, False, None, None, None, text, text)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, window.dequantize(), values.dequantize(), enable_gqa=True
        )
        assert_close("attention", expected, out)


@every_layout
def test_buffers_stay_where_they_are(layout):
    x = drifting(600, B=1)
    window = sliding_cache(x[:, :, :60], layout)
    places = [b.data_ptr() for b in window.storage.buffers]
    for at in range(60, 600):
        window = dropped(window.append(x[:, :, at : at + 1]), 1)
    assert [b.data_ptr() for b in window.storage.buffers] == places
    assert window.storage.capacity == 256


MOVES = {
    "crop": lambda x: x[:, :, :-5],
    "last": lambda x: x[:, :, -9:],
    "rows": lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    "repeat": lambda x: x[:1].expand(3, -1, -1, -1),
    "joined": lambda x: torch.cat([x, x]),
    "padded": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 0)),
    "copy": torch.clone,
    "saved": lambda x: torch.load(saved(x), weights_only=False),
}


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


@every_layout
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_happens_outside_a_graph_happens_to_the_tokens_that_are_left(layout, move):
    x = drifting(160, B=2)
    window = dropped(sliding_cache(x[:, :, :150], layout), 100).append(x[:, :, 150:])
    assert window.first == 100
    after = move(window)
    assert isinstance(after, PackedKV)
    assert_same(
        "tokens", move(window.dequantize()) if move is not MOVES["saved"] else window.dequantize(), after.dequantize()
    )
    more = after.append(x[:1, :, :3].expand(after.shape[0], -1, -1, -1))
    assert more.shape[2] == after.shape[2] + 3


def test_a_saved_window_holds_the_tokens_that_are_left(tmp_path):
    x = drifting(160, B=2)
    window = dropped(sliding_cache(x, EVERY_PART["blocks"]), 100)
    PackedKV.save({"keys": window}, tmp_path / "cache.safetensors")
    (loaded,) = PackedKV.load(tmp_path / "cache.safetensors").values()
    assert loaded.first == 0
    assert_same("tokens", window.dequantize(), loaded.dequantize())


# decoders


def decode(model, ids, cuts):
    """Logits of each part of the tokens between cuts, and the cache, which knows no positions."""
    cache, logits = None, []
    with torch.no_grad():
        for a, b in zip([0, *cuts[:-1]], cuts, strict=True):
            out, cache = model(ids[:, a:b], cache, None, torch.arange(a, b))
            logits.append(out[:, -1])
    return torch.stack(logits, 1), cache


def compiled(attention, options):
    torch._dynamo.reset()
    return torch.compile(Decoder(attention), backend="akvq", options={"inner": "eager", **options})


def parts(*counts: int, steps: int = STEPS) -> list[int]:
    """Where a prompt, chunks and single steps end."""
    return list(itertools.accumulate((*counts, *[1] * steps)))


@pytest.mark.parametrize("window", [SlidingSlice, SlidingReadsLast])
def test_lossless_equals_the_model_whatever_the_prompt_and_the_batch(window):
    """Shorter than the window and longer, with chunks of tokens between steps; addresses and slots move meanwhile."""
    attention = mixed(window, reach=REACH)
    plain, model = Decoder(attention), compiled(attention, LOSSLESS)
    for batch, cuts in ((2, parts(9)), (3, parts(90, 5, 1, 1, 200, steps=70)), (2, parts(BLOCK, 1, 2, steps=1))):
        ids = token_ids(batch, cuts[-1], seed=batch)
        expected, kept = decode(plain, ids, cuts)
        logits, cache = decode(model, ids, cuts)
        assert_close("logits", expected, logits)
        for pair, plain_pair in zip(cache, kept, strict=True):
            for packed, tensor in zip(pair, plain_pair, strict=True):
                assert isinstance(packed, PackedKV) and packed.shape == tensor.shape
                assert packed.storage.capacity <= 3 * SLACK
                assert_close("kept", tensor, packed.dequantize())


@pytest.mark.parametrize("prompt", [20, 2 * BLOCK])
@pytest.mark.parametrize("recipe", ["akvq", "akvq-even"])
def test_two_bits_equal_those_of_a_cache_that_keeps_and_masks_all(recipe, prompt):
    """To the rounding of attention: codes, means of blocks and the tokens at 16 bits are those of the whole cache."""
    cuts, options = parts(prompt, steps=BLOCK + SLACK), {"recipe": recipe, "window": 16}
    ids = token_ids(2, cuts[-1])
    (masked, whole), (logits, window) = (
        decode(compiled(mixed(kind, reach=REACH), options), ids, cuts) for kind in (WindowMask, SlidingSlice)
    )
    assert_close("logits", masked, logits)
    for pair, long_pair in zip(window, whole, strict=True):
        for packed, long in zip(pair, long_pair, strict=True):
            assert packed.shape[2] == BLOCK < long.shape[2]
            assert packed.layout_text == long.layout_text


def test_a_captured_step_is_replayed_over_the_whole_window(recorder):  # noqa: F811
    attention = mixed(SlidingSlice, reach=REACH)
    plain, model = Decoder(attention, layers=2), Decoder(attention, layers=2)
    captured = torch.compile(model, backend="akvq", options={**SMALL, "body_bits": 16, "capacity_step": 128})
    cuts = parts(90)
    ids = token_ids(2, cuts[-1])
    expected, _ = decode(plain, ids, cuts)
    logits, _ = decode(captured, ids, cuts)
    assert_close("logits", expected, logits)
    (step,) = [graph for graph in akvq_fx.report(model).graphs if graph.kind == "decode"]
    assert step.capture.captured == 1 and step.capture.replayed == STEPS - 1
    del logits, _  # the next cache moves into its buffers, with the views that a window's storage has
    logits, cache = decode(captured, ids, cuts)
    assert_close("later logits", expected, logits)
    (step,) = [graph for graph in akvq_fx.report(model).graphs if graph.kind == "decode"]
    assert step.capture.captured == 1 and step.capture.reused == 1
    assert all(x.codes is x.storage["codes"] for pair in cache for x in pair)


# models of transformers, as users run them

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "bos_token_id": 1,
         "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip


def family(name: str):
    torch.manual_seed(0)
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=3, layer_types=kinds, sliding_window=24)
        return transformers.Gemma3ForCausalLM(config).eval()
    config = transformers.MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=24)
    return transformers.MistralForCausalLM(config).eval()


def generated(model, ids, tokens, **options):
    """Greedy, the first row left-padded by a third."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    options |= {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_generate_is_token_identical_past_the_window(name):
    """Prompts longer and shorter than the window, of several batch sizes."""
    model = family(name)
    cases = [(token_ids(2, 60).clamp(2), STEPS), (token_ids(4, 9).clamp(2), 40), (token_ids(3, 24).clamp(2), 40)]
    expected = [generated(model, *case).sequences for case in cases]
    model.compile(backend="akvq", options={"body_bits": 16, "inner": "eager"})
    for case, sequences in zip(cases, expected, strict=True):
        out = generated(model, *case)
        assert torch.equal(out.sequences, sequences)
        for layer in cache_of(out).layers:
            assert isinstance(layer.keys, PackedKV) and isinstance(layer.values, PackedKV)
            assert not layer.is_sliding or layer.keys.shape[2] == 23 and layer.keys.storage.capacity <= 2 * SLACK
    report = akvq_fx.report(model)
    assert not report.refused and len(report.packed) == 2 * model.config.num_hidden_layers


def test_a_window_fills_with_default_options():
    """Inductor compiles a step before the window is full, where guards make one symbol of many, and one after."""
    model, case = family("gemma3"), (token_ids(2, 9).clamp(2), 20)
    expected = generated(model, *case).sequences
    model.compile(backend="akvq", options={"body_bits": 16})
    assert torch.equal(generated(model, *case).sequences, expected)
    assert not akvq_fx.report(model).refused


def test_beams_and_a_second_turn_continue_a_window():
    """Rows are selected between steps; a second prompt comes in one chunk after the window is full."""
    model, ids = family("mistral"), token_ids(2, 30).clamp(2)

    def talk():
        beams = generated(model, ids, 40, num_beams=2)
        first = generated(model, ids, 40)
        more = torch.cat([first.sequences, token_ids(2, 11, seed=1).clamp(2)], 1)
        mask = torch.ones_like(more)
        mask[0, :10] = 0
        cache = {cache_argument(model): cache_of(first)}
        second = model.generate(input_ids=more, attention_mask=mask, max_new_tokens=20, do_sample=False, **cache)
        return beams.sequences, second

    expected = talk()
    model.compile(backend="akvq", options={"body_bits": 16, "inner": "eager"})
    for plain, packed in zip(expected, talk(), strict=True):
        assert torch.equal(plain, packed)
    assert not akvq_fx.report(model).refused
