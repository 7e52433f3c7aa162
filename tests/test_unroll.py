"""Static windows that a model overwrites as a whole (passes/apart/unroll.py) are packed as sliding ones, in the place
of the tensors that its caller holds (akvq_fx/in_place.py)."""

import copy

import pytest
import torch
from torch import nn

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.config import CAPTURED_MODE
from akvq_fx.passes.apart.unroll import unroll
from tests.test_cuda_graph import Rerun

transformers = pytest.importorskip("transformers")
WINDOW = 16
LOSSLESS = {"inner": "eager", "body_bits": 16}
TWO_BITS = {"inner": "eager", "window": 4, "pivots": 2}


def mistral(layers: int = 1):
    config = transformers.MistralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=128, max_position_embeddings=1024, sliding_window=WINDOW,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.generation_config.update(do_sample=False, pad_token_id=0, eos_token_id=None)
    return model


def prompt(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(batch * tokens))


def generated(model, ids, count, **how):
    how = how if "past_key_values" in how else {"cache_implementation": "static", **how}
    return model.generate(ids, max_new_tokens=count, return_dict_in_generate=True, **how)


def tensors_of(output):
    return [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]


@pytest.fixture(scope="module")
def pair():
    """(uncompiled, compiled in lossless mode)"""
    model = mistral()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="akvq", options=LOSSLESS)
    return model, compiled


# tokens of the prompt, and new ones: behind the window, in it, to its edge; so many that codes move to the front
@pytest.mark.parametrize(
    "batch, tokens, count", [(1, 20, 12), (3, 5, 30), (2, WINDOW, 6), (2, WINDOW - 1, 6), (1, 18, 150)]
)
def test_lossless_tokens_are_those_of_the_uncompiled_model(pair, batch, tokens, count):
    want, got = (generated(model, prompt(batch, tokens), count) for model in pair)
    assert torch.equal(want.sequences, got.sequences)
    assert all(isinstance(x, PackedKV) and x.shape[2] == WINDOW for x in tensors_of(got))
    assert max(x.storage.capacity for x in tensors_of(got)) <= 256  # bounded, however long


@pytest.mark.parametrize("how", ["padded", "beams"])
def test_padding_and_beams(pair, how):
    ids, more = prompt(2, 20), {"num_beams": 2}
    if how == "padded":
        more = {"attention_mask": torch.ones_like(ids)}
        more["attention_mask"][0, :7] = 0
    want, got = (generated(model, ids, 10, **more) for model in pair)
    assert torch.equal(want.sequences, got.sequences)


def test_a_cache_that_is_reset_begins_anew_as_plain_buffers(pair):
    caches = [transformers.StaticCache(config=pair[0].config, max_cache_len=60) for _ in pair]
    for tokens in (20, 6, 20):
        want, got = (
            generated(model, prompt(2, tokens), 20, past_key_values=cache)
            for model, cache in zip(pair, caches, strict=True)
        )
        assert torch.equal(want.sequences, got.sequences)
        assert all(isinstance(x, PackedKV) for x in tensors_of(got))
        for cache in caches:
            cache.reset()
        assert not any(isinstance(x, PackedKV) for x in tensors_of(got))


def test_several_turns_go_on_in_one_cache(pair):
    caches = [transformers.StaticCache(config=pair[0].config, max_cache_len=200) for _ in pair]
    ids = prompt(1, 10)
    for _ in range(4):  # of the second one the chunk crosses the window's edge
        want, got = (generated(model, ids, 9, past_key_values=cache) for model, cache in zip(pair, caches, strict=True))
        assert torch.equal(want.sequences, got.sequences)
        ids = torch.cat([want.sequences, prompt(1, 7)], 1)
    keys, packed = (cache.layers[0].keys for cache in caches)
    torch.testing.assert_close(packed.dequantize(), keys)


def test_sizes_that_were_seen_compile_nothing_anew(pair):
    generated(pair[1], prompt(2, 20), 12)
    graphs = len(akvq_fx.report(pair[1]).graphs)
    generated(pair[1], prompt(2, 20), 12)
    assert len(akvq_fx.report(pair[1]).graphs) == graphs


def test_no_token_is_quantized_twice():
    """Tokens that two bits hold are the same numbers after a step, a slot further in front."""
    model = mistral()
    run, cache = torch.compile(model, backend="akvq", options=TWO_BITS), transformers.StaticCache(model.config, 80)
    with torch.no_grad():
        run(prompt(1, 20), past_key_values=cache)
        for step in range(3):
            before = cache.layers[0].keys.dequantize()
            run(prompt(1, step + 1)[:, -1:], past_key_values=cache)
            after = cache.layers[0].keys.dequantize()
            torch.testing.assert_close(before[:, :, 1 : WINDOW - 4], after[:, :, : WINDOW - 5])
    assert "16-bit" not in str(akvq_fx.report(model))


def test_a_prompt_that_ran_uncompiled():
    want, model = mistral(), mistral()
    how = transformers.CompileConfig(backend="akvq", mode=None, fullgraph=False, options=LOSSLESS)
    how._compile_all_devices = True
    for tokens in (20, 5):
        got = generated(model, prompt(2, tokens), 16, compile_config=how)
        assert torch.equal(generated(want, prompt(2, tokens), 16).sequences, got.sequences)
        assert all(isinstance(x, PackedKV) for x in tensors_of(got))


def test_steps_are_captured(monkeypatch):
    """The window begins to slide in a step of its own; later ones are replayed, here and in the next generation."""
    monkeypatch.setattr("akvq_fx.backend.compile_inner", lambda gm, examples, config: gm)
    monkeypatch.setattr("akvq_fx.backend.recorder_for", lambda device, counts: Rerun())
    want, model = mistral(), mistral()
    model.compile(backend="akvq", options={"mode": CAPTURED_MODE, "body_bits": 16})
    for _ in range(2):
        got = generated(model, prompt(2, 12), 40)
        assert torch.equal(generated(want, prompt(2, 12), 40).sequences, got.sequences)
    counts = [graph.capture for graph in akvq_fx.report(model).graphs if graph.capture and not graph.capture.reason]
    assert sum(x.replayed for x in counts) >= 2 * 30 and sum(x.captured for x in counts) <= 4
    assert any("begin to slide" in graph.capture.reason for graph in akvq_fx.report(model).graphs if graph.capture)


class Window(nn.Module):
    """One step of attention over a window of the caller's, which is overwritten as a whole."""

    def forward(self, q, k, v, keys, values):
        for buffer, new in ((keys, k), (values, v)):
            self.write(buffer, new)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    def write(self, buffer, new):
        raise NotImplementedError


class RollAndSlice(Window):
    def write(self, buffer, new):
        rolled = torch.roll(buffer, shifts=-1, dims=2)
        rolled[:, :, -1:] = new
        buffer.copy_(rolled)


class RollAndList(Window):
    def write(self, buffer, new):
        rolled = buffer.roll((-1,), (-2,))
        rolled[..., [-1], :] = new
        buffer.copy_(rolled)


class Cat(Window):
    def write(self, buffer, new):
        buffer.copy_(torch.cat([buffer[:, :, new.shape[2] :], new], 2))


class CatAndSlice(Window):
    def write(self, buffer, new):
        buffer.copy_(torch.cat((buffer[:, :, 1:, :], new), dim=-2)[:, :, -buffer.shape[2] :, :])


class RollByTwo(Window):
    """Another token is lost than the first."""

    def write(self, buffer, new):
        rolled = buffer.roll(-2, 2)
        rolled[:, :, -1:] = new
        buffer.copy_(rolled)


class RollAndFirst(Window):
    """The new token takes another slot than the last."""

    def write(self, buffer, new):
        rolled = buffer.roll(-1, 2)
        rolled[:, :, :1] = new
        buffer.copy_(rolled)


class ReadBefore(Window):
    """Somebody reads the window as it was."""

    def forward(self, q, k, v, keys, values):
        before = keys.sum()
        return super().forward(q, k, v, keys, values) + before


def steps(model, count=3):
    """(outputs, the window's tensors) of some steps."""
    draw = torch.Generator().manual_seed(1)
    rows = lambda tokens: torch.randn(2, 2, tokens, 16, generator=draw)
    buffers = [rows(WINDOW), rows(WINDOW)]
    with torch.no_grad():
        outputs = [model(rows(1), rows(1), rows(1), *buffers) for _ in range(count)]
    return outputs, buffers


@pytest.mark.parametrize("spelling", [RollAndSlice, RollAndList, Cat, CatAndSlice])
def test_spellings_of_a_window(spelling):
    want, plain = steps(spelling())
    got, packed = steps(torch.compile(spelling(), backend="akvq", options=LOSSLESS))
    torch.testing.assert_close(got, want)
    for one, other in zip(packed, plain, strict=True):
        assert isinstance(one, PackedKV)
        torch.testing.assert_close(one.dequantize(), other)


def test_a_view_outside_of_a_graph_finds_a_plain_buffer():
    _, (keys, _) = steps(torch.compile(Cat(), backend="akvq", options=LOSSLESS))
    before = keys.dequantize()
    with pytest.warns(UserWarning, match="goes back to 16 bits"):
        last = keys[:, :, -1]
    assert type(keys) is torch.Tensor and torch.equal(keys, before) and torch.equal(last, before[:, :, -1])


class ReadBeforeCat(ReadBefore, Cat):
    pass


@pytest.mark.parametrize("spelling", [RollByTwo, RollAndFirst, ReadBeforeCat])
def test_what_is_no_window_stays(spelling):
    want, plain = steps(spelling())
    got, left = steps(torch.compile(spelling(), backend="akvq", options=LOSSLESS))
    torch.testing.assert_close(got, want)
    for one, other in zip(left, plain, strict=True):
        assert not isinstance(one, PackedKV)
        torch.testing.assert_close(one, other)


def test_a_window_that_others_share_stays():
    """A view of another tensor cannot become another object; its numbers are right all the same."""
    model = torch.compile(Cat(), backend="akvq", options=LOSSLESS)
    slab, want = torch.randn(2, 2, 2, WINDOW, 16), None
    plain = slab.clone()
    new = torch.randn(3, 2, 2, 1, 16)
    with torch.no_grad():
        got = model(*new, *slab)
        want = Cat()(*new, *plain)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(slab, plain)


def test_a_graph_without_a_window_is_the_same_object():
    gm = torch.fx.symbolic_trace(nn.ReLU())
    assert unroll(gm, [], frozenset()).gm is gm
