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
    "inner, lines", [("aot_eager", ["akvq: aot_eager compiles a graph without a cache"]), ("eager", [])]
)
def test_compiling_is_shown(monkeypatch, inner, lines):
    """First that dynamo traces, which takes longest; every line is gone at the end."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    options = {"inner": inner, "compile_uncached": True}
    torch.compile(torch.nn.Linear(2, 2), backend="akvq", options=options)(torch.ones(1, 2))
    written = terminal.getvalue().split(progress.CLEAR)
    assert [text for text in written if text] == ["akvq: PyTorch traces Linear", *lines]
    assert written[-1] == ""


def test_a_graph_that_cannot_be_made_leaves_no_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(Exception, match="unknown option"):
        torch.compile(torch.nn.Linear(2, 2), backend="akvq", options={"bodybits": 2})(torch.ones(1, 2))
    assert "traces" in terminal.getvalue() and terminal.getvalue().endswith(progress.CLEAR)
    monkeypatch.setattr("sys.stderr", quiet := Terminal())
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    assert quiet.getvalue() == "", "other backends are left alone"
