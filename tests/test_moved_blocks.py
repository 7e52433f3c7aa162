"""Tokens that leave the positions of their block: each keeps its block's mean, and tokens to come begin new ones."""

import dataclasses
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.kernels import append_cpu
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.layout import BLOCK, STATE_BLOCK, Layout, blocks_of
from akvq_fx.storage import Storage
from akvq_fx.transformers_names import cache_of
from tests import zoo
from tests.kernel_cases import assert_caches_same, assert_close, assert_same, drifting, f32, randn
from tests.test_attend import attend, oracle
from tests.test_blocks import written
from tests.test_packed_kv import body_of, on_codes

LAYOUT = Layout(16, f32, body_bits=2, window=BLOCK, symmetric=True, blocks=True)
TEXT = Layout(16, f32, body_bits=2, text_bits=4, window=BLOCK, blocks=True)


def packed(x: torch.Tensor, layout: Layout = LAYOUT) -> PackedKV:
    T = x.shape[2]
    storage = Storage(layout, written(layout, x, [T]), T, T, None)
    if layout.text_bits:
        storage.compact_text(T)
    return PackedKV.view_of(storage, T)


def sinks_and_recent(x, recent: int = 96):
    return torch.cat([x[:, :, :4], x[:, :, -recent:]], 2)


def padded_and_joined(x):
    other = x[:, :, : x.shape[2] // 2]
    return torch.cat([x, F.pad(other, (0, 0, x.shape[2] - other.shape[2], 0))])


MOVES = {
    "evicted": lambda x: x[:, :, 3:],
    "sinks and recent": sinks_and_recent,
    "every other": lambda x: x[:, :, ::2],
    "index": lambda x: x.index_select(2, torch.tensor([160, 0, 70, 5, 69, 159])),
    "backwards": lambda x: x.index_select(2, torch.arange(x.shape[2] - 1, -1, -1)),
    "mask": lambda x: x[:, :, torch.arange(x.shape[2]) % 3 != 1],
    "padded": lambda x: F.pad(x, (0, 0, 2, 0)),
    "twice": lambda x: torch.cat([x, x], 2),
    "split": lambda x: x.split(50, 2)[1],
    "moved again": lambda x: sinks_and_recent(sinks_and_recent(x)[:, :, 9:], 20),
    "rows": lambda x: sinks_and_recent(x)[[1, 0, 1]],
    "joined": padded_and_joined,
}
every_move = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)


@every_move
@pytest.mark.parametrize("layout", [LAYOUT, TEXT], ids=["symmetric", "text"])
def test_a_moved_cache_reads_as_the_moved_tokens(layout, move):
    """Of codes alone, to the bit; the ring and padding are as in caches without blocks (test_packed_kv.py)."""
    x = packed(drifting(170, B=2), layout)
    y = on_codes(move, x)
    assert isinstance(y, PackedKV) and y.layout_of == dataclasses.replace(layout, moved=True)
    assert_same("codes", move(body_of(x)), body_of(y))
    assert_same("where they came from", body_of(packed(drifting(170, B=2), layout)), body_of(x))


@every_move
def test_attention_over_moved_tokens(move):
    """Equals torch's over a plain tensor of what the cache dequantizes to; before and after tokens are appended."""
    values = dataclasses.replace(LAYOUT, blocks=False)
    key, value = move(packed(drifting(170, B=2))), move(packed(randn(2, 2, 170, 16, seed=1), values))
    q = randn(key.shape[0], 4, 3, 16, seed=2)
    for count in (0, 1, 70):
        new = randn(key.shape[0], 2, count, 16, seed=count)
        key, value = (on_codes(lambda x, new=new: torch.cat([x, new], 2), x) for x in (key, value))
        caches, length = (key.storage.buffers, value.storage.buffers), key.shape[2]
        args = (q, *caches, length, None, None, False, None, None, None, key.layout_text, value.layout_text)
        assert_close("out", oracle(q, key.dequantize(), value.dequantize()), attend(*args))


@every_move
def test_no_token_is_quantized_twice(move):
    """What codes say stays through moves, appends across blocks, crops among the moved tokens, and appends again."""
    y = move(packed(drifting(170, B=2)))
    due = body_of(y)
    for kept, seed in ((y.shape[2], 1), (y.shape[2] * 2 // 3, 2), (2, 3)):
        y = y[:, :, :kept]
        assert_same("cropped", due[:, :, :kept], body_of(y))
        for step in (1, 30, 1, 130):
            y = torch.cat(
                [y, drifting(200, B=2, seed=seed)[: y.shape[0], :, :step].repeat(2, 1, 1, 1)[: y.shape[0]]], 2
            )
            assert_same("appended", due[:, :, :kept], body_of(y)[:, :, :kept])
            due = body_of(y)


def test_blocks_begin_behind_a_crop_among_moved_tokens():
    """Numbers of blocks that dropped tokens were in are not taken for those of new ones."""
    first = [*range(128, 170), *range(128)]
    y = packed(drifting(170)).index_select(2, torch.tensor(first))[:, :, :60]
    due, means = body_of(y), y.storage["means"].clone()
    y = torch.cat([y, drifting(200, seed=1)], 2)
    assert_same("kept", due, body_of(y)[:, :, :60])
    block_of = y.storage["block_of"][0].tolist()
    assert block_of[:60] == [1] * 42 + [0] * 18 or block_of[:60] == [0] * 42 + [1] * 18
    assert block_of[60:260] == [2 + i // BLOCK for i in range(200)] and means.shape[2] >= 3


def test_tokens_to_come_go_on_in_the_last_tokens_block():
    """42 of 64 tokens were in it: 22 more are, and the next one begins a block, whose mean is of the 64 newest."""
    x, new = drifting(170), drifting(230)[:, :, 170:]
    y = sinks_and_recent(packed(x))
    b = lambda: ops.named(y.storage.buffers, y.layout_of)
    assert b()["block_of"][0, :100].tolist() == [0] * 4 + [1] * 54 + [2] * 42
    assert b()["block_of"][0, 100:128].tolist() == [2] * 22 + [3] * 6
    for t in range(24):
        y = torch.cat([y, new[:, :, t : t + 1]], 2)
        assert b()["means"][:, :, 3].any() == (t >= 22)
    newest = torch.cat([x, new[:, :, :23]], 2)[:, :, -BLOCK:]
    assert_close("mean", newest.mean(2), b()["means"][:, :, 3])
    ends_elsewhere = packed(x)[:, :, torch.arange(150)].storage
    assert ends_elsewhere["block_of"][0, 149:].tolist()[:2] == [2, 3], "the mean is that of other tokens to come"


def test_eviction_at_every_step(monkeypatch):
    """The newest tokens are as in a cache that is cut once at the end, blocks are few, and means follow the tokens."""
    monkeypatch.setattr(append_cpu, "refusal", lambda *_: "takes no moved tokens and sums means in another order")
    whole, x = packed(drifting(170)), drifting(600)
    y = whole
    for t in range(170, 600):
        new = x[:, :, t : t + 1]
        whole, y = torch.cat([whole, new], 2), torch.cat([sinks_and_recent(y), new], 2)
        assert y.storage["means"].shape[2] <= 6 and y.storage.capacity == 128
    assert_same("codes", sinks_and_recent(body_of(whole), 97), body_of(y))
    assert (body_of(y) - sinks_and_recent(x, 97)).square().mean().sqrt() < 0.6


def test_rows_begin_blocks_together():
    """Rows whose last blocks have room for different numbers of tokens: the first that is full ends all."""
    rows = [packed(drifting(170))[:, :, start:] for start in (10, 6)]
    rows[1] = rows[1][:, :, :160]  # at a position where 28 more fit
    rows[1] = torch.cat([rows[1][:, :, :150], drifting(10, seed=1)], 2)
    y = torch.cat(rows)
    block_of = y.storage["block_of"][:, 159:]
    assert torch.equal(block_of[0], block_of[1])
    due = [body_of(row) for row in rows]
    y = torch.cat([y, drifting(200, B=2, seed=2)], 2)
    assert_same("rows", torch.cat(due), body_of(y)[:, :, :160])


def test_rows_that_did_not_move_stay_where_they_were():
    x = packed(drifting(170, B=2))
    for y in (torch.cat([x, x]), x[[1, 0]], x.repeat(2, 1, 1, 1), x[:, :, :100], x.expand(2, -1, -1, -1)):
        assert not y.layout_of.moved


def test_one_capacity_step_at_a_time_takes_no_more_means():
    y = sinks_and_recent(packed(drifting(170)))
    for t in range(128):
        y = y.append(drifting(1, seed=t), step=1)
    assert y.storage.capacity == 228 and y.storage["means"].shape[2] <= 3 + blocks_of(128)


def test_a_cleared_cache_is_one_that_begins():
    y, x = sinks_and_recent(packed(drifting(170))), drifting(150, seed=1)
    y = torch.cat([y.zero_()[:, :, :0], x], 2)
    fresh = packed(x)
    assert_same("tokens", fresh.dequantize(), y.dequantize())
    assert y.storage["state"].tolist() == [*fresh.storage["state"].tolist(), 0]


def test_registration():
    y = sinks_and_recent(packed(drifting(170)))
    for at, x in ((torch.tensor([100]), randn(1, 2, 1, 16)), (torch.arange(100, 128), randn(1, 2, 28, 16))):
        torch.library.opcheck(ops.append, (y.storage.buffers, x, at, None, None, y.layout_text))
    torch.library.opcheck(ops.dequantize, (y.storage.buffers, 100, y.layout_text))
    cache, q = y.storage.buffers, randn(1, 4, 1, 16)
    args = (q, cache, cache, 100, None, None, False, None, None, None, y.layout_text, y.layout_text)
    torch.library.opcheck(attend, args)


def test_bytes_are_counted():
    y = sinks_and_recent(packed(drifting(170)))
    plain = dict(y.storage.named())
    assert {"block_of", "means"} <= plain.keys()
    assert akvq_fx.cache_stats([y]).packed_bytes == sum(b.numel() * b.element_size() for b in plain.values())


@every_move
def test_saved_and_loaded_it_goes_on_as_before(move, tmp_path):
    x = move(packed(drifting(170, B=2)))
    x = torch.cat([x, drifting(7, B=1, seed=2).expand(x.shape[0], -1, -1, -1)], 2)
    PackedKV.save({"x": x, "cropped": x[:, :, :2]}, tmp_path / "f")
    loaded = PackedKV.load(tmp_path / "f")
    for one, other in ((x[:, :, :2], loaded["cropped"]), (x, loaded["x"])):
        for count in (1, 130):
            new = randn(x.shape[0], 2, count, 16, seed=count)
            one, other = torch.cat([one, new], 2), torch.cat([other, new], 2)
            assert_caches_same(one.storage.buffers, other.storage.buffers, one.layout_of)


WRONG = {
    "block-past-means": ("block_of", (0, 3), 9, "'block_of', prompt is 9"),
    "block-negative": ("block_of", (0, 0), -1, "'block_of', prompt is -1"),
    "block-of-tokens-to-come": ("block_of", (0, 5), 3, "'block_of', prompt is 3"),
    "another-block-to-come": ("block_of", (0, 127), 2, "'block_of', after the prompt is 2"),
    "shift-of-less": ("state", (STATE_BLOCK,), -101, "block times 64 less position is -101"),
    "shift-of-more": ("state", (STATE_BLOCK,), 93, "block times 64 less position is 93"),
    "shift-of-others": ("state", (STATE_BLOCK,), 6, "'block_of', after the prompt"),
}


@pytest.mark.parametrize("field, place, number, text", WRONG.values(), ids=WRONG)
def test_files_with_other_blocks_are_refused(field, place, number, text, tmp_path):
    """100 tokens of 128 in 3 blocks, 22 more fit in the last one, and one block more has a mean."""
    y = sinks_and_recent(packed(drifting(170)))
    assert y.storage["means"].shape[2] == 4
    y.storage[field][place] = number
    with pytest.raises(ValueError, match=text):
        PackedKV.save({"y": y}, tmp_path / "f")


@functools.cache
def model_of(compiled: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "LAYERS", 2)
        model, _ = zoo.ZOO["llama"]()
    if compiled:
        model.compile(backend="akvq", options={"recipe": "akvq"})
    return model


def mapped(cache, op):
    return DynamicCache([(op(layer.keys), op(layer.values)) for layer in cache.layers])


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_user_evicts_pads_and_joins():
    """Between calls, with default options: nothing leaves the codes, the model computes on them what it does on plain
    tensors of what they dequantize to, and all moves together cost one graph more."""
    model, plain = model_of(True), model_of(False)
    ids = torch.randint(10, 90, (2, 150), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    cache = cache_of(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how))
    made = []
    for name in ("sinks and recent", "every other", "padded", "joined"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = mapped(cache, MOVES[name])
        assert all(layer.keys.layout_of.moved and layer.keys.layout_of.uneven for layer in cache.layers)
        for step in range(3):
            tokens = ids[:1, step : step + 1].expand(cache.layers[0].keys.shape[0], 1)
            mask = torch.ones(len(tokens), cache.get_seq_length() + 1, dtype=torch.long)
            mask[-1, 0] = 0
            with torch.no_grad():
                got = model(tokens, past_key_values=cache, attention_mask=mask).logits
                seen = mapped(cache, lambda x: x.dequantize()[:, :, :-1])  # the new one has pushed one out of the ring
                due = plain(tokens, past_key_values=seen, attention_mask=mask).logits
            torch.testing.assert_close(got, due, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        made.append(graphs())
    assert all(isinstance(layer.keys, PackedKV) for layer in cache.layers)
    assert made == made[:1] * 4
    text = ids[:1, :1].expand(4, cache.get_seq_length() + 1)  # generate reads only its end: the rest is in the cache
    out = model.generate(input_ids=text, past_key_values=cache, attention_mask=torch.ones_like(text), **how)
    assert isinstance(cache_of(out).layers[0].keys, PackedKV)
