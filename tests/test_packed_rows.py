"""Rows of a packed cache make way for another cache's, in place: what is read is what joining the rows would give."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from akvq_fx import PackedKV
from akvq_fx.kernels.layout import BLOCK, Layout
from akvq_fx.transformers_names import cache_of
from tests import zoo
from tests.kernel_cases import assert_close, assert_same, case_of, drifting, f32, randn
from tests.test_attend import attend, oracle
from tests.test_moved_blocks import LAYOUT, TEXT, packed
from tests.test_packed_kv import assert_reads, body_of, every_layout, on_codes, packed_of

WRITES = {
    "index_copy_": lambda pool, rows, new: pool.index_copy_(0, torch.tensor(rows), new),
    "index": lambda pool, rows, new: pool.__setitem__(torch.tensor(rows), new),
    "negative": lambda pool, rows, new: pool.__setitem__(torch.tensor(rows) - len(pool), new),
    "mask": lambda pool, rows, new: pool.__setitem__(torch.isin(torch.arange(len(pool)), torch.tensor(rows)), new),
    "all axes": lambda pool, rows, new: pool.__setitem__((torch.tensor(rows), ...), new),
}


def joined(pool, rows, new):
    """The same with a tensor of its own."""
    parts = [pool[i : i + 1] for i in range(len(pool))]
    for place, row in enumerate(rows):
        parts[row] = new[place : place + 1]
    return torch.cat(parts)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@every_layout
def test_rows_are_replaced_in_place(layout, write):
    pool, new = packed_of(case_of(layout, B=3), owner=5), packed_of(case_of(layout, B=2, seed=4), owner=5)
    due, before = on_codes(joined, pool, [0, 2], new), new.dequantize()
    addresses = [b.data_ptr() for b in pool.storage.buffers]
    on_codes(write, pool, [0, 2], new)
    assert_reads("pool", due.dequantize(), pool)
    assert_reads("the new rows' cache", before, new)
    assert [b.data_ptr() for b in pool.storage.buffers] == addresses
    tokens = randn(3, 2, 5, layout.head_dim, dtype=layout.dtype)
    assert_reads("pool, longer", due.append(tokens).dequantize(), pool.append(tokens))


@every_layout
def test_a_shorter_request_is_padded_first(layout):
    pool, new = packed_of(case_of(layout, B=3)), packed_of(case_of(layout, B=1, T=7, seed=4))
    wide = F.pad(new, (0, 0, pool.shape[2] - 7, 0))
    due = joined(pool, [1], wide)
    on_codes(pool.index_copy_, 0, torch.tensor([1]), wide)
    assert_same("codes", body_of(due), body_of(pool))
    assert_reads("the new row", wide.dequantize(), pool[1:2])


@pytest.mark.parametrize("layout", [LAYOUT, TEXT], ids=["symmetric", "text"])
@pytest.mark.parametrize("lengths", [(170, 40), (170, 169), (300, 1), (40, 40)], ids=str)
def test_rows_bring_the_means_of_their_blocks(lengths, layout):
    """Attention over pool and new row equals torch's over what they dequantize to, also after many more tokens."""
    n, short = lengths
    values = dataclasses.replace(layout, blocks=False)
    pools = [packed(drifting(n, B=3), layout), packed(randn(3, 2, n, 16, seed=1), values)]
    rows = [packed(drifting(short, B=1) - 2, layout), packed(randn(1, 2, short, 16, seed=5), values)]
    rows = [F.pad(row, (0, 0, n - short, 0)) for row in rows]
    due = [body_of(joined(pool, [1], row)) for pool, row in zip(pools, rows, strict=True)]
    for pool, row, body in zip(pools, rows, due, strict=True):
        on_codes(pool.index_copy_, 0, torch.tensor([1]), row)
        assert_same("codes", body, body_of(pool))
    addresses = [b.data_ptr() for pool in pools for b in pool.storage.buffers]
    for pool, row in zip(pools, rows, strict=True):  # a second one finds buffers as it needs them
        on_codes(pool.index_copy_, 0, torch.tensor([2]), row)
    assert [b.data_ptr() for pool in pools for b in pool.storage.buffers] == addresses
    key, value = pools
    q = randn(3, 4, 3, 16, seed=2)
    for count in (0, 1, BLOCK + 6):
        new = randn(3, 2, count, 16, seed=count)
        key, value = (on_codes(lambda x, new=new: torch.cat([x, new], 2), x) for x in (key, value))
        caches, length = (key.storage.buffers, value.storage.buffers), key.shape[2]
        args = (q, *caches, length, None, None, False, None, None, None, key.layout_text, value.layout_text)
        assert_close("out", oracle(q, key.dequantize(), value.dequantize()), attend(*args))


def test_other_holders_keep_what_they_had():
    """A row that was chosen from the pool, rows that borrow its memory, and an affine map that two caches share."""
    layout = Layout(16, f32, body_bits=2, window=4, rotated=True, affine=True)
    pool, new = packed_of(case_of(layout, B=1)), packed_of(case_of(layout, B=1, seed=4))
    many, cut, before = pool.expand(3, -1, -1, -1), pool[:, :, 1:], pool.dequantize()
    pool.index_copy_(0, torch.tensor([0]), new)
    assert_reads("the many", before.expand(3, -1, -1, -1), many)
    assert_reads("the cut", before[:, :, 1:], cut)
    assert_reads("the pool", new.dequantize(), pool)


def test_what_cannot_be_replaced_is_refused():
    layout = Layout(16, f32, body_bits=2, window=4)
    pool, new = packed_of(case_of(layout, B=3)), packed_of(case_of(layout, B=2))
    before = pool.dequantize()
    for given in (packed_of(case_of(layout, B=2, T=7)), new.dequantize(), packed_of(case_of(layout, B=2), owner=3)):
        with pytest.raises(
            NotImplementedError, match="index_copy_ of rows from a PackedKV of the same layout and length"
        ):
            pool.index_copy_(0, torch.tensor([0, 1]), given)
    with pytest.raises(ValueError, match=r"2 rows of a packed cache cannot go to the \[1\] given numbers"):
        pool[torch.tensor([0])] = new
    with pytest.raises(IndexError):
        pool.index_copy_(0, torch.tensor([0, 3]), new)
    assert type(pool) is PackedKV
    assert_reads("pool", before, pool)


@torch.no_grad()
def test_a_request_takes_the_place_of_one_that_ended():
    """Each gets the tokens that it gets alone, uncompiled: greedy, of unequal prompts, with transformers' own cache."""
    model, _ = zoo.ZOO["llama"]()
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(10, 90, (n,), generator=draw) for n in (23, 17, 11, 9)]
    how = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": -1}
    due = [model.generate(x[None], attention_mask=torch.ones_like(x)[None], **how)[0, len(x) :] for x in prompts]
    model.compile(backend="akvq", options={"body_bits": 16, "rotate": True, "inner": "eager", "capacity_step": 16})

    def prompt(rows):
        """(cache, mask [B, T], next tokens [B], next positions [B]) of prompts that are padded in front."""
        longest = max(map(len, rows))
        mask = torch.stack([F.pad(torch.ones_like(x), (longest - len(x), 0)) for x in rows])
        ids = torch.stack([F.pad(x, (longest - len(x), 0)) for x in rows])
        out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        return cache_of(out), mask, out.logits[:, -1].argmax(-1), mask.sum(1)

    def steps(cache, mask, tokens, at, count):
        found = [tokens]
        for _ in range(count):
            mask = F.pad(mask, (0, 1), value=1)
            out = model(tokens[:, None], attention_mask=mask, position_ids=at[:, None], past_key_values=cache)
            tokens, at = out.logits[:, -1].argmax(-1), at + 1
            found.append(tokens)
        return mask, tokens, at, torch.stack(found, 1)

    cache, *rest = prompt(prompts[:3])
    mask, tokens, at, first = steps(cache, *rest, count=4)
    other, seen, token, position = prompt(prompts[3:])
    room = mask.shape[1] - seen.shape[1]
    for layer, new in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            pool = getattr(layer, name)
            on_codes(pool.index_copy_, 0, torch.tensor([1]), F.pad(getattr(new, name), (0, 0, room, 0)))
    mask[1], tokens[1], at[1] = F.pad(seen, (room, 0))[0], token[0], position[0]
    *_, then = steps(cache, mask, tokens, at, count=7)
    assert_same("first", torch.cat([first[0], then[0, 1:]]), due[0])
    assert_same("the one that ended", first[1], due[1][:5])
    assert_same("third", torch.cat([first[2], then[2, 1:]]), due[2])
    assert_same("the one that came", then[1], due[3][:8])
