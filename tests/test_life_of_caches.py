"""What users make of a packed cache between steps: the uncompiled logits if lossless, else the same codes."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from akvq_fx import PackedKV
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
OPTIONS = {"inner": "eager", "window": 8, "pivots": 3, "value_rotation": "online"}
PROMPT = 23
bf16 = torch.bfloat16


@functools.cache
def model_of(bits: int | None, inner: str = "eager"):
    """One compiled model for all tests, None: the same model uncompiled."""
    model, _ = ZOO["llama"]()
    if bits is not None:
        model.compile(backend="akvq", options={**OPTIONS, "inner": inner, "body_bits": bits})
    return model


def ids(rows: int, count: int = PROMPT, seed: int = 1) -> torch.Tensor:
    return torch.randint(10, 90, (rows, count), generator=torch.Generator().manual_seed(seed))


def call(model, cache, tokens, mask=None):
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=True, attention_mask=mask).logits


def mapped(cache, op):
    """A cache of op(tensor) for every tensor."""
    return DynamicCache([(op(layer.keys), op(layer.values)) for layer in cache.layers])


def padded_and_joined(x):
    other = x[:, :, : x.shape[2] // 2]
    return torch.cat([x, F.pad(other, (0, 0, x.shape[2] - other.shape[2], 0))])


ON_CODES = {
    "recent": lambda x: x[:, :, -9:],
    "sinks and recent": lambda x: torch.cat([x[:, :, :4], x[:, :, -9:]], 2),
    "index": lambda x: x[:, :, torch.tensor([0, 3, 5, -2, -1])],
    "index_select": lambda x: x.index_select(2, torch.arange(1, x.shape[2], 2)),
    "mask": lambda x: x[:, :, torch.arange(x.shape[2]) % 3 != 1],
    "without one": lambda x: torch.cat([x[:, :, :5], x[:, :, 6:]], 2),
    "pad": lambda x: F.pad(x, (0, 0, 3, 0)),
    "expand": lambda x: x[:1].expand(3, -1, -1, -1),
    "padded and joined": padded_and_joined,
}
PLAIN = {
    "times one": lambda x: x * 1.0,
    "dequantize": lambda x: x.dequantize() if isinstance(x, PackedKV) else x,
    "a plain row": lambda x: torch.cat([x, x * 1.0]),
    "other tokens in each row": lambda x: torch.stack([x[0, :, :-5], x[1, :, 5:]]),
}


def life(model, op):
    """Logits of a prompt, two steps, op on every tensor of the cache, three steps, op again, two steps."""
    cache, found = DynamicCache(), []
    found.append(call(model, cache, ids(2)))
    for turn, steps in enumerate((2, 3, 2)):
        if turn:
            cache = mapped(cache, op)
        rows, length = cache.layers[0].keys.shape[0], cache.get_seq_length()
        for step in range(steps):
            mask = torch.ones(rows, length + step + 1).long()
            mask[-1, 0] = 0
            found.append(call(model, cache, ids(rows, 1, seed=10 * turn + step), mask))
    return found, cache


@pytest.mark.filterwarnings("ignore:akvq")
@pytest.mark.parametrize("ops", [ON_CODES, PLAIN], ids=["on codes", "plain"])
def test_lossless_equals_uncompiled(ops):
    """All in one test, as graphs are made once."""
    for name, op in ops.items():
        expected, _ = life(model_of(None), op)
        got, cache = life(model_of(16), op)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert isinstance(cache.layers[0].keys, PackedKV), name


VIEWS = {
    "select": lambda x: x.select(0, 1)[None],
    "transpose": lambda x: x.transpose(1, 2).transpose(1, 2),
    "permute": lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3),
    "movedim": lambda x: x.movedim(1, 2).movedim(1, 2),
    "view": lambda x: x.view(*x.shape[:3], 2, -1).flatten(3),
    "unsqueeze": lambda x: x.unsqueeze(0).squeeze(0),
    "unfold": lambda x: x.unfold(2, 3, 1)[:, :, 0].mT,
    "tensor_split": lambda x: x.tensor_split(2, 2)[0],
    "dsplit": lambda x: x.dsplit([4])[1],
    "swapdims": lambda x: x.swapdims(1, 2).swapdims(1, 2),
    "mH": lambda x: x.mH.mH,
    "view_as": lambda x: x.view_as(torch.empty(x.shape)),
    "as_strided": lambda x: x.as_strided(x.shape, x.stride()),
    "diagonal": lambda x: x.diagonal(0, 0, 1).permute(2, 0, 1)[:, None].expand(-1, 2, -1, -1),
}


@pytest.mark.filterwarnings("ignore:akvq")
def test_a_plain_view_continues():
    """Whatever views a packed cache gives a plain tensor that knows no packed one: dynamo could not trace its past."""
    model, plain = model_of(16), model_of(None)
    for name, op in VIEWS.items():
        caches = [DynamicCache(), DynamicCache()]
        call(model, caches[0], ids(2))
        call(plain, caches[1], ids(2))
        got, expected = (mapped(cache, op) for cache in caches)
        assert not isinstance(got.layers[0].keys._base, PackedKV), name
        new = ids(got.layers[0].keys.shape[0], 1)
        one, other = call(plain, expected, new), call(model, got, new)
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_no_code_changes():
    for name in ON_CODES:
        keeps_codes(name)


def keeps_codes(name):
    """At two bits every kept token reads as it did, and nothing is said, as nothing left the codes."""
    cache = DynamicCache()
    model = model_of(2)
    call(model, cache, ids(2))
    call(model, cache, ids(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = mapped(cache, ON_CODES[name])
    for before, after in zip(cache.layers, kept.layers, strict=True):
        for x, y in ((before.keys, after.keys), (before.values, after.values)):
            assert isinstance(y, PackedKV) and not y.layout_of.plain
            real = slice(3 if name == "pad" else 0, None)
            rows = slice(1 if name == "padded and joined" else None)
            expected = ON_CODES[name](x.dequantize())
            torch.testing.assert_close(y.dequantize()[rows, :, real], expected[rows, :, real], rtol=0, atol=1e-5)
    assert call(model, kept, ids(kept.layers[0].keys.shape[0], 1, seed=3)).isfinite().all()
    assert isinstance(kept.layers[0].keys, PackedKV)


def test_eviction_at_every_step():
    def steps(model):
        cache, found = DynamicCache(), []
        call(model, cache, ids(1))
        for step in range(6):
            cache = mapped(cache, lambda x: torch.cat([x[:, :, :4], x[:, :, -10:]], 2))
            found.append(call(model, cache, ids(1, 1, seed=step)))
        return found

    for one, other in zip(steps(model_of(None)), steps(model_of(16)), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5)


DTYPES = {  # the model's dtype, autocast of the prompt and of the steps, the model's dtype afterwards
    "bf16, then float32": (bf16, False, False, torch.float32),
    "float32, then double": (None, False, False, torch.float64),
    "autocast, then none": (None, True, False, None),
    "none, then autocast": (None, False, True, None),
    "autocast": (None, True, True, None),
    "double": (torch.float64, False, False, None),
}


@pytest.mark.parametrize(
    "kind, bits", [(kind, 16) for kind in DTYPES] + [("bf16, then float32", 2), ("autocast", 2), ("double", 2)]
)
def test_changes_of_dtype(kind, bits):
    dtype, first, then, later = DTYPES[kind]

    def run(compiled):
        torch._dynamo.reset()
        model, _ = ZOO["llama"]()
        model = model if dtype is None else model.to(dtype)
        if compiled:
            model.compile(backend="akvq", options={**OPTIONS, "window": 64, "body_bits": bits})
        cache, found = DynamicCache(), []
        with torch.autocast("cpu", bf16, enabled=first):
            found.append(call(model, cache, ids(2)))
        model = model if later is None else model.to(later)
        with torch.autocast("cpu", bf16, enabled=then):
            found += [call(model, cache, ids(2, 1, seed=step)) for step in range(3)]
        return found, cache

    (expected, plain), (got, cache) = run(False), run(True)
    # of 2 bits all is within the window here, in the cache's own dtype: bf16's where that is the prompt's
    tolerance = 1e-5 if bits == 16 else 0.1
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance)
    if bits == 16:
        assert cache.layers[0].values.dtype == plain.layers[0].values.dtype
