"""Static buffers that an uncompiled prompt filled: packed in place behind the first compiled step, plain again where
uncompiled code starts them anew or does what codes cannot take."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CompileConfig, StaticCache

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.exchange import STAYS
from akvq_fx.kernels.layout import PADDING
from akvq_fx.transformers_names import cache_argument, cache_of
from tests import attention_models as models
from tests.attention_models import Decoder
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
LOSSLESS = {"inner": "eager", "body_bits": 16}
PROMPTS = {1: 9, 2: 12, 3: 21}  # seed -> tokens


def compile_config(**options) -> CompileConfig:
    config = CompileConfig(backend="akvq", **({"mode": None, "options": options} if options else {}))
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told so
    return config


def prompt(rows: int, seed: int, vocabulary: int = 140) -> torch.Tensor:
    return torch.randint(5, vocabulary, (rows, PROMPTS[seed]), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    given = {"cache_implementation": "static", "max_new_tokens": 6, "return_dict_in_generate": True, **kwargs}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)


def is_packed(cache) -> list[bool]:
    return [isinstance(x, PackedKV) for layer in cache.layers for x in (layer.keys, layer.values)]


def test_compile_config_packs_and_is_exact():
    """transformers runs the prompt uncompiled: few graphs for all batch sizes, and the model's own tokens."""
    model, plain = ZOO["llama"]()[0], ZOO["llama"]()[0]
    config = compile_config(**LOSSLESS)
    for rows, seed in ((1, 1), (3, 2), (1, 3)):
        ids = prompt(rows, seed)
        expected = generate(plain, ids, disable_compile=True).sequences
        out = generate(model, ids, compile_config=config)
        assert torch.equal(out.sequences, expected) and all(is_packed(cache_of(out))), (rows, seed)
    report = akvq_fx.report(model)
    assert not report.refused and len(report.graphs) <= 6, report  # the first capacities have graphs of their own
    assert [row.status for row in report.packed] == ["prompt", "packed"]


def test_default_options_pack_below_16_bits():
    """Inductor, 2 bits, bfloat16, and the buffers' memory is given back."""
    model, _ = ZOO["llama"]()
    model = model.bfloat16()
    ids = torch.randint(5, 140, (1, 400), generator=torch.Generator().manual_seed(0))
    stats = [akvq_fx.cache_stats(generate(model, ids, **how)) for how in (
        {"disable_compile": True}, {"compile_config": compile_config()}
    )]  # fmt: skip
    assert stats[1].plain_bytes == 0 and stats[1].packed_bytes < 0.9 * stats[0].plain_bytes, stats
    assert stats[1].bits_per_element < 16


def test_a_static_cache_is_used_again():
    """reset() and an uncompiled prompt find plain buffers; a second turn goes to the codes."""
    model, plain = ZOO["llama"]()[0], ZOO["llama"]()[0]
    config, name = compile_config(**LOSSLESS), cache_argument(model)
    caches = [StaticCache(config=m.config, max_cache_len=48) for m in (model, plain)]
    for seed in (1, 2):
        ids = prompt(2, seed)
        for turn in range(2):
            how = ({"compile_config": config}, {"disable_compile": True})
            got, want = (
                generate(m, ids, cache_implementation=None, **{name: cache}, **more).sequences
                for m, cache, more in zip((model, plain), caches, how, strict=True)
            )
            assert torch.equal(got, want), (seed, turn)
            assert all(is_packed(caches[0]))
            ids = torch.cat([got, prompt(2, 1)], 1)
        for cache in caches:
            cache.reset()
        assert not any(is_packed(caches[0])) and not caches[0].layers[0].keys.any()
        assert caches[0].layers[0].keys._dynamo_static_input_type  # transformers' own mark is back


class Buffers(models.StaticIndexCopy):
    """Keys and values in buffers of the module, written as x[:, :, at] = new."""

    slots = 32

    def __init__(self):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(2, self.kv_heads, self.slots, self.dim), persistent=False)

    def write(self, past, k, v, at):
        keys, values = self.k_cache, self.v_cache
        keys[:, :, at] = k
        values[:, :, at] = v
        return keys, values, None


class OwnDecoder(Decoder):
    """Prefill and decode_one_token are two functions, as where only the second is compiled."""

    def prefill(self, ids, at):
        return self(ids, None, None, at)[0]

    def decode_one_token(self, ids, at):
        return self(ids, None, None, at)[0].argmax(-1)


def rollout(model, step, rows, seed, dtype=torch.int64, steps=5):
    ids = prompt(rows, seed, models.VOCABULARY)
    count = ids.shape[1]
    tokens = [model.prefill(ids, torch.arange(count, dtype=dtype))[:, -1:].argmax(-1)]
    for at in range(count, count + steps):
        tokens.append(step(tokens[-1], torch.tensor([at], dtype=dtype)))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_buffers_of_a_module(dtype):
    model, plain = OwnDecoder(Buffers, layers=2), OwnDecoder(Buffers, layers=2)
    step = torch.compile(model.decode_one_token, backend="akvq", options=LOSSLESS)
    memory = StorageWeakRef(model.layers[0].attention.k_cache.untyped_storage())
    with torch.no_grad():
        for seed in (1, 3, 2):
            before = weakref.ref(model.layers[0].attention.k_cache)
            got, want = rollout(model, step, 2, seed, dtype), rollout(plain, plain.decode_one_token, 2, seed, dtype)
            assert torch.equal(got, want), seed
            assert all(isinstance(x, PackedKV) for x in model.buffers())
            assert before() is model.layers[0].attention.k_cache  # whoever holds it has the packed one
    assert memory.expired()
    report = akvq_fx.report(model)
    assert len(report.graphs) == 2 and not report.refused, report


def test_inference_mode_and_gradients():
    """Buffers made in inference mode, then steps with gradients on over a prompt without."""
    plain = OwnDecoder(Buffers)
    with torch.inference_mode():
        model = OwnDecoder(Buffers)
        step = torch.compile(model.decode_one_token, backend="akvq", options=LOSSLESS)
        for seed in (1, 3):
            assert torch.equal(rollout(model, step, 2, seed), rollout(plain, plain.decode_one_token, 2, seed))
            assert all(isinstance(x, PackedKV) for x in model.buffers())
    model, plain = OwnDecoder(Buffers), OwnDecoder(Buffers)
    step = torch.compile(model.decode_one_token, backend="akvq", options=LOSSLESS)
    ids = prompt(2, 1, models.VOCABULARY)
    with torch.no_grad():
        token, want = (m.prefill(ids, torch.arange(ids.shape[1]))[:, -1:].argmax(-1) for m in (model, plain))
    for at in range(ids.shape[1], ids.shape[1] + 3):
        token = step(token, torch.tensor([at]))
        with torch.no_grad():
            want = plain.decode_one_token(want, torch.tensor([at]))
        assert torch.equal(token, want) and all(isinstance(x, PackedKV) for x in model.buffers())


def test_few_bits_and_statistics_of_each_prompt():
    """Two bits, all recent at 16: codes of the first prompt's map would be another model."""
    model, plain = OwnDecoder(Buffers), OwnDecoder(Buffers)
    step = torch.compile(model.decode_one_token, backend="akvq", options={"inner": "eager", "window": 32})
    with torch.no_grad():
        for seed in (1, 3):
            assert torch.equal(rollout(model, step, 2, seed), rollout(plain, plain.decode_one_token, 2, seed))
            keys = model.layers[0].attention.k_cache
            real = plain.layers[0].attention.k_cache[:, :, : PROMPTS[seed]]
            centre = keys.storage["affine"][:, 0].float()
            torch.testing.assert_close(centre, real.mean(2), atol=0.2, rtol=0)


def packed_buffers():
    """(model, plain one, compiled step) behind a prompt and two steps."""
    model, plain = OwnDecoder(Buffers), OwnDecoder(Buffers)
    step = torch.compile(model.decode_one_token, backend="akvq", options=LOSSLESS)
    assert torch.equal(rollout(model, step, 2, 1, steps=2), rollout(plain, plain.decode_one_token, 2, 1, steps=2))
    return model, plain, step


WRITES = {
    "slice": lambda x, new: x.__setitem__((slice(None), slice(None), slice(2, 4)), new),
    "narrow": lambda x, new: x.narrow(2, 2, 2).copy_(new),
    "view": lambda x, new: x.transpose(1, 2)[:, 2:4].copy_(new.transpose(1, 2)),
    "row": lambda x, new: x[0].index_copy_(1, torch.tensor([2, 3]), new[0]),
    "mul_": lambda x, new: x.mul_(0.5),
    "first": lambda x, new: x.index_copy_(2, torch.tensor([0, 1]), new),
    "first_set": lambda x, new: x.__setitem__((slice(None), slice(None), torch.tensor([0, 1])), new),
    "scatter": lambda x, new: x.scatter_(2, torch.tensor([0, 1])[None, None, :, None].expand(new.shape), new),
    "fill_": lambda x, new: x.fill_(0.25),
    "all": lambda x, new: x.copy_(torch.ones_like(new[:, :, :1]).expand(x.shape)),
}


@torch.no_grad()
def test_uncompiled_writes_are_seen():
    """Whatever uncompiled code writes to the buffers, compiled steps attend to."""
    model, plain, step = packed_buffers()
    new, at = torch.randn(2, Buffers.kv_heads, 2, Buffers.dim), PROMPTS[1] + 2
    for name, write in WRITES.items():
        for m in (model, plain):
            for buffer in m.buffers():
                write(buffer, new)
        for count in range(2):
            token, where = torch.tensor([[count + 3], [count + 5]]), torch.tensor([at + count])
            got, want = model(token, None, None, where)[0], plain(token, None, None, where)[0]
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(step(token, where), plain.decode_one_token(token, where)), name
        at += 2
        got, want = (m.layers[0].attention.k_cache for m in (model, plain))
        got = got.dequantize() if isinstance(got, PackedKV) else got
        assert torch.equal(got[:, :, :at], want[:, :, :at]), name
        for buffer in model.buffers():
            if hasattr(buffer, STAYS):
                delattr(buffer, STAYS)  # so that the next one begins packed
        step(token, where)
        assert all(isinstance(x, PackedKV) for x in model.buffers()), name


@torch.no_grad()
def test_a_buffer_turned_back_stays_and_the_report_says_so():
    model, _, step = packed_buffers()
    with pytest.warns(UserWarning, match="goes back to 16 bits: mul_ writes to it"):
        for buffer in model.buffers():
            buffer.mul_(0.5)
    for at in (12, 13):
        step(torch.ones(2, 1, dtype=torch.int64), torch.tensor([at]))
        assert not any(isinstance(x, PackedKV) for x in model.buffers())
    assert "mul_ writes to it" in str(akvq_fx.report(model))


def stays(model, reason, steps=2, at=3):
    """The compiled step's numbers are right and the buffers stay plain, for this reason."""
    step = torch.compile(model.decode_one_token, backend="akvq", options=LOSSLESS)
    ids = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for i in range(steps):
            step(ids, torch.tensor([at + i]))
    assert not any(isinstance(x, PackedKV) for x in model.buffers())
    assert reason in str(akvq_fx.report(model)), akvq_fx.report(model)


def test_views_of_another_tensor_stay():
    model = OwnDecoder(Buffers)
    model.slab = torch.zeros(2, *model.layers[0].attention.k_cache.shape)
    model.layers[0].attention.k_cache, model.layers[0].attention.v_cache = model.slab
    stays(model, "it is a view of another tensor")


def test_shared_memory_stays():
    model = OwnDecoder(Buffers)
    view = model.layers[0].attention.k_cache[:1]
    stays(model, "other tensors share its memory")
    assert view.any()


def test_parameters_stay():
    model = OwnDecoder(Buffers)
    part = model.layers[0].attention
    for name in ("k_cache", "v_cache"):
        value = getattr(part, name)
        delattr(part, name)
        setattr(part, name, nn.Parameter(value, requires_grad=False))
    stays(model, "it is a Parameter")


class Wrapped(Buffers):
    """Positions that the model computes modulo the slots."""

    def write(self, past, k, v, at):
        return super().write(past, k, v, at % self.slots)


def test_positions_of_a_ring_stay():
    stays(OwnDecoder(Wrapped), "come of")


class Rolls(Buffers):
    """The whole buffer is copied anew, a slot further: a sliding window of transformers' static caches."""

    def write(self, past, k, v, at):
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            cache.copy_(torch.cat([cache[:, :, new.shape[2] :], new], 2))
        return self.k_cache, self.v_cache, None


class Turns(Rolls):
    """A slot is dropped in the middle."""

    def write(self, past, k, v, at):
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            cache.copy_(torch.cat([cache[:, :, :2], cache[:, :, 3:], new], 2))
        return self.k_cache, self.v_cache, None


def test_other_writes_stay():
    model, plain = OwnDecoder(Turns), OwnDecoder(Turns)
    stays(model, "the cache is overwritten as a whole")
    with torch.no_grad():
        for at in (3, 4):
            plain.decode_one_token(torch.ones(2, 1, dtype=torch.int64), torch.tensor([at]))
    for mine, own in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, own)


def test_slots_behind_the_end_stay():
    """A caller's ring: attention sees tokens behind the position that is written."""

    class Everything(Buffers):
        def mask(self, at, total, padding, past, dtype):
            return torch.ones(1, 1, at.shape[0], total, dtype=torch.bool)

    stays(OwnDecoder(Everything), "attention sees tokens behind those that are written")


@torch.no_grad()
def test_a_compiled_prompt_packs_the_caller_s_buffers():
    model, plain = OwnDecoder(Buffers), OwnDecoder(Buffers)
    model.compile(backend="akvq", options=LOSSLESS)
    for seed in (1, 2):
        assert torch.equal(
            rollout(model, model.decode_one_token, 2, seed), rollout(plain, plain.decode_one_token, 2, seed)
        )
        assert all(isinstance(x, PackedKV) for x in model.buffers())


@torch.no_grad()
def test_another_backend_s_graph_is_refused():
    """It would read memory that nobody wrote."""
    model, _, _ = packed_buffers()
    other = torch.compile(model.prefill, backend="aot_eager")
    with pytest.raises(Exception, match="another backend compiles"):
        other(prompt(2, 1, models.VOCABULARY), torch.arange(PROMPTS[1]))


@torch.no_grad()
def test_copies_of_a_packed_buffer_are_buffers_too():
    model, _, step = packed_buffers()
    twin = copy.deepcopy(model)
    plain = OwnDecoder(Buffers)
    other = torch.compile(twin.decode_one_token, backend="akvq", options=LOSSLESS)
    assert torch.equal(rollout(twin, other, 2, 3), rollout(plain, plain.decode_one_token, 2, 3))
    assert all(isinstance(x, PackedKV) for x in (*twin.buffers(), *model.buffers()))
    assert twin.layers[0].attention.k_cache.storage is not model.layers[0].attention.k_cache.storage


def test_a_prompt_with_images_and_padding():
    model, inputs = ZOO["llava"]()
    given = {**inputs, "cache_implementation": "static", "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = ZOO["llava"]()[0].generate(**given, disable_compile=True).sequences
    out = model.generate(**given, compile_config=compile_config(**LOSSLESS))
    assert torch.equal(out.sequences, expected) and all(is_packed(cache_of(out)))
    keys = cache_of(out).layers[0].keys
    count = inputs["attention_mask"].shape[1]
    padded = keys.storage["classes"][:, :count] == PADDING
    assert torch.equal(padded, inputs["attention_mask"] == 0) and padded.any()
