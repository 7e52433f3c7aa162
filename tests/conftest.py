"""Fixtures of all tests: dynamo starts clean, golden texts are compared or, with --update-golden, written."""

import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: kernels then run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from akvq_fx import vision_carry

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt instead of comparing")


def pytest_collection_finish():
    """Exclude what is imported by now from garbage collection, which took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No compiled code and no vision mask of an earlier test."""
    torch._dynamo.reset()
    vision_carry.put(None)
    yield
    vision_carry.put(None)


@pytest.fixture(scope="module")
def one_layer():
    """Decoders of tests/zoo.py have one layer in this module, as tracing is what takes time."""
    from tests import zoo  # not at the top: it imports transformers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "LAYERS", 1)
        yield


@pytest.fixture
def golden(request):
    """golden(name, text): the text equals tests/golden/name.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.rstrip() + "\n")
        assert path.is_file(), f"no golden text {name}; write it with pytest --update-golden and read it"
        same = path.read_text() == text.rstrip() + "\n"
        assert same, f"{name} changed; read the difference, then pytest --update-golden"

    return check
