"""PackedKV acts on codes as a plain tensor on elements, keeps views apart, says when it reads through dequantize."""

import copy
import dataclasses
import io
import operator
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, StaticLayer

from akvq_fx import packed_ops
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.layout import PADDING, STATE_TEXT, TEXT, VISION, Layout, pack_bits
from akvq_fx.kernels.quantizer import dequantize, quantize
from akvq_fx.packed_kv import PackedKV, Storage
from tests.kernel_cases import (
    LAYOUTS,
    assert_caches_same,
    assert_close,
    assert_same,
    case_of,
    cases,
    f16,
    f32,
    randn,
    seeds,
)

some = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
TSA = Layout(16, f32, body_bits=2, text_bits=4, window=3, body_clip=0.8)
LOSSLESS = Layout(16, f16)


def packed_of(case, static: bool = False, owner: int | None = None) -> PackedKV:
    """The case as the runtime wraps it."""
    storage = Storage(case.layout, case.pack(), None if static else case.length, case.length, owner)
    if case.layout.text_bits:
        storage.compact_text(case.length)
    storage.mark_dynamic()
    return PackedKV.view_of(storage, case.capacity if static else case.length)


def tokens_for(x: PackedKV, count: int, seed: int = 7) -> torch.Tensor:
    return randn(x.shape[0], x.shape[1], count, x.shape[3], seed=seed, dtype=x.dtype)


def on_codes(fn, *args, module=packed_ops):
    """fn(*args), failing if anything in it reads codes as elements, through `plain_of` of the module."""

    def read(packed, op):
        raise AssertionError(f"{op} left the codes")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(module, "plain_of", read)
        return fn(*args)


def assert_reads(name: str, expected: torch.Tensor, x: PackedKV) -> None:
    assert type(x) is PackedKV, f"{name}: got {type(x).__name__}"
    assert x.codes.dtype == (x.layout_of.dtype if x.layout_of.lossless else torch.int16)
    assert x.dtype == expected.dtype
    # a rotation is a matrix product, whose last bit depends on the number of rows
    if expected.numel() and (x.layout_of.rotated or x.layout_of.affine):
        assert_close(name, expected, x.dequantize())
    else:
        assert_same(name, expected, x.dequantize())


def through_torch_save(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def mixed(x) -> torch.Tensor:
    """Row numbers in random order, one of them twice, some perhaps missing."""
    return torch.arange(x.shape[0] + 1).mul(2).add(1) % x.shape[0]


ROW_OPS = {
    "index_select": lambda x: x.index_select(0, mixed(x)),
    "index-ellipsis": lambda x: x[mixed(x), ...],
    "index-negative": lambda x: x[mixed(x) - x.shape[0]],
    "index-list": lambda x: x[mixed(x).tolist()],
    "bool-mask": lambda x: x[torch.arange(x.shape[0]) % 2 == 0],
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=0),
    "repeat_interleave-counts": lambda x: x.repeat_interleave(torch.arange(x.shape[0]) + 1, dim=0),
    "repeat": lambda x: x.repeat(3, 1, 1, 1),
    "slice-head": lambda x: x[:1],
    "slice-tail": lambda x: x[-1:],
    "narrow": lambda x: x.narrow(0, x.shape[0] - 1, 1),
    "split": lambda x: x.split(1)[-1],
    "split-sizes": lambda x: x.split([1, x.shape[0] - 1])[0],
    "chunk": lambda x: x.chunk(2)[0],
    "cat-batch": lambda x: torch.cat([x, x]),
    "cat-parts": lambda x: torch.cat([x[1:], x[:1]]),
}
SAME_OPS = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "detach": torch.detach,
    "to-cpu": lambda x: x.to("cpu"),
    "to-copy": lambda x: x.to("cpu", non_blocking=True, copy=True),
    "cpu": lambda x: x.cpu(),
    "contiguous": lambda x: x.contiguous(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch-save": through_torch_save,
    "all-rows": lambda x: x[:],
    "all-tokens": lambda x: x[:, :, : x.shape[2]],
    "all": lambda x: x[..., :, :],
    "cat-empty": lambda x: torch.cat([torch.tensor([], dtype=x.dtype), x], -2),
}
CROPS = {
    "negative": lambda x, n: x[..., : n - x.shape[2], :] if n < x.shape[2] else x,
    "count": lambda x, n: x[:, :, :n],
    "narrow": lambda x, n: x.narrow(2, 0, n),
    "below-zero": lambda x, n: x[:, :, : n - 2 * x.shape[2]] if n == 0 else x[:, :, :n],
}


@pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
@some
@given(case=cases())
def test_row_ops_move_codes(op, case):
    x = packed_of(case)
    before = x.dequantize()
    y = on_codes(op, x)
    assert_reads("rows", op(before), y)
    with torch.inference_mode():
        assert_reads("rows in inference mode", op(before), on_codes(op, x))
    new = tokens_for(x, 3)
    assert_reads("rows, then append", op(x.append(new).dequantize()), y.append(op(new)))


@pytest.mark.parametrize("op", SAME_OPS.values(), ids=SAME_OPS)
@some
@given(case=cases(), owner=st.none() | st.integers(-(2**63), 2**63 - 1))
def test_copies_hold_the_same_tokens(op, case, owner):
    x = packed_of(case, owner=owner)
    before, new = x.dequantize(), tokens_for(x, 2)
    y = on_codes(op, x)
    assert_reads("copy", before, y)
    assert (y.storage.owner, y.storage.end, y.storage.prompt) == (owner, case.length, case.length)
    with torch.inference_mode():
        assert_reads("copy in inference mode", before, on_codes(op, x))
    expected = packed_of(case).append(new).dequantize()
    assert_reads("copy, then append", expected, y.append(new))


@pytest.mark.parametrize("op", ["clone", "deepcopy", "to-copy", "pickle", "torch-save"])
@every_layout
def test_copies_are_apart(layout, op):
    x = packed_of(case_of(layout))
    y, before = SAME_OPS[op](x), x.dequantize()
    x[:, :, :4].append(tokens_for(x, 9))
    x.zero_()
    assert_reads("the copy", before, y)
    shared = {b.untyped_storage().data_ptr() for b in x.storage.buffers} & {
        b.untyped_storage().data_ptr() for b in y.storage.buffers if b.numel()
    }
    assert not shared


@pytest.mark.parametrize("op", [name for name in SAME_OPS if name not in ("to-cpu", "cpu", "contiguous")])
def test_copies_are_known_to_their_storage(op):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    before = x.dequantize()
    y = SAME_OPS[op](x)
    del x
    y[:, :, :4].append(tokens_for(y, 9))
    assert_reads("the copy, cropped and continued elsewhere", before, y)


@pytest.mark.parametrize("op", SAME_OPS.values(), ids=SAME_OPS)
def test_continuing_a_copy_leaves_the_original(op):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    before = x.dequantize()
    y = op(x)
    y = y[:, :, :4]
    y.append(tokens_for(y, 9))
    assert_reads("the original", before, x)


def test_deepcopy_of_shared_references_keeps_them_shared():
    x = packed_of(case_of(LAYOUTS["2bit"]))
    first, second = copy.deepcopy([x, x])
    assert first is second


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@some
@given(case=cases(), data=st.data())
def test_crop_is_a_length(crop, case, data):
    x = packed_of(case)
    n = data.draw(st.integers(0, case.length), label="kept")
    y = on_codes(crop, x, n)
    assert_reads("crop", x.dequantize()[:, :, :n], y)
    with torch.inference_mode():
        assert_reads("crop in inference mode", x.dequantize()[:, :, :n], on_codes(crop, x, n))
    assert y.codes.data_ptr() == x.codes.data_ptr()


@some
@given(case=cases(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), step=st.sampled_from((1, 16, 128)))
def test_append_equals_the_op(case, sizes, step):
    x = packed_of(case)
    total = case.length + sum(sizes)
    plain = packed_of(case).storage
    plain.grow(max(total, plain.capacity))
    for i, size in enumerate(sizes):
        new, at = tokens_for(x, size, i), torch.arange(x.shape[2], x.shape[2] + size)
        x = on_codes(x.append, new, step)
        ops.append(plain.buffers, plain.to_stored(new), at, None, None, str(case.layout))
    assert x.shape[2] == x.storage.end == total
    assert_same("tokens", ops.dequantize(plain.buffers, total, str(case.layout)), x.dequantize())
    assert x.storage.capacity == case.capacity or x.storage.capacity % step == 0


def test_cat_is_append_in_place():
    x = packed_of(case_of(LAYOUTS["2bit"], capacity=64))
    where = x.codes.data_ptr()
    y = on_codes(torch.cat, [x, tokens_for(x, 2), tokens_for(x, 1)], -2)
    assert y.shape[2] == 14
    assert y.codes.data_ptr() == where
    assert_reads(
        "cat", packed_of(case_of(LAYOUTS["2bit"])).append(tokens_for(x, 2)).append(tokens_for(x, 1)).dequantize(), y
    )


def stored_states(layout, stored, classes, pivots):
    """What each token may read as in the stored space, alone: its due bits outside the ring, and exact."""
    if layout.lossless:
        return stored, stored
    codes, range_ = ops.encode(stored, layout)
    due = ops.decode(pack_bits(codes, layout.body_bits), range_, layout)
    if layout.text_bits:
        text = quantize(stored, layout.text_bits, layout.text_clip, layout.groups)
        text = dequantize(*text, layout.text_bits, layout.dtype)
        due = torch.where((classes == TEXT)[:, None, :, None], text, due)
    for row in range(stored.shape[0]) if pivots is not None else ():
        kept = pivots[row][(pivots[row] >= 0) & (pivots[row] < stored.shape[2])].long()
        kept = kept[classes[row, kept] != PADDING]
        due[row, :, kept] = stored[row, :, kept]
    return due, stored


def body_of(x: PackedKV) -> torch.Tensor:
    """What the codes of a cache say in the stored space, whatever ring and pivots hold."""
    layout = dataclasses.replace(x.layout_of, window=0, pivots=0)
    b = ops.named(x.storage.held, x.layout_of)
    return ops.read([b[name] for name in layout.fields], x.end, layout)[:, :, x.first :]


def due_of(x: PackedKV, stored, classes) -> torch.Tensor:
    """What the codes of the last tokens, just written, say from now on. Where blocks have means, that is taken from the
    cache itself (test_blocks.py has what means are); else from the tokens."""
    if x.layout_of.blocks:
        return body_of(x)[:, :, x.shape[2] - stored.shape[2] :]
    return stored_states(x.layout_of, stored, classes, None)[0]


class Mirror:
    """A PackedKV and what is known about the tokens that it must hold: exact ones, what their codes say, their classes,
    and pivots [B, T] bool, those that must read as they were."""

    def __init__(self, view, stored, due, classes, pivots):
        self.view, self.stored, self.due, self.classes, self.pivots = view, stored, due, classes, pivots

    @property
    def known(self):
        return self.stored, self.due, self.classes, self.pivots

    @staticmethod
    def of(case):
        pivots = torch.zeros(case.classes.shape, dtype=torch.bool)
        for row in range(len(pivots)) if case.pivots is not None and case.layout.pivots else ():
            pivots[row, [p for p in case.pivots[row].tolist() if 0 <= p < case.length]] = True
        view = packed_of(case)
        due = due_of(view, case.x, case.classes)
        return Mirror(view, case.x, due, case.classes, pivots & (case.classes != PADDING))

    def check(self):
        layout, T = self.view.layout_of, self.view.shape[2]
        got = ops.read(self.view.storage.held, T, layout)
        exact = self.stored
        due = torch.where(self.pivots[:, None, :, None], exact, self.due)
        fits = ((got == due) | (got == exact)).flatten(2).view(*got.shape).all(-1)
        assert fits.all(), f"tokens that read as others: {torch.nonzero(~fits).tolist()[:5]} of {list(got.shape)}"

    def new_classes(self, count, kind=TEXT):
        return torch.full((self.stored.shape[0], count), kind, dtype=torch.uint8)

    def append(self, count, seed):
        new = tokens_for(self.view, count, seed)
        stored = self.view.storage.to_stored(new)
        view = torch.cat([self.view, new], -2)
        classes = self.new_classes(count)
        return self.longer(view, [self.known, (stored, due_of(view, stored, classes), classes, None)])

    @staticmethod
    def longer(view, parts):
        no = lambda classes: torch.zeros(classes.shape, dtype=torch.bool)
        stored, due, classes, pivots = zip(*parts, strict=True)
        pivots = [no(c) if p is None else p for p, c in zip(pivots, classes, strict=True)]
        return Mirror(view, torch.cat(stored, 2), torch.cat(due, 2), torch.cat(classes, 1), torch.cat(pivots, 1))

    def crop(self, n):
        known = (self.stored[:, :, :n], self.due[:, :, :n], self.classes[:, :n], self.pivots[:, :n])
        return Mirror(self.view[:, :, :n], *known)

    def rows(self, index):
        return Mirror(self.view[index, ...], *(x[index] for x in self.known))

    def expand(self, n):
        repeat = lambda x: x[:1].expand(n, *x.shape[1:])
        view = self.view[:1].expand(n, -1, -1, -1)
        return Mirror(view, *map(repeat, self.known))

    def copy(self):
        return Mirror(copy.deepcopy(self.view), *self.known)

    def take(self, index, view):
        pivots = self.pivots[:, index]
        if len(set(index)) < len(index):
            pivots = torch.zeros_like(pivots)  # a pivot that comes twice is one once
        return Mirror(view, self.stored[:, :, index], self.due[:, :, index], self.classes[:, index], pivots)

    def join(self, other):
        """Both caches of the same rows, one after the other; pivots may not find a slot."""
        view = torch.cat([self.view, other.view], 2)
        return self.longer(view, [(m.stored, m.due, m.classes, None) for m in (self, other)])

    def stack(self, other):
        view = torch.cat([self.view, other.view])
        return Mirror(view, *map(torch.cat, zip(self.known, other.known, strict=True)))

    def pad(self, n):
        view = F.pad(self.view, (0, 0, n, 0))
        stored = self.view.storage.to_stored(torch.zeros_like(self.stored[:, :, :1])).expand(-1, -1, n, -1)
        classes = self.new_classes(n, PADDING)
        due = (
            body_of(view)[:, :, :n]
            if view.layout_of.blocks
            else stored_states(view.layout_of, stored, classes, None)[0]
        )
        return self.longer(view, [(stored, due, classes, None), self.known])


ACTS = ("append", "append", "crop", "rows", "expand", "copy", "slice", "index", "mask", "join", "stack", "pad", "drop")
thorough = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(case=cases(), data=st.data())
def test_views_keep_their_tokens_whatever_others_do(case, data):
    keep_their_tokens([Mirror.of(case)], data, most=6)


@thorough
@given(case=cases(blocks=(True,), longest=150), data=st.data())
def test_views_of_blocks_keep_their_tokens_whatever_others_do(case, data):
    """Tokens keep the means of their blocks, wherever they go and whatever blocks begin behind them."""
    keep_their_tokens([Mirror.of(case)], data, most=70)


def keep_their_tokens(live: list[Mirror], data, most: int) -> None:
    """Random acts on views of one cache, which append up to `most` tokens at a time."""
    for step in range(data.draw(st.integers(1, 8), label="steps")):
        one = data.draw(st.sampled_from(live), label="view")
        n = one.view.shape[2]
        act = data.draw(st.sampled_from(ACTS), label="act")
        alike = [m for m in live if packed_ops.alike([one.view, m.view], "rows")]
        if act == "append" or not n:
            live.append(one.append(data.draw(st.integers(1, most)), step))
        elif act == "crop":
            live.append(one.crop(data.draw(st.integers(0, n))))
        elif act == "rows":
            live.append(one.rows(mixed(one.view)[:3]))
        elif act == "expand":
            live.append(on_codes(one.expand, 3))
        elif act == "copy":
            live.append(one.copy())
        elif act == "slice":
            start, step = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, 3))
            live.append(
                one.take(
                    list(range(n))[start::step],
                    on_codes(operator.getitem, one.view, (..., slice(start, None, step), slice(None))),
                )
            )
        elif act == "index":
            index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
            live.append(one.take(index, on_codes(one.view.index_select, 2, torch.tensor(index))))
        elif act == "mask":
            mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
            live.append(
                one.take(
                    mask.nonzero().flatten().tolist(), on_codes(operator.getitem, one.view, (..., mask, slice(None)))
                )
            )
        elif act == "join" and n < 10 * most:
            other = data.draw(st.sampled_from([m for m in alike if m.view.shape[2]]))
            live.append(on_codes(one.join, other))
        elif act == "stack":
            like = [m for m in live if packed_ops.alike([one.view, m.view], "length")]
            live.append(on_codes(one.stack, data.draw(st.sampled_from(like))))
        elif act == "pad":
            live.append(on_codes(one.pad, data.draw(st.integers(1, 4))))
        elif len(live) > 1:
            live = [m for m in live if m is not one]
        for mirror in live:
            mirror.check()


TOKEN_OPS = {
    "recent": lambda x: x[:, :, -6:],
    "middle": lambda x: x[:, :, 2:5],
    "stepped": lambda x: x[..., 1::3, :],
    "narrow": lambda x: x.narrow(2, 3, 4),
    "index": lambda x: x[:, :, torch.tensor([1, 3, 10])],
    "index-negative": lambda x: x[:, :, torch.tensor([1, -3, -1])],
    "index-list": lambda x: x[:, :, [0, 2, 9]],
    "index_select": lambda x: x.index_select(-2, torch.tensor([0, 4, 7, 10])),
    "mask": lambda x: x[:, :, torch.arange(x.shape[2]) % 4 != 1],
    "split": lambda x: x.split(4, 2)[1],
    "split-sizes": lambda x: x.split([2, 9], dim=-2)[1],
    "chunk": lambda x: x.chunk(2, 2)[1],
    "pad-negative": lambda x: F.pad(x, (0, 0, -2, -1)),
    "sinks and recent": lambda x: torch.cat([x[:, :, :2], x[:, :, -5:]], 2),
    "without-one": lambda x: torch.cat([x[:, :, :3], x[:, :, 4:]], -2),
    "of-rows": lambda x: x[1:, :, 2:6],
    "twice": lambda x: x[:, :, 2:][:, :, 3:],
}


@pytest.mark.parametrize("op", TOKEN_OPS.values(), ids=TOKEN_OPS)
@every_layout
def test_token_ops_move_codes(layout, op):
    """Tokens in order read as they did, every one, and appending goes on."""
    x = packed_of(case_of(layout), owner=5)
    before = x.dequantize()
    y = on_codes(op, x)
    assert_reads("tokens", op(before), y)
    assert y.storage.owner == 5
    with torch.inference_mode():
        assert_reads("tokens in inference mode", op(before), on_codes(op, x))
    new = tokens_for(x, 3)[: y.shape[0]]
    kept, longer = y.dequantize(), y.append(new)
    if not layout.window:
        assert_reads(
            "tokens, then append", torch.cat([kept, x[: len(new)].append(new).dequantize()[:, :, -3:]], 2), longer
        )
    assert_reads("what they came from", before, x)
    for at in longer.storage["text_at"] if layout.text_bits else ():
        assert len(at[at >= 0].unique()) == (at >= 0).sum(), f"a position has two text slots: {at.tolist()}"


def test_sinks_and_recent_at_every_step():
    """A cache that evicts after every token equals one that is cut once at the end: nothing is quantized twice."""
    x = packed_of(case_of(LAYOUTS["2bit-text4-bf16"], T=40, capacity=48))
    y, whole = x, x
    for seed in range(30):
        new = tokens_for(x, 1, seed)
        whole = torch.cat([whole, new], 2)
        y = on_codes(lambda y=y, new=new: torch.cat([torch.cat([y[:, :, :4], y[:, :, -8:]], 2), new], 2))
        assert_reads("evicted", torch.cat([whole.dequantize()[:, :, :4], whole.dequantize()[:, :, -9:]], 2), y)
    assert y.storage.capacity <= 128 and y.storage["text_at"].shape[1] <= 128


def test_text_slots_of_a_choice_are_few():
    x = packed_of(tsa_case(capacity=16))
    assert x[:, :, 1:].storage["text_at"].shape[1] == 4 + 16 - 9


def test_pivots_without_a_slot_are_read_from_the_body():
    layout = LAYOUTS["2bit"]
    x = packed_of(case_of(layout))
    y = torch.cat([x, x], 2)
    assert ((y.storage["pivot_at"] >= 0).sum(1) <= layout.pivots).all()
    body = packed_of(case_of(LAYOUTS["2bit-no-overlay"]))
    assert y.shape[2] == 22 and body.shape[2] == 11


@pytest.mark.parametrize(
    "op", [lambda x: x.index_select(2, torch.tensor([11])), lambda x: x[:, :, torch.tensor([-12])]]
)
def test_tokens_that_are_not_there(op):
    with pytest.raises((IndexError, RuntimeError)):
        op(packed_of(case_of(LAYOUTS["2bit"], capacity=64)))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.expand(3, -1, -1, -1),
        lambda x: x.expand(3, *x.shape[1:]),
        lambda x: x.repeat(3, 1, 1, 1),
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x.broadcast_to(3, *x.shape[1:]),
    ],
    ids=["expand", "sizes", "repeat", "repeat_interleave", "broadcast_to"],
)
@every_layout
def test_one_row_becomes_many_without_a_copy(layout, op):
    x = packed_of(case_of(layout, B=1))
    before, new = x.dequantize(), tokens_for(x, 4)
    y = on_codes(op, x)
    assert y.storage.borrowed and y.storage.nbytes == x.storage["state"].nbytes
    assert y._base is None, "dynamo would trace how the view was made"
    assert y.storage.held[1].data_ptr() == x.codes.data_ptr()
    assert_close("expanded", op(before), y.dequantize())
    assert y.storage.borrowed  # reading copies nothing
    z = torch.cat([y, op(new)], 2)
    assert_reads("continued", op(x.append(new).dequantize()), z)
    assert all(b.is_contiguous() for b in z.storage.buffers)


@pytest.mark.parametrize("write", ["append", "zero_", "copy_", "append-far"])
@every_layout
def test_writing_the_one_row_leaves_the_many(layout, write):
    x = packed_of(case_of(layout, B=1))
    y, before = x.expand(2, -1, -1, -1), x.dequantize()
    if write == "append":
        x.append(tokens_for(x, 2))
    elif write == "append-far":
        x[:, :, :5].append(tokens_for(x, 200))
    elif write == "zero_":
        x.zero_()
    else:
        x.copy_(packed_of(case_of(layout, B=1, seed=9)))
    assert_reads("the many", before.expand(2, -1, -1, -1), y)
    assert_reads("copied, saved", before.expand(2, -1, -1, -1), pickle.loads(pickle.dumps(y)))


def test_what_tracing_sees_of_expanded_rows_is_contiguous():
    """Guards look at the codes: strides of 0 would compile the step anew."""
    y = packed_of(case_of(LAYOUTS["2bit-text4-bf16"], B=1)).expand(4, -1, -1, -1)
    assert [getattr(y, name).stride(0) > 0 for name in y.__tensor_flatten__()[0]] == [True, True]
    assert y.codes is y.storage.codes


@every_layout
def test_unequal_rows_padded_and_joined(layout):
    x, y = packed_of(case_of(layout, B=1)), packed_of(case_of(layout, B=2, T=7, seed=4))
    wide = F.pad(y, (0, 0, 4, 0))
    assert type(wide) is PackedKV
    z = on_codes(torch.cat, [x, wide])
    assert z.shape == (3, 2, 11, layout.head_dim)
    assert_reads("the padded", y.dequantize(), z[1:, :, 4:])
    recent = slice(11 - layout.window, None)
    assert_reads("the long, recent", x.dequantize()[:, :, recent], z[:1, :, recent])
    assert (z.classes()[1:, :4] == PADDING).all()
    zeros = wide.dequantize()[:, :, :4]
    if not layout.affine:
        assert not zeros.any()
    assert_reads("without the padding", y.dequantize(), on_codes(lambda: F.pad(wide, (0, 0, -4, 0))))


PLAIN = {
    "a plain row": lambda x: torch.cat([x, x.dequantize()]),
    "plain tokens before": lambda x: torch.cat([x.dequantize(), x], 2),
    "padding behind": lambda x: F.pad(x, (0, 0, 0, 2)),
    "padding of ones": lambda x: F.pad(x, (0, 0, 2, 0), value=1.0),
    "padded channels": lambda x: F.pad(x, (0, 1)),
    "other tokens in each row": lambda x: x.gather(
        2, torch.tensor([[0], [3]])[:, None, :, None].expand(2, 2, 1, x.shape[3])
    ),
    "times one": lambda x: x * 1.0,
    "another dtype": lambda x: torch.cat([x, torch.ones(2, 2, 1, x.shape[3], dtype=torch.float64)], 2),
    "rows of rows": lambda x: x[:, None].expand(-1, 2, -1, -1, -1),
    "many of many": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
}


@pytest.mark.parametrize("op", PLAIN.values(), ids=PLAIN)
@pytest.mark.filterwarnings("ignore:akvq")
def test_what_codes_cannot_do_gives_a_plain_tensor(op):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    y = op(x)
    assert type(y) is torch.Tensor
    assert_same("plain", op(x.dequantize()), y)


def test_other_prompts_tokens_are_not_joined_as_codes():
    """Another centre and gain, owner or layout: the codes mean something else."""
    x = packed_of(case_of(LAYOUTS["4bit-affine"]))
    other = packed_of(case_of(LAYOUTS["4bit-affine"], seed=8))
    with warns_once("aten.cat.default"):
        y = torch.cat([x, other], 2)
    assert_same("joined", torch.cat([x.dequantize(), other.dequantize()], 2), y)
    assert type(on_codes(torch.cat, [x, x[mixed(x)[:2] * 0 + torch.arange(2)]], 2)) is PackedKV


@every_layout
def test_longer_view_alive_is_copied_for(layout):
    x = packed_of(case_of(layout, capacity=64))
    before, where = x.dequantize(), x.codes.data_ptr()
    y = x[:, :, :6].append(tokens_for(x, 8))
    assert_reads("the longer view", before, x)
    assert y.codes.data_ptr() != where
    assert_same("kept", before[:, :, :3], y.dequantize()[:, :, :3])


@every_layout
def test_longer_view_dead_costs_no_copy(layout):
    x = packed_of(case_of(layout, capacity=64))
    where = x.codes.data_ptr()
    x = x[:, :, :6]
    y = x.append(tokens_for(x, 8))
    assert y.codes.data_ptr() == where
    assert y.storage is x.storage


@every_layout
def test_growth_keeps_everything(layout):
    case = case_of(layout, capacity=11)
    x, roomy = packed_of(case), packed_of(case_of(layout, capacity=40))
    new = tokens_for(x, 9)
    y = x.append(new, step=8)
    assert y.storage.capacity == 24
    assert_reads("grown", roomy.append(new).dequantize(), y)
    empty = layout.allocate(2, 2, 24, 24 if layout.text_bits else 0)
    fresh = ops.named(empty, layout)
    assert_same("classes", fresh["classes"][:, 20:], y.storage["classes"][:, 20:])
    assert_same("codes", fresh["codes"][:, :, 20:], y.storage["codes"][:, :, 20:])


def tsa_case(capacity=16):
    """Ten tokens; rows with 4, 2 and no text tokens."""
    case = case_of(TSA, B=3, T=10, capacity=capacity)
    case.classes = torch.full((3, 10), VISION, dtype=torch.uint8)
    case.classes[0, [0, 3, 4, 9]] = TEXT
    case.classes[1, [2, 8]] = TEXT
    case.classes[2, :2] = PADDING
    return case


def test_compact_text_keeps_what_is_read():
    case = tsa_case()
    storage = Storage(TSA, case.pack(), case.length, case.length, None)
    before = ops.dequantize(storage.buffers, case.length, str(TSA))
    storage.compact_text(case.length)
    assert_same("tokens", before, ops.dequantize(storage.buffers, case.length, str(TSA)))
    assert storage["text_at"].shape[1] == 4 + 16 - 10
    assert storage["text_at"][:, :4].tolist() == [[0, 3, 4, 9], [2, 8, -1, -1], [-1, -1, -1, -1]]
    assert int(storage["state"][STATE_TEXT]) == 4 - 10


@pytest.mark.parametrize("kept", [10, 9, 5, 4, 1, 0], ids="keep{}".format)
def test_text_after_crop_and_append(kept):
    case = tsa_case()
    x = packed_of(case)
    x = x[:, :, :kept] if kept < 10 else x
    for seed in range(3):
        x = x.append(tokens_for(x, 3, seed))
    new = torch.cat([tokens_for(x, 3, seed) for seed in range(3)], 2)
    stored = torch.cat([case.x[:, :, :kept], new], 2)
    classes = torch.cat([case.classes[:, :kept], torch.full((3, 9), TEXT, dtype=torch.uint8)], 1)
    due, exact = stored_states(TSA, stored, classes, None)
    recent = slice(stored.shape[2] - TSA.window, None)
    due[:, :, recent] = exact[:, :, recent]
    assert_same("tokens", due, x.dequantize())
    for at in x.storage["text_at"]:
        assert len(at[at >= 0].unique()) == (at >= 0).sum(), f"a position has two text slots: {at.tolist()}"
    assert x.storage.prompt == min(kept, 10)


def test_crop_within_the_answer_does_not_compact():
    x = packed_of(tsa_case(capacity=40))
    x = x.append(tokens_for(x, 9))
    where = x.storage["text_codes"].data_ptr()
    x = x[..., :-4, :]
    x = x.append(tokens_for(x, 1))
    assert x.storage["text_codes"].data_ptr() == where


def test_batch_cat_of_compactions():
    """Two prompts with one text slot offset: a crop between their lengths must not land on a kept slot."""

    def prompt(length, text):
        case = case_of(TSA, B=1, T=length, capacity=16)
        case.classes = torch.full((1, length), VISION, dtype=torch.uint8)
        case.classes[0, text] = TEXT
        return packed_of(case)

    short, long = prompt(6, []), prompt(10, [0, 1, 2, 3])
    short = short.append(tokens_for(short, 4))
    assert int(short.storage["state"][STATE_TEXT]) == int(long.storage["state"][STATE_TEXT]) == -6
    for parts in ([short, long], [long, short]):
        y = on_codes(torch.cat, parts)[:, :, :7]
        before = y.dequantize()[:, :, :4]
        assert_same("kept", before, y.append(tokens_for(y, 1)).dequantize()[:, :, :4])


@pytest.mark.parametrize("write", ["index_copy_", "setitem", "setitem-ellipsis", "scatter_"])
@every_layout
def test_static_writes_equal_append(layout, write):
    x, growing = packed_of(case_of(layout, capacity=20), static=True), packed_of(case_of(layout, capacity=20))
    at, new = torch.arange(11, 15), tokens_for(growing, 4)

    def into(x):
        if write == "index_copy_":
            x.index_copy_(2, at, new)
        elif write == "setitem":
            x[:, :, at] = new
        elif write == "scatter_":
            x.scatter_(2, at[None, None, :, None].expand(new.shape), new)
        else:
            x[..., at, :] = new

    on_codes(into, x)
    assert x.shape[2] == 20
    assert_caches_same(growing.append(new).storage.buffers, x.storage.buffers, layout)


@every_layout
def test_static_rows_and_copies_stay_static(layout):
    x = packed_of(case_of(layout, capacity=20), static=True)
    before = x.dequantize()
    for op in (*ROW_OPS.values(), *SAME_OPS.values()):
        y = on_codes(op, x)
        assert y.storage.end is None
        assert y.static
        assert_reads("static", op(before), y)


def test_static_crop_reads_through_dequantize():
    x = packed_of(case_of(LAYOUTS["2bit"], capacity=20), static=True)
    with warns_once("aten.slice.Tensor"):
        y = x[:, :, :5]
    assert_same("slice", x.dequantize()[:, :, :5], y)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@every_layout
def test_zero_is_an_empty_cache(layout, static):
    x = packed_of(case_of(layout, capacity=20), static)
    assert on_codes(x.zero_) is x
    assert_reads("zeros", torch.zeros_like(x.dequantize()), x)
    new = randn(2, 2, 6, layout.head_dim, seed=3, dtype=layout.dtype)
    if static:
        x.index_copy_(2, torch.arange(6), new)
        got = x.dequantize()[:, :, :6]
    else:
        got = x[:, :, :0].append(new).dequantize()
    case = case_of(layout, T=6, capacity=20)
    case.classes[:] = TEXT
    case.x, case.pivots = new, None
    if layout.affine:
        rows = [torch.zeros(layout.head_dim), torch.ones(layout.head_dim)]
        rows += [torch.arange(layout.head_dim)] if layout.uneven else []
        case.affine = torch.stack(rows)[None, :, None].half().expand(2, -1, 2, -1)
    fresh = packed_of(case)
    case.x = fresh.storage.to_stored(new)
    assert_same("written again", packed_of(case).dequantize(), got)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@every_layout
def test_copy_takes_everything(layout, static):
    one, other = case_of(layout), case_of(layout, seed=5)
    x, y = packed_of(one, static, owner=1), packed_of(other, static, owner=2)
    x.storage.prompt = 3
    assert on_codes(x.copy_, y) is x
    assert_reads("copied", y.dequantize(), x)
    assert (x.storage.owner, x.storage.prompt, x.storage.end) == (2, y.storage.prompt, y.storage.end)
    y.zero_()
    assert_reads("apart", packed_of(other, static).dequantize(), x)


def test_copy_into_a_plain_tensor():
    x = packed_of(case_of(LAYOUTS["2bit"]))
    plain = torch.empty(x.shape)
    with warns_once("aten.copy_.default"):
        plain.copy_(x)
    assert_same("plain", x.dequantize(), plain)


def warns_once(op: str):
    """Exactly one warning, and it names op."""

    class Context:
        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            self.patch.setattr(packed_ops, "_warned", set())
            self.catch = warnings.catch_warnings(record=True)
            self.said = self.catch.__enter__()
            warnings.simplefilter("always")

        def __exit__(self, *failure):
            self.catch.__exit__(*failure)
            self.patch.undo()
            if failure[0] is None:
                texts = [str(w.message) for w in self.said]
                assert len(texts) == 1, texts
                assert op in texts[0]

    return Context()


FALLBACKS = {
    "aten.add.Tensor": lambda x: x + 1,
    "aten.mean.default": lambda x: x.mean(),
    "aten.mul.Tensor": lambda x: 2 * x,
    "aten.select.int": lambda x: x[0],
    "aten.slice.Tensor": lambda x: x[:, 1:],
    "aten.index.Tensor": lambda x: x[:, torch.tensor([1, 0])],
    "aten.transpose.int": lambda x: x.transpose(1, 2),
    "aten.stack.default": lambda x: torch.stack([x, x]),
    "aten.cat.default": lambda x: torch.cat([x, x], 1),
    "aten.unsqueeze.default": lambda x: x.repeat_interleave(2, dim=1),
    "aten.equal.default": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("op", FALLBACKS)
@pytest.mark.parametrize("layout", ["2bit", "2bit-text4-bf16", "4bit-affine", "lossless-f16"])
def test_any_other_op_reads_through_dequantize(layout, op):
    x, fn = packed_of(case_of(LAYOUTS[layout])), FALLBACKS[op]
    expected = fn(x.dequantize())
    with warns_once(op):
        first = fn(x)
        again = fn(x)
    if isinstance(expected, bool):
        assert first is again is expected
        return
    for got in (first, again):
        assert type(got) is torch.Tensor
        assert_same(op, expected, got)


def test_a_warning_for_each_op():
    x = packed_of(case_of(LAYOUTS["2bit"]))
    for op in ("aten.mean.default", "aten.add.Tensor"):
        with warns_once(op):
            FALLBACKS[op](x)


@pytest.mark.parametrize("layout", ["2bit", "2bit-text4-bf16", "lossless-f16"])
def test_sdpa_in_eager(layout):
    x = packed_of(case_of(LAYOUTS[layout]))
    q, plain = tokens_for(x, 2), x.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = F.scaled_dot_product_attention(q, x, x)
    assert_same("attention", F.scaled_dot_product_attention(q, plain, plain), got)


WRITES = {
    "add_": lambda x, y: x.add_(1),
    "mul_": lambda x, y: x.mul_(y),
    "fill_": lambda x, y: x.fill_(1),
    "out": lambda x, y: torch.add(y, 1, out=x),
    "setitem-int": lambda x, y: x.__setitem__((slice(None), slice(None), 3), y[:, :, 3]),
    "setitem-row": lambda x, y: x.__setitem__(0, y[0]),
    "setitem-mask": lambda x, y: x.__setitem__(y > 0, 0.0),
    "index_copy_-heads": lambda x, y: x.index_copy_(1, torch.tensor([0]), y[:, :1]),
    "scatter_-channels": lambda x, y: x.scatter_(2, torch.zeros(y.shape, dtype=torch.int64), y),
}


def test_copy_of_plain_numbers():
    """A static cache overwritten as a whole (a full sliding window rolls) goes back to 16 bits; a growing one
    refuses."""
    growing = packed_of(case_of(LAYOUTS["2bit"]))
    with pytest.raises(NotImplementedError, match=r"akvq: .* would write"):
        growing.copy_(torch.ones(growing.shape))
    static = packed_of(case_of(LAYOUTS["2bit"]), True)
    numbers = torch.randn(static.shape)
    assert static.copy_(numbers) is static
    assert static.layout_of.lossless and torch.equal(static.dequantize(), numbers)
    static.index_copy_(2, torch.tensor([1]), numbers[:, :, :1])
    assert torch.equal(static.dequantize()[:, :, 1], numbers[:, :, 0])


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_unsupported_writes_are_refused(write, static):
    x = packed_of(case_of(LAYOUTS["2bit"]), static)
    before = x.dequantize()
    with pytest.raises(NotImplementedError, match=r"akvq: .* would write .*accepted writes are cat"):
        write(x, torch.ones_like(before))
    assert_reads("untouched", before, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, at, y: x.index_copy_(2, at, y),
        lambda x, at, y: x.__setitem__((slice(None), slice(None), at), y),
        lambda x, at, y: x.__setitem__((slice(None), slice(None), slice(int(at), int(at) + 1)), y),
    ],
    ids=["index_copy_", "setitem", "slice"],
)
def test_growing_cache_is_not_written_in_the_middle(write):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    before = x.dequantize()
    with pytest.raises(NotImplementedError, match="of a static cache"):
        write(x, torch.tensor([3]), tokens_for(x, 1))
    assert_reads("untouched", before, x)


def test_a_slice_of_a_static_cache_is_written_as_by_index_copy():
    one, other = (packed_of(case_of(LAYOUTS["2bit"]), True) for _ in range(2))
    y = tokens_for(one, 3)
    one[:, :, 2:5] = y
    other.index_copy_(2, torch.arange(2, 5), y)
    assert torch.equal(one.dequantize(), other.dequantize())


MISMATCHES = {
    "batch": (ValueError, "from another model or batch", (3, 2, 1, 16)),
    "heads": (ValueError, "from another model or batch", (2, 1, 1, 16)),
    "head-dim": (ValueError, "head dim 16", (2, 2, 1, 8)),
}


@pytest.mark.parametrize("error, text, shape", MISMATCHES.values(), ids=MISMATCHES)
def test_cat_of_another_shape_raises(error, text, shape):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    before = x.dequantize()
    with pytest.raises(error, match=text):
        torch.cat([x, torch.ones(shape)], -2)
    assert_reads("untouched", before, x)


def test_batch_cat_of_other_layouts_reads_through_dequantize():
    x, y = packed_of(case_of(LAYOUTS["2bit"])), packed_of(case_of(LAYOUTS["2bit-no-overlay"]))
    expected = torch.cat([x.dequantize(), y.dequantize()])
    with warns_once("aten.cat.default"):
        got = torch.cat([x, y])
    assert_same("cat", expected, got)


def test_batch_cat_of_other_owners_reads_through_dequantize():
    x, y = (packed_of(case_of(LAYOUTS["2bit"]), owner=owner) for owner in (1, 2))
    with warns_once("aten.cat.default"):
        assert type(torch.cat([x, y])) is torch.Tensor


def test_mask_of_another_length_raises():
    with pytest.raises(IndexError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed_of(case_of(LAYOUTS["2bit"]))[torch.tensor([True, False, False])]


def test_traced_length_is_not_the_capacity():
    """contiguous and repeat_interleave over heads, as attention layers write them, while dynamo traces."""
    shapes = []

    def backend(gm, _):
        shapes.extend(n.meta["example_value"].shape for n in gm.graph.nodes if n.op == "call_method")
        return lambda *args: (torch.zeros(()),)

    def layer(past, new):
        return torch.cat([past, new], -2).contiguous().repeat_interleave(2, dim=1).float().sum()

    x = packed_of(case_of(LAYOUTS["2bit"], capacity=64))
    torch._dynamo.reset()
    torch.compile(layer, backend=backend, fullgraph=True)(x, tokens_for(x, 1))
    assert shapes[0][1:2] == (2,)
    assert shapes[1][1:2] == (4,)
    assert [int(shape[2]) for shape in shapes[:2]] == [12, 12]


@some
@given(seed=seeds, B=st.integers(1, 3), T=st.integers(2, 9))
def test_lossless_equals_plain_tensors(seed, B, T):
    x = packed_of(case_of(LOSSLESS, B=B, T=T, capacity=T + 1, seed=seed))
    plain = case_of(LOSSLESS, B=B, T=T, seed=seed).x
    for op in (*ROW_OPS.values(), *SAME_OPS.values()):
        assert_reads("op", op(plain), on_codes(op, x))
    for n in range(T):
        y = x[:, :, :n]
        new = tokens_for(y, 3, seed)
        assert_reads("crop, append", torch.cat([plain[:, :, :n], new], -2), torch.cat([y, new], -2))
    assert_reads("x", plain, x)
    static = packed_of(case_of(LOSSLESS, B=B, T=T, capacity=T, seed=seed), static=True)
    at = torch.tensor([T - 1])
    assert_reads("static", plain.index_copy(2, at, new[:, :, :1]), static.index_copy_(2, at, new[:, :, :1]))


def dynamic_caches(layout):
    """A transformers cache of packed tensors and its twin of plain ones."""
    case = case_of(layout)
    packed, plain = DynamicCache(), DynamicCache()
    for i in range(2):
        k, v = packed_of(case), packed_of(case_of(layout, seed=i + 1))
        plain.update(k.dequantize(), v.dequantize(), i)
        packed.update(k.dequantize(), v.dequantize(), i)
        packed.layers[i].keys, packed.layers[i].values = k, v
    return packed, plain


def assert_layers_equal(plain, packed):
    for a, b in zip(plain.layers, packed.layers, strict=True):
        assert_reads("keys", a.keys, b.keys)
        assert_reads("values", a.values, b.values)
        assert a.get_seq_length() == b.get_seq_length()


CACHE_METHODS = {
    "crop": lambda c: c.crop(-3),
    "crop-to-one": lambda c: c.crop(-10),
    "batch_repeat_interleave": lambda c: c.batch_repeat_interleave(3),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([1])),
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([1, 1])),
    "offload": lambda c: [layer.offload() for layer in c.layers],
    "prefetch": lambda c: [layer.prefetch() for layer in c.layers],
    "beams": lambda c: [c.batch_repeat_interleave(2), c.reorder_cache(torch.tensor([3, 0, 0, 1])), c.crop(-2)],
}


@pytest.mark.parametrize("method", CACHE_METHODS.values(), ids=CACHE_METHODS)
@every_layout
def test_dynamic_cache_methods(layout, method):
    packed, plain = dynamic_caches(layout)
    assert packed.get_seq_length() == 11
    on_codes(method, packed)
    method(plain)
    assert_layers_equal(plain, packed)


@every_layout
def test_dynamic_cache_deepcopy_and_reset(layout):
    packed, plain = dynamic_caches(layout)
    twin = on_codes(copy.deepcopy, packed)
    on_codes(packed.crop, -5)
    packed.update(*(tokens_for(packed.layers[0].keys, 4),) * 2, 0)
    assert packed.get_seq_length() == 10
    assert_layers_equal(plain, twin)
    emptied = copy.deepcopy(plain)
    emptied.crop(-5)
    emptied.update(*(torch.ones_like(plain.layers[0].keys[:, :, :4]),) * 2, 0)
    for cache in (packed, emptied):  # drops the tensors, or zeroes them in older versions of transformers
        cache.reset()
    assert packed.get_seq_length() == emptied.get_seq_length()
    assert_layers_equal(plain, twin)


def test_dynamic_cache_update_equals_plain_when_lossless():
    packed, plain = dynamic_caches(LOSSLESS)
    for cache in (packed, plain):
        cache.crop(-4)
        for seed in range(5):
            new = randn(2, 2, 1, 16, seed=seed, dtype=f16)
            for layer in range(2):
                k, v = cache.update(new, -new, layer)
        assert k.shape == v.shape == (2, 2, 12, 16)
    assert_layers_equal(plain, packed)


def static_layers(layout, capacity=20):
    case = case_of(layout, capacity=capacity)
    layers = []
    for _ in range(2):
        layer = StaticLayer(capacity)
        layer.lazy_initialization(case.x, case.x)
        layer.cumulative_length.fill_(case.length)
        layers.append(layer)
    packed, plain = layers
    packed.keys, packed.values = packed_of(case, static=True), packed_of(case_of(layout, 2, 2, 11, capacity, 1), True)
    plain.keys, plain.values = packed.keys.dequantize(), packed.values.dequantize()
    return packed, plain


@every_layout
def test_static_layer_methods(layout):
    packed, plain = static_layers(layout)
    on_codes(packed.reorder_cache, torch.tensor([1, 0]))
    plain.reorder_cache(torch.tensor([1, 0]))
    assert_reads("reordered", plain.keys, packed.keys)
    new = tokens_for(packed.keys, 2)
    k, v = on_codes(packed.update, new, new)
    assert k is packed.keys
    assert int(packed.get_seq_length()) == 13
    on_codes(packed.offload)
    assert_reads("offloaded", k.dequantize(), packed.keys)
    on_codes(packed.reset)
    assert int(packed.get_seq_length()) == 0
    assert_reads("reset", torch.zeros_like(plain.keys), packed.keys)
    k, v = on_codes(packed.update, new, new)
    assert k.dequantize()[:, :, :2].abs().amax(-1).min() > 0


def test_static_layer_update_equals_plain_when_lossless():
    packed, plain = static_layers(LOSSLESS)
    for layer in (packed, plain):
        for seed in range(3):
            layer.update(*(randn(2, 2, 2, 16, seed=seed, dtype=f16),) * 2)
        layer.reset()
        layer.update(*(randn(2, 2, 7, 16, seed=9, dtype=f16),) * 2)
    assert_reads("keys", plain.keys, packed.keys)


def test_module_buffer_moves_with_its_module():
    module = torch.nn.Module()
    module.register_buffer("cache", packed_of(case_of(LAYOUTS["2bit"]), owner=3))
    before = module.cache.dequantize()
    on_codes(module.to, "cpu")
    assert_reads("buffer", before, module.cache)
    assert_reads("copy", before, on_codes(copy.deepcopy, module).cache)


def test_says_what_it_is():
    x = packed_of(case_of(LAYOUTS["2bit"]))
    assert repr(x) == f"PackedKV(shape=[2, 2, 11, 16], {LAYOUTS['2bit']}, device=cpu)"
    assert x.nbytes_packed == sum(b.numel() * b.element_size() for b in x.storage.buffers)
