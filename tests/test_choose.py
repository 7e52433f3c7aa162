"""choose and Supports: a kernel takes only layouts that it names in full; if it cannot be compiled, the next runs."""

import contextlib
import dataclasses
import logging

import pytest
import torch

from akvq_fx import torch_internals
from akvq_fx.kernels import append_cuda, attend_cuda, nvrtc
from akvq_fx.kernels import cache as cache_ops
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.choose import _log_refusal, module_of
from akvq_fx.kernels.layout import Layout
from akvq_fx.kernels.supports import ANY, Supports, words
from tests.kernel_cases import assert_caches_same, assert_close, bf16, case_of, randn
from tests.test_attend import attend_module

TABLES = (attend_module.FASTER, cache_ops.FASTER, cache_ops.FASTER_APPEND)
KERNELS = sorted({name for table in TABLES for names in table.values() for name in names})
every_kernel = pytest.mark.parametrize("name", KERNELS)
LAYOUT = Layout(64, bf16, body_bits=2, window=4, pivots=2)


@dataclasses.dataclass(frozen=True)
class Wider(Layout):
    """A layout of tomorrow."""

    zero_points: bool = False


def about(name: str, layout: Layout) -> tuple:
    """Arguments of a kernel's refusal, for a call that it takes if it takes the layout."""
    x = randn(1, 2, 1, layout.head_dim, dtype=layout.dtype)
    if not name.startswith("attend"):
        return x, layout
    cache = layout.allocate(1, 2, 64)
    return (AttendCall(x, cache, cache, 5, None, None, False, None, None, None, layout, layout),)


@pytest.fixture
def nvidia(monkeypatch):
    """Make the choice of a kernel believe in a GPU that CUDA C++ runs on."""
    monkeypatch.setattr(nvrtc, "device_refusal", lambda index: "")
    monkeypatch.setattr(nvrtc, "_failed", {})
    monkeypatch.setattr(nvrtc, "_binaries", {})
    _log_refusal.cache_clear()  # each reason is logged once a process
    monkeypatch.setattr(attend_cuda, "_multiprocessors", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch_internals, "compile_cache_folder", lambda: None)  # nothing is kept of what is faked here


@every_kernel
def test_a_field_that_a_kernel_does_not_know_is_refused(name, nvidia):
    kernel, known = module_of(name), {f.name: getattr(LAYOUT, f.name) for f in dataclasses.fields(LAYOUT)}
    assert kernel.refusal(*about(name, LAYOUT)) == ""
    assert "the layout has zero_points, of which the kernel knows nothing" in kernel.refusal(
        *about(name, Wider(**known))
    )


@every_kernel
def test_a_kernel_names_every_field_and_nothing_else(name):
    accepted, fields = set(module_of(name).SUPPORTS.accepted), {f.name for f in dataclasses.fields(Layout)}
    assert fields <= accepted
    assert all(hasattr(LAYOUT, name) for name in accepted)


def test_supports_log_refusals_what_came_and_what_is_taken():
    rest = {f.name: ANY for f in dataclasses.fields(Layout)}
    refusal = lambda **given: Supports(**rest | given).refusal(LAYOUT)
    assert refusal() == ""
    assert refusal(body_bits=(4, 8)) == "body_bits is 2, accepted: 4 or 8"
    assert refusal(head_dim=range(16, 49, 16)) == "head_dim is 64, accepted: 16 to 48 in steps of 16"
    assert refusal(pivots=range(2)) == "pivots is 2, accepted: 0 to 1"
    assert refusal(groups=range(2, 5)) == "groups is 1, accepted: 2 to 4"
    assert words(("",)) == "none" and words((torch.float16, bf16)) == "torch.float16 or torch.bfloat16"
    assert Supports(head_dim=ANY).refusal(LAYOUT) == "the layout has dtype, of which the kernel knows nothing"


def no_compiler(*_, **__):
    raise OSError("Could not find any NVRTC library")


def bad_compiler(*_, **__):
    raise RuntimeError("Kernel compilation failed:\nnvrtc: error: invalid value for --gpu-architecture")


def old_driver(*_, **__):
    raise RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain.")


FAULTS = {
    "no compiler": ("_nvrtc_compile", no_compiler, "Could not find any NVRTC library"),
    "bad compiler": ("_nvrtc_compile", bad_compiler, "invalid value for --gpu-architecture"),
    "old driver": ("_cuda_load_module", old_driver, "compiled with an unsupported toolchain"),
    "other PyTorch": ("_nvrtc_compile", lambda text: None, "unexpected keyword argument 'nvcc_options'"),
}


@pytest.fixture(params=FAULTS)
def fault(request, nvidia, monkeypatch):
    """(how often it came up, what is said of it)"""
    name, raises, said = FAULTS[request.param]
    calls = []

    def function(*args, **options):
        calls.append(args)
        return raises(*args, **options)

    monkeypatch.setattr(torch.cuda._utils, "_nvrtc_compile", lambda *_, **__: (b"", ""))
    monkeypatch.setattr(torch.cuda._utils, name, function)
    return calls, said


def reasons(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("next_in_line", ((), ("attend_cpu",)), ids=("reference", "another kernel"))
def test_attend_goes_to_the_next_kernel_in_line(fault, next_in_line, monkeypatch, caplog):
    calls, said = fault
    layout = dataclasses.replace(LAYOUT, rotated=True)
    cache, q = case_of(layout, T=40, capacity=40).pack(), randn(2, 4, 1, 64, dtype=bf16)
    args = (q, cache, cache, 40, None, None, False, None, None, None, str(layout), str(layout), True, True)
    due = torch.ops.akvq.attend(*args)
    monkeypatch.setattr(attend_module, "FASTER", {"cpu": ("attend_cuda", *next_in_line)})
    with caplog.at_level(logging.INFO, "akvq_fx.kernels.choose"):
        for _ in range(3):
            assert_close("out", due, torch.ops.akvq.attend(*args))
    assert len(calls) == 1, "nothing is compiled in vain again"
    (reason,) = [text for text in reasons(caplog) if "attend_cuda" in text]
    assert reason.startswith(
        "akvq::attend is not answered by attend_cuda: kernels/attend_cuda.cu could not be compiled or"
    )
    assert said in reason


def test_append_and_pack_go_to_the_next_kernel_in_line(fault, monkeypatch, caplog):
    calls, said = fault
    layout = Layout(64, bf16, body_bits=2, text_bits=4, window=4, pivots=2, rotated=True)
    case = case_of(layout, T=70, capacity=80)
    rest = (torch.arange(70), case.classes, case.pivots)
    due, new = case.pack(), randn(2, 2, 1, 64, dtype=bf16)
    monkeypatch.setattr(cache_ops, "FASTER", {"cpu": ("append_cuda",)})
    monkeypatch.setattr(cache_ops, "FASTER_APPEND", {"cpu": ("append_cuda", "append_cpu")})
    with caplog.at_level(logging.INFO, "akvq_fx.kernels.choose"):
        got = torch.ops.akvq.pack(case.x, *rest, None, 80, str(layout))
        for step in (70, 71):
            torch.ops.akvq.append(got, new, torch.tensor([step]), None, None, str(layout), True)
    assert len(calls) == 1
    assert (
        len({text.split(": ", 1)[1] for text in reasons(caplog) if "append_cuda" in text}) == 1 and said in caplog.text
    )
    monkeypatch.undo()
    for step in (70, 71):
        torch.ops.akvq.append(due, new, torch.tensor([step]), None, None, str(layout), True)
    assert_caches_same(due, got, layout)


def test_all_kernels_of_a_prompt_are_compiled_before_the_first_writes(nvidia, monkeypatch):
    """With a text overlay there are two: the second one's fault must not leave half a write behind."""
    order = []

    def compiled(index, source, names, macros):
        order.append(f"compile {names[0]}")
        return {names[0]: None}

    monkeypatch.setattr(nvrtc, "compiled", compiled)
    monkeypatch.setattr(nvrtc, "launch", lambda *_: order.append("launch"))
    layout = Layout(64, bf16, body_bits=2, text_bits=4)
    x = randn(1, 2, 64, 64, dtype=bf16)
    append_cuda.append(layout.allocate(1, 2, 64, 64), x, torch.arange(64), None, None, layout)
    assert order == ["compile pack", "compile append", "launch", "launch"]


def test_a_device_without_memory_is_an_error_and_no_refusal(nvidia, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda._utils, "_nvrtc_compile", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        nvrtc.compiled(0, "attend_cuda", ("attend", "combine"), ())
    assert nvrtc.refusal(0, "attend_cuda") == ""
