"""Store and table: what is measured once stays measured, a stopped cell continues, errors are standard errors."""

import json
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.evaluate import Store, fill, markdown
from akvq_fx.evaluate.table import Column, cell_of, mean


class Counting:
    """A suite that notes what it was asked to measure and stops, as Ctrl-C does, after so many samples."""

    model, tasks, headline = "m", ("one", "two"), "accuracy"
    columns = (Column("accuracy", "accuracy"), Column("bits", "bits", 2, error=False))

    def __init__(self, samples=3, stop=None, version=1):
        self.samples, self.stop, self.version = samples, stop, version
        self.asked, self.opened = [], []

    def what(self, task):
        return {"task": task, "version": self.version}

    def count(self, task):
        return self.samples

    @contextmanager
    def under(self, options):
        self.opened.append(options)

        def measure(task, index):
            if self.stop is not None and len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append((task, index))
            return {"accuracy": float(index == 0), "bits": 16.0 if options is None else 4.0, "answer": "text"}

        yield measure


SETTINGS = {"none": None, "akvq": {"recipe": "akvq"}}
ALL = [(task, index) for _ in SETTINGS for task in ("one", "two") for index in range(3)]


def test_a_stopped_run_goes_on_at_its_sample(tmp_path):
    path = tmp_path / "deep" / "r.json"
    first = Counting(stop=4)
    with pytest.raises(KeyboardInterrupt):
        fill(first, SETTINGS, Store(path))
    second = Counting()
    table = fill(second, SETTINGS, Store(path))
    assert first.asked + second.asked == ALL and first.asked == ALL[:4]
    third = Counting()
    assert fill(third, SETTINGS, Store(path)) == table
    assert third.asked == [] and third.opened == [], "nothing is compiled where nothing is missing"
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_more_samples_add_and_fewer_read_the_first(tmp_path):
    path = tmp_path / "r.json"
    fill(Counting(samples=2), {"none": None}, Store(path))
    more = Counting(samples=4)
    fill(more, {"none": None}, Store(path))
    assert more.asked == [("one", 2), ("one", 3), ("two", 2), ("two", 3)]
    row, _ = fill(Counting(samples=1), {"none": None}, Store(path))
    assert row["samples"] == 1 and row["measures"]["accuracy"] == [1, None]


def test_what_a_number_depends_on_is_its_key(tmp_path):
    path = tmp_path / "r.json"
    fill(Counting(), SETTINGS, Store(path))
    for changed, settings in ((Counting(version=2), SETTINGS), (Counting(), {"akvq": {"recipe": "akvq", "window": 4}})):
        fill(changed, settings, Store(path))
        assert len(changed.asked) == 6 * len(settings)
    same = Counting()
    fill(same, {"akvq": {"recipe": "akvq", "window": 64}}, Store(path))
    assert same.asked == [], "a default that is written out is the same setting"
    renamed = Counting()
    fill(renamed, {"another name": {"recipe": "akvq"}}, Store(path))
    assert renamed.asked == [], "a name is no part of what was measured"


def test_refuses_other_files(tmp_path):
    for content, message in (
        ("{", "is no JSON"),
        ("[]", "holds no results"),
        ('{"a": {"nll": 1}}', "holds no results"),
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Store(tmp_path / "r.json")
        assert (tmp_path / "r.json").read_text() == content


def test_markdown():
    suite = Counting()
    table = fill(suite, SETTINGS, Store())
    json.dumps(table)
    assert markdown(table, suite.columns, suite.headline).splitlines() == [
        "| model | setting | one | two | mean accuracy |",
        "|---|---|---|---|---|",
        "| m | none | 0.333 ± 0.333 | 0.333 ± 0.333 | 0.333 ± 0.236 |",
        "| m | akvq | 0.333 ± 0.333 | 0.333 ± 0.333 | 0.333 ± 0.236 |",
        "",
        "| model | task | setting | samples | accuracy | bits |",
        "|---|---|---|---|---|---|",
        "| m | one | none | 3 | 0.333 ± 0.333 | 16.00 |",
        "| m | one | akvq | 3 | 0.333 ± 0.333 | 4.00 |",
        "| m | two | none | 3 | 0.333 ± 0.333 | 16.00 |",
        "| m | two | akvq | 3 | 0.333 ± 0.333 | 4.00 |",
    ]
    single = [row for row in table if row["task"] == "one"]
    assert "mean" not in markdown(single, suite.columns, suite.headline)


def test_means_and_errors():
    assert mean([], "x") == (None, None) and mean([{"x": None}, {}], "x") == (None, None)
    assert mean([{"x": 2.0}, {"y": 1.0}], "x") == (2, None)
    assert mean([{"x": 1.0}, {"x": 3.0}], "x") == (2, 1)


@given(st.integers(2, 50), st.integers(0, 50))
def test_error_of_a_share(n, right):
    right = min(right, n)
    p = right / n
    value, error = mean([{"x": float(i < right)} for i in range(n)], "x")
    assert value == pytest.approx(p) and error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)


def test_progress_starts_where_the_store_is():
    calls = []

    class Bar:
        def __init__(self, **about):
            calls.append((about["desc"], about["initial"], about["total"]))

        def update(self):
            calls.append("update")

        def close(self):
            calls.append("close")

    suite, store = Counting(samples=2), Store()
    store.add(cell_of(suite, "one", None), {"accuracy": 1.0, "bits": 16.0})
    fill(suite, {"none": None}, store, Bar)
    assert calls == [("m one none", 1, 2), "update", "close", ("m two none", 0, 2), "update", "update", "close"]
