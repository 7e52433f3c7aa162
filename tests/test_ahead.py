"""Kernels in CUDA C++ that a graph will launch are compiled beside the inner compiler: once, and just these."""

import contextlib
import threading

import pytest
import torch

from akvq_fx import ahead, backend, torch_internals, which_kernel
from akvq_fx.kernels import append_cuda, attend_cuda, nvrtc
from akvq_fx.kernels.choose import Unavailable
from akvq_fx.kernels.layout import Layout
from tests.kernel_cases import bf16

KEYS = Layout(64, bf16, body_bits=2, window=64, pivots=15, rotated=True, affine=True, symmetric=True, uneven=True,
              blocks=True, body_clip=1.0)  # fmt: skip
VALUES = Layout(64, bf16, body_bits=2, window=64, pivots=15, rotated=True, symmetric=True, body_clip=1.0,
                shares_classes=True)  # fmt: skip
IMAGES = tuple(Layout(64, bf16, body_bits=2, text_bits=4, window=64, rotated=True, affine=key, shares_classes=not key)
               for key in (True, False))  # fmt: skip


@pytest.fixture
def compiler(monkeypatch):
    """(source, kernel, macros) of everything that is compiled, for a GPU that is not there."""
    compiled = []

    def binary(index, source, names, macros):
        compiled.append((source, names[0], dict(macros)))
        return repr(macros).encode()

    monkeypatch.setattr(nvrtc, "_binary", binary)
    monkeypatch.setattr(nvrtc, "_binaries", {})
    monkeypatch.setattr(nvrtc, "_failed", {})
    monkeypatch.setattr(nvrtc, "device_refusal", lambda index: "")
    monkeypatch.setattr(nvrtc, "_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch_internals, "nvrtc", lambda: (None, lambda made, names: dict.fromkeys(names, Kernel)))
    return compiled


class Kernel:
    func = "function"

    @staticmethod
    def set_shared_memory_config(size):
        pass


def call(op, tokens, layouts=(KEYS, VALUES), masked=None, device="cuda:0"):
    sizes = (1, 8, 2, tokens, 64)
    return which_kernel.Call(op, torch.device(device), bf16, sizes, 512, 256, masked, False, 0.0, False,
                             tuple(map(str, layouts)))  # fmt: skip


def wait(calls):
    thread = ahead.begin(calls)
    if thread is not None:
        thread.join()


@pytest.mark.parametrize("masked", (None, torch.bool, torch.float32), ids=str)
def test_a_step_finds_the_kernels_that_it_launches(masked, compiler, monkeypatch):
    wait([call("attend", 1, masked=masked), call("append", 1)])
    made = len(compiled_forms(compiler))
    assert made == 3, "attend, and append for keys and for values"
    launched = []
    monkeypatch.setattr(nvrtc, "launch", lambda kernel, *rest: launched.append(kernel))
    monkeypatch.setattr(attend_cuda, "_multiprocessors", lambda index: 132)
    monkeypatch.setattr(attend_cuda, "_compiled", attend_cuda._compiled.__wrapped__)
    monkeypatch.setattr(nvrtc, "compiled", nvrtc.compiled.__wrapped__)
    buffers = [layout.allocate(1, 2, 256, 0) for layout in (KEYS, VALUES)]
    at, x = torch.arange(1), torch.zeros(1, 2, 1, 64, dtype=bf16)
    for cache, layout in zip(buffers, (KEYS, VALUES), strict=True):
        append_cuda.append(cache, x, at, None, None, layout, True)
    mask = None if masked is None else torch.ones(1, 1, 1, 256, dtype=masked)
    query = torch.zeros(1, 8, 1, 64, dtype=bf16)
    given = which_kernel.attend_call(call("attend", 1, device="cpu"), query, x, KEYS, VALUES)
    attend_cuda.attend(given._replace(q=query, key=buffers[0], value=buffers[1], mask=mask), 1)
    assert len(launched) == 3 and len(compiled_forms(compiler)) == made, "nothing was compiled once more"


def compiled_forms(compiler):
    return {(source, name, *sorted(macros.items())) for source, name, macros in compiler}


def test_a_prompt_of_images_has_a_launch_for_its_text(compiler):
    wait([call("pack", 700, IMAGES)])
    kernels = [(name, macros["TEXT_ONLY"], macros["ROTATE"]) for _, name, macros in compiler]
    assert kernels == [("pack", 1, 2), ("append", 1, 2), ("pack", 1, 1), ("append", 1, 1)]


def test_other_devices_and_other_kernels_start_nothing(compiler):
    wide = tuple(Layout(64, torch.float64, body_bits=2) for _ in range(2))
    assert ahead.begin([call("attend", 1, device="cpu"), call("pack", 9, wide), call("rotate", 1)]) is None
    assert compiler == []


def test_a_launch_waits_for_the_thread_that_compiles(monkeypatch):
    started, go, made = threading.Event(), threading.Event(), []

    def binary(*key):
        made.append(key)
        started.set()
        go.wait(10)
        return b"binary"

    monkeypatch.setattr(nvrtc, "_binary", binary)
    monkeypatch.setattr(nvrtc, "_binaries", {})
    key, found = (0, "append_cuda", ("append",), (("A", 1),)), []
    first = threading.Thread(target=lambda: found.append(nvrtc.binary(*key)))
    first.start()
    assert started.wait(10)
    second = threading.Thread(target=lambda: found.append(nvrtc.binary(*key)))
    second.start()
    assert found == [] and second.is_alive()
    go.set()
    first.join()
    second.join()
    assert found == [b"binary"] * 2 and made == [key]


def test_a_compiler_that_fails_is_met_by_whoever_launches(compiler, monkeypatch, caplog):
    def fails(*key):
        raise RuntimeError("no room for registers")

    monkeypatch.setattr(nvrtc, "_binary", fails)
    with caplog.at_level("INFO", "akvq_fx.ahead"):
        wait([call("append", 1)])
    assert "not done ahead: no room for registers" in caplog.text
    macros = append_cuda.macros(VALUES, 1, False)
    with pytest.raises(Unavailable, match="could not be compiled or loaded: no room for registers"):
        nvrtc.compiled.__wrapped__(0, "append_cuda", ("append",), macros)


def test_the_backend_begins_with_every_graph_that_it_rewrites(monkeypatch):
    begun = []
    monkeypatch.setattr(backend.ahead, "begin", begun.append)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kv = torch.nn.Linear(16, 16)

        def forward(self, x, past=None):
            kv = self.kv(x).unflatten(-1, (2, 8)).transpose(1, 2)
            kv = kv if past is None else torch.cat([past, kv], 2)
            return torch.nn.functional.scaled_dot_product_attention(kv[:, :, -x.shape[1] :], kv, kv), kv

    with torch.no_grad():
        torch.compile(Model(), backend="akvq", options={"inner": "eager"})(torch.zeros(1, 7, 16))
    assert len(begun) == 1


@pytest.mark.parametrize("inner, times", [("eager", 0), ("inductor", 1)])
def test_inductor_reads_its_files_ahead_once_and_only_where_it_is_used(inner, times, monkeypatch):
    read = []
    monkeypatch.setattr(torch_internals, "identify_inductor", lambda: (lambda: read.append(1),))
    ahead.begin_inductor.cache_clear()
    compiled = torch.compile(torch.nn.ReLU(), backend="akvq", options={"inner": inner})
    for size in (2, 3):
        assert compiled(torch.ones(size, requires_grad=True)).sum() == size
    if times:
        ahead.begin_inductor().join()
    assert len(read) == times
    ahead.begin_inductor.cache_clear()
