"""CUDA graphs on a GPU: how many are captured over a whole generation, and that nothing else changes."""

import contextlib
import gc

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import akvq_fx
from akvq_fx.cuda_recorder import CudaRecorder
from akvq_fx.kept_buffers import POOL, with_room
from akvq_fx.report import Capture
from akvq_fx.transformers_names import cache_of
from tests.zoo import ZOO, T, finish

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
    pytest.mark.filterwarnings("error:.*no CUDA graph is used:UserWarning"),
]
PROMPT, TOKENS, STEP = 23, 200, 128
# sets of buffers that a generation goes through: capacities 128 and 256, or one static cache
SETS = {"growing": 2, "static": 1}
BY_NAME = {"mode": "reduce-overhead"}
AGREED = 0.95  # of greedy choices at 2 bits: a matmul that is fused in another way may move a code by one


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return finish(LlamaForCausalLM(LlamaConfig(**T(num_hidden_layers=2)))).cuda()


def inputs_of() -> dict:
    """Two rows, the first with five tokens of left padding."""
    ids = torch.randint(10, 90, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def compiled(bits: int, **options) -> LlamaForCausalLM:
    model = model_of()
    model.compile(backend="akvq", options={"body_bits": bits, "capacity_step": STEP, **options})
    return model


def generate(model, cache: str, **kwargs):
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    given = {"max_new_tokens": TOKENS, "output_logits": True, "return_dict_in_generate": True, **extra, **kwargs}
    return model.generate(**inputs_of(), **given)


def counted(model) -> Capture:
    (graph,) = [g for g in akvq_fx.report(model).graphs if g.kind == "decode"]
    return graph.capture


def agreement(one, other) -> float:
    """The share of steps, up to the first token that differs in a row, at which both choose the same."""
    chosen = [torch.stack([logits.argmax(-1) for logits in out.logits]) for out in (one, other)]
    differ = (chosen[0] != chosen[1]).any(1)
    return 1.0 if not differ.any() else int(differ.nonzero()[0]) / len(differ)


@pytest.mark.parametrize("how", [{}, BY_NAME, {"inner": "eager"}], ids=["unasked", "by name", "eager"])
@pytest.mark.parametrize("cache", list(SETS))
def test_lossless_generation_is_the_same_and_is_captured_once_for_each_set_of_buffers(cache, how):
    expected = generate(compiled(16, cuda_graphs=False), cache)
    torch._dynamo.reset()
    counters.clear()
    model = compiled(16, **how)
    out = generate(model, cache)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # a result that a replay overwrote is another step's
    assert counters["stats"]["unique_graphs"] == 2, "the prompt and one decode graph: no length is compiled for"
    seen = counted(model)
    assert seen == Capture(
        captured=SETS[cache], replayed=TOKENS - 1 - SETS[cache], ran=SETS[cache], dropped=seen.dropped
    )


@pytest.mark.parametrize("cache", list(SETS))
def test_two_bits(cache):
    expected = generate(compiled(2, cuda_graphs=False), cache)
    torch._dynamo.reset()
    model = compiled(2)
    out = generate(model, cache)
    torch.testing.assert_close(out.logits[1], expected.logits[1], rtol=0, atol=1e-2)
    assert agreement(out, expected) >= AGREED
    seen = counted(model)
    assert seen.captured == SETS[cache] and seen.replayed == TOKENS - 1 - SETS[cache]


def poison() -> int:
    """Overwrite every kept buffer that is free by bytes that are NaN, or numbers that no cache holds."""
    free = [kept for kept in POOL.sets if kept.is_free()]
    for x in [x for kept in free for x in kept.tensors if x.numel()]:
        x.view(torch.uint8).fill_(0xFF)
    return len(free)


@pytest.mark.parametrize("cache", list(SETS))
def test_later_generations_capture_nothing(cache):
    """Ten of one size, then one beside a cache that is alive."""
    model = compiled(2)
    first = generate(model, cache, return_dict_in_generate=False, output_logits=False)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(9):
        assert torch.equal(generate(model, cache, return_dict_in_generate=False, output_logits=False), first)
        assert poison() == SETS[cache]
    assert counters["stats"]["unique_graphs"] == graphs, "a later generation compiles nothing"
    seen = counted(model)
    assert seen.captured == SETS[cache] and seen.dropped == 0 and seen.replayed + seen.ran == 10 * (TOKENS - 1)
    assert f"{seen.kept:,} bytes kept" in str(akvq_fx.report(model))
    second = generate(model, cache)
    held = [x.dequantize() for layer in cache_of(second).layers for x in (layer.keys, layer.values)]
    logits = [x.clone() for x in second.logits]
    assert torch.equal(generate(model, cache, return_dict_in_generate=False, output_logits=False), first)
    poison()
    now = [x.dequantize() for layer in cache_of(second).layers for x in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True)), "a cache that is alive is not written over"
    assert all(torch.equal(a, b) for a, b in zip(logits, second.logits, strict=True)), "results belong to the caller"
    assert counted(model).captured == SETS[cache] + 1
    del second
    gc.collect()
    assert akvq_fx.free_kept_buffers() > 0 and counted(model).dropped == SETS[cache] + 1 and counted(model).kept == 0
    assert torch.equal(generate(model, cache, return_dict_in_generate=False, output_logits=False), first)


def test_kept_buffers_are_given_back_when_memory_is_short():
    """In a capture, which is tried again, and in what a prompt allocates."""

    class Hungry(CudaRecorder):
        asked: list[int] = []

        def __call__(self, function, arguments, device):
            self.asked.append(POOL.nbytes())
            if len(self.asked) != 2:
                return super().__call__(function, arguments, device)
            more = lambda *a: (torch.empty(1 << 50, device=device), function(*a))[1]
            return super().__call__(more, arguments, device)

    expected = generate(compiled(16, cuda_graphs=False), "growing", max_new_tokens=20).sequences
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("akvq_fx.backend.recorder_for", lambda device, counts: Hungry())
        model = compiled(16)
        short = {name: x[:, -9:].repeat(2, 1) for name, x in inputs_of().items()}
        model.generate(**short, max_new_tokens=5)
        gc.collect()
        out = generate(model, "growing", max_new_tokens=20)
    assert torch.equal(out.sequences, expected) and len(Hungry.asked) == 3 and Hungry.asked[2] < Hungry.asked[1]
    graphs = [g.capture for g in akvq_fx.report(model).graphs if g.kind == "decode"]
    assert not any(c.reason for c in graphs) and sum(c.captured for c in graphs) == 2
    del out
    gc.collect()
    assert POOL.nbytes()
    with_room(lambda: torch.empty((1 << 50) if POOL.nbytes() else 1, device="cuda"))
    assert not POOL.nbytes()


def test_memory_of_a_finished_generation_comes_back():
    model = compiled(2)
    generate(model, "growing", output_logits=False)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generate(model, "growing", output_logits=False)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20
    kept = akvq_fx.free_kept_buffers()
    assert kept > 0 and before - torch.cuda.memory_allocated() > kept / 2, "the rest was inputs and results of graphs"


def test_beams_are_the_same():
    expected = generate(compiled(16, cuda_graphs=False), "growing", num_beams=3, max_new_tokens=20, output_logits=False)
    torch._dynamo.reset()
    model = compiled(16)
    out = generate(model, "growing", num_beams=3, max_new_tokens=20, output_logits=False)
    assert torch.equal(out.sequences, expected.sequences)
    seen = counted(model)
    assert seen.captured <= 2 and seen.replayed >= 17, "each step's cache moves into kept buffers"


def test_another_stream_has_its_own_graph():
    model = compiled(16)
    expected = generate(model, "static", max_new_tokens=30).sequences
    before = counted(model).captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = generate(model, "static", max_new_tokens=30).sequences
    stream.synchronize()
    assert torch.equal(out, expected) and counted(model).captured == before + 1


def test_a_graph_that_cannot_be_captured_says_so_and_runs():
    """A body that waits for the device: the capture fails, the tokens are right, the report says why. A warning says it
    too where CUDA graphs were asked for."""
    expected = generate(compiled(16), "growing", max_new_tokens=6).sequences

    class Asking(CudaRecorder):
        def __call__(self, function, arguments, device):
            return super().__call__(
                lambda *a: (torch.ones(1, device=device).item(), function(*a))[1], arguments, device
            )

    for how in (BY_NAME, {}):
        torch._dynamo.reset()
        other = compiled(16, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("akvq_fx.backend.recorder_for", lambda device, counts: Asking())
            warned = pytest.warns(UserWarning, match="no CUDA graph is used for decoding; capturing it failed")
            with warned if how else contextlib.nullcontext():
                out = generate(other, "growing", max_new_tokens=6)
        assert torch.equal(out.sequences, expected)
        assert "capturing it failed" in counted(other).reason and counted(other).ran == 5
    generate(other, "growing", max_new_tokens=3, do_sample=True)  # PyTorch's generator is out of the capture, too
    torch._dynamo.reset()
    assert torch.equal(generate(compiled(16), "growing", max_new_tokens=6).sequences, expected)


@pytest.mark.parametrize("how", [{}, BY_NAME], ids=["unasked", "by name"])
def test_only_decode_steps_are_captured(how):
    """Not a vision tower: Inductor's own graphs of it broke in the second call."""
    (model, inputs), (plain, _) = ZOO["qwen2_5_vl"](), ZOO["qwen2_5_vl"]()
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    model.cuda().compile(backend="akvq", options={"body_bits": 16, **how})
    expected = plain.cuda().generate(**inputs, max_new_tokens=8)
    for _ in range(3):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected)
    assert counted(model).captured
