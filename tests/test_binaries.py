"""Compiled kernels are kept for later processes, and a folder that fails is no error."""

import contextlib

import pytest
import torch

from akvq_fx import torch_internals
from akvq_fx.kernels import binaries, nvrtc


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_internals, "compile_cache_folder", lambda: str(tmp_path))
    return tmp_path / binaries.FOLDER


@pytest.fixture
def compiler():
    """Counts its calls."""

    def compile_one() -> bytes:
        compile_one.calls += 1
        return b"binary \0 of a kernel"

    compile_one.calls = 0
    return compile_one


def test_what_was_compiled_is_read_by_the_next_process(folder, compiler):
    first = binaries.kept(compiler, "source", ("-DA=1",))
    assert binaries.kept(compiler, "source", ("-DA=1",)) == first == b"binary \0 of a kernel"
    assert compiler.calls == 1
    binaries.kept(compiler, "source", ("-DA=2",))
    assert compiler.calls == 2 and len(list(folder.iterdir())) == 2, "no unfinished file is left"


@pytest.mark.parametrize("broken", [b"", b"short", b"x" * 60])
def test_a_broken_file_is_compiled_and_written_anew(folder, compiler, broken):
    binaries.kept(compiler, "source")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(broken)
    assert binaries.kept(compiler, "source") == b"binary \0 of a kernel"
    assert compiler.calls == 2 and path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_no_error(folder, compiler):
    folder.write_text("a file in its place")
    assert binaries.kept(compiler, "source") == binaries.kept(compiler, "source")
    assert compiler.calls == 2


def test_a_write_that_fails_leaves_nothing(folder, compiler, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(binaries.os, "replace", full)
    assert binaries.kept(compiler, "source") == b"binary \0 of a kernel"
    assert not list(folder.iterdir())


def test_a_fault_of_the_compiler_is_its_own_and_nothing_is_kept(folder):
    def fails():
        raise RuntimeError("Kernel compilation failed")

    with pytest.raises(RuntimeError, match="Kernel compilation failed"):
        binaries.kept(fails, "source")
    assert not folder.exists()


def test_the_folder_is_inductors_and_none_where_the_user_wants_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert torch_internals.compile_cache_folder() == str(tmp_path)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert torch_internals.compile_cache_folder() is None


def test_kernels_are_loaded_from_what_an_earlier_process_compiled(folder, monkeypatch):
    compiled, loaded = [], []

    class Kernel:
        func = "function"

    def compile_text(text, name, nvcc_options):
        compiled.append((name, *nvcc_options))
        return f"binary of {nvcc_options}".encode(), name

    def load(binary, names):
        loaded.append(binary)
        return dict.fromkeys(names, Kernel)

    monkeypatch.setattr(torch_internals, "nvrtc", lambda: (compile_text, load))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(nvrtc, "_driver", lambda: None)

    def compile_anew(*form):
        """As a process that remembers nothing does."""
        nvrtc._binaries.clear()
        return nvrtc.compiled.__wrapped__(*form)

    monkeypatch.setattr(nvrtc, "_binaries", {})
    for macros in ((("A", 1),), (("A", 1),), (("A", 2),)):
        assert compile_anew(0, "append_cuda", ("append",), macros) == {"append": "function"}
    assert len(compiled) == 2 and loaded[0] == loaded[1] != loaded[2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    compile_anew(0, "append_cuda", ("append",), (("A", 1),))
    assert len(compiled) == 3, "another kind of GPU has binaries of its own"
