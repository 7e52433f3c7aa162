"""read_unmatched: a packed cache whose reader is not matched is read through a copy, appended to, and never misread."""

import pytest
import torch

import akvq_fx
from akvq_fx.packed_kv import PackedKV
from tests import attention_models as models
from tests.attention_models import LOSSLESS, Attention, Decoder, evidence, token_ids

ROTATED = {"body_bits": 16, "rotate": True}
TWO_BITS = {"tsa_layers": ()}


def ops(capture) -> list[str]:
    return [str(n.target).split(".")[1] for n in capture.state.graph.nodes if str(n.target).startswith("akvq.")]


@pytest.mark.parametrize("options", [LOSSLESS, ROTATED, {**ROTATED, "value_rotation": "online"}, TWO_BITS], ids=str)
@pytest.mark.parametrize("spelling", [models.SwitchesToSine, models.StaticSwitchesToSine], ids=lambda c: c.__name__)
def test_written_out_attention_reads_a_copy(spelling, options):
    seen = evidence(Decoder(spelling), options)
    prompt, step = seen.captures
    assert prompt.state.sites and not step.state.sites
    assert ops(step).count("append") == 2 and ops(step).count("dequantize") == 2
    assert all(isinstance(t, PackedKV) for t in seen.cache[0])
    assert seen.error <= 1e-4
    misses = step.report("read_unmatched").missed
    assert len(misses) == 2 and all("dequantized for it" in m.reason and m.node for m in misses)


def test_two_bits_reach_the_unmatched_reader():
    seen = evidence(Decoder(models.SwitchesToSine), {**TWO_BITS, "window": 1, "pivots": 1}, prompt=16)
    assert seen.error > 1e-4, "16-bit numbers reached a reader of a 2-bit cache"


def test_a_slice_of_a_packed_cache_is_plain():
    seen = evidence(Decoder(models.SwitchesToMiddle), LOSSLESS, steps=1)
    assert seen.error <= 1e-6
    assert [type(t) for t in seen.cache[0]] == [torch.Tensor] * 2 and seen.cache[0][0].shape[2] == 3


def test_the_last_tokens_of_a_packed_cache_are_packed():
    seen = evidence(Decoder(models.SwitchesToSliding), LOSSLESS, steps=3)
    assert seen.error <= 1e-6
    assert [type(t) for t in seen.cache[0]] == [PackedKV] * 2 and seen.cache[0][0].shape[2] == 4


def test_a_static_cache_that_is_rolled_before_it_is_full_goes_back_to_16_bits():
    seen = evidence(Decoder(models.SwitchesToRoll), LOSSLESS)
    assert seen.error <= 1e-6
    assert [type(t) for t in seen.cache[0]] == [torch.Tensor] * 2
    last = akvq_fx.report(seen.model).rows[-1][1]
    assert last.status == "16-bit" and "rolled before all of its slots were written" in last.reason


class Measured(Attention):
    """The cache's size is asked for in every way that tensors know."""

    def attend(self, q, k, v, mask):
        y = super().attend(q, k, v, mask)
        return y * (k.shape[2] + k.size(2) + k.size()[-2] + v.numel() // v.shape[-1] // k.dim() + len(k))

    def write(self, past, k, v, at):
        extra = 0 if past is None else past[0].numel() + past[1].size()[2] + past[0].size(-2) + past[0].ndim
        k, v, kept = super().write(past, k, v, at)
        return k + 0 * extra, v, kept


class SizedPast(Attention):
    """Keys are scaled by the size of the past."""

    def write(self, past, k, v, at):
        if past is not None:
            k = k * (1 + past[0].numel() / 1000 + past[1].size()[2] / 100 + past[0].size(-2) + past[0].ndim)
        return super().write(past, k, v, at)


def test_sizes_of_a_packed_cache_are_logical():
    seen = evidence(Decoder(SizedPast), {**LOSSLESS, "capacity_step": 64})
    assert seen.captures[1].state.sites and seen.error <= 1e-5


def test_sizes_of_what_attention_reads_are_logical():
    seen = evidence(Decoder(Measured), {**LOSSLESS, "capacity_step": 64})
    assert seen.error <= 1e-3


class SecondReader(Attention):
    """A step reads the cache by attention, then by a mean."""

    def attend(self, q, k, v, mask):
        y = super().attend(q, k, v, mask)
        return y + mean_seen(v, mask) if q.shape[2] == 1 else y


class EarlyReader(Attention):
    """A step reads the cache by a mean, then by attention."""

    def attend(self, q, k, v, mask):
        early = mean_seen(v, mask) if q.shape[2] == 1 else 0
        return super().attend(q, k, v, mask) + early


def mean_seen(v, mask):
    """Mean over the tokens that the step sees."""
    if mask is None:
        return v.mean(dim=(1, 2), keepdim=True)
    return (v * mask.transpose(-1, -2)).sum(dim=(1, 2), keepdim=True) / mask.sum()


class StaticSecondReader(SecondReader, models.StaticIndexCopy):
    """A step reads a static cache by attention, then by a mean."""


class StaticEarlyReader(EarlyReader, models.StaticIndexCopy):
    """A step reads a static cache by a mean, after it was written and before attention."""


class ReaderAroundChunks(Attention):
    """A chunk over a filled cache reads its values by a mean, before attention and after it."""

    chunk = 4

    def attend(self, q, k, v, mask):
        if q.shape[2] != self.chunk:
            return super().attend(q, k, v, mask)
        early = self.mean(v, mask)
        return super().attend(q, k, v, mask) + early + self.mean(v, mask)

    def mean(self, x, mask):
        some = mask.any(-2)[..., None]
        return (x * some).sum(dim=(1, 2), keepdim=True) / some.sum()


class StaticReaderAroundChunks(ReaderAroundChunks, models.StaticIndexCopy):
    """The same over a static cache."""


@pytest.mark.parametrize("options", [LOSSLESS, ROTATED, TWO_BITS], ids=str)
@pytest.mark.parametrize("spelling", [ReaderAroundChunks, StaticReaderAroundChunks], ids=lambda c: c.__name__)
def test_readers_around_a_chunk_see_it(spelling, options):
    """The chunk is attended before it is appended; who reads the cache otherwise reads it with the chunk."""
    seen = evidence(Decoder(spelling), options, steps=0, chunk=4)
    copies = 2 if spelling is StaticReaderAroundChunks else 1  # what grows is one tensor from the start
    assert (ops(seen.captures[1]).count("append"), ops(seen.captures[1]).count("dequantize")) == (2, copies)
    assert seen.error <= 1e-4


@pytest.mark.parametrize("options", [LOSSLESS, {**ROTATED, "value_rotation": "online"}], ids=str)
@pytest.mark.parametrize(
    "spelling", [SecondReader, EarlyReader, StaticSecondReader, StaticEarlyReader], ids=lambda c: c.__name__
)
def test_a_second_reader_gets_a_copy(spelling, options):
    seen = evidence(Decoder(spelling), options)
    step = seen.captures[1]
    assert ops(step).count("attend") == 1 and ops(step).count("dequantize") == 1 and ops(step).count("append") == 2
    assert seen.error <= 1e-4


def test_a_second_reader_of_folded_values():
    seen = evidence(Decoder(SecondReader).double(), ROTATED)
    assert seen.error <= 1e-10


def test_a_cache_that_passes_through_is_the_same_object():
    class Passes(Decoder):
        """A step that looks at no cache hands it on."""

        def forward(self, tokens, cache=None, padding=None, at=None, look=True):
            if look:
                return super().forward(tokens, cache, padding, at)
            return self.head(self.embed(tokens)), cache

    model, ids = Passes(), token_ids(2, 6)
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    with torch.no_grad():
        _, cache = run(ids)
        _, after = run(ids[:, :1], cache, look=False)
    assert after[0][0] is cache[0][0] and after[0][1] is cache[0][1]


def test_grows_without_a_reader():
    def grow(keys, new):
        return torch.cat([keys, new], dim=2)

    model, ids = Decoder(), token_ids(2, 6)
    with torch.no_grad():
        _, cache = torch.compile(model, backend=models.Spy(**ROTATED))(ids)
        before, new = cache[0][0].dequantize(), torch.randn(2, 2, 1, 16)
        spy = models.Spy(**ROTATED)
        longer = torch.compile(grow, backend=spy)(cache[0][0], new)
    assert isinstance(longer, PackedKV) and longer.shape[2] == 7 and "append" in ops(spy.captures[0])
    torch.testing.assert_close(longer.dequantize(), torch.cat([before, new], 2), rtol=0, atol=1e-5)


def test_report_names_the_dequantized_layer():
    seen = evidence(Decoder(models.SwitchesToSine), LOSSLESS, steps=1)
    assert any(row.status == "dequantized" for _, row in akvq_fx.report(seen.model).rows)
