"""A line on a terminal while a graph is compiled, and nothing where nobody looks."""

import io

import pytest
import torch

from akvq_fx import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, written", [(Terminal(), True), (io.StringIO(), False), (None, False)])
def test_only_on_a_terminal(monkeypatch, stream, written):
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(ValueError), progress.shown("akvq: working"):
        raise ValueError
    if stream is not None:
        assert stream.getvalue() == (f"{progress.CLEAR}akvq: working{progress.CLEAR}" if written else "")


@pytest.mark.parametrize(
    "inner, line", [("aot_eager", "akvq: aot_eager compiles a graph without a cache"), ("eager", "")]
)
def test_compiling_is_shown(monkeypatch, inner, line):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    torch.compile(torch.nn.Linear(2, 2), backend="akvq", options={"inner": inner})(torch.ones(1, 2))
    assert terminal.getvalue() == (f"{progress.CLEAR}{line}{progress.CLEAR}" if line else "")
