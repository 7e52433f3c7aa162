"""The batch and the length of a prompt are symbols from the first graph on, and nothing else is."""

from collections import UserDict

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import BatchEncoding

from akvq_fx import mark_sizes

EAGER = {"inner": "eager"}


def marked(x) -> set[int]:
    return getattr(x, "_dynamo_weak_dynamic_indices", set())


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def test_tokens_and_what_goes_with_them():
    ids, mask, embeddings = integers(3, 7), torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, 7, 7)
    sections, images, sizes = integers(4, 3, 7), torch.zeros(3, 3, 7, 7), integers(5, 2)
    kwargs = {"attention_mask": mask, "inputs_embeds": embeddings, "position_ids": sections, "pixel_values": images}
    mark_sizes.mark({"ids": ids, "kwargs": kwargs, "more": [sizes, "text", None]})
    assert marked(ids) == marked(mask) == marked(embeddings) == {0, 1}
    assert marked(sections) == {1, 2}
    assert marked(images) == {0}, "the batch, not three channels"
    assert not marked(sizes)


def test_a_decode_step_has_rows_and_no_length():
    ids, mask, positions = integers(4, 1), integers(4, 9), integers(4, 1)
    mark_sizes.mark({"ids": ids, "mask": mask, "positions": positions})
    assert marked(ids) == marked(mask) == marked(positions) == {0}


def test_one_row_and_a_tensor_alone_stay_numbers():
    ids, mask, alone = integers(1, 6), integers(1, 6), integers(4, 3)
    mark_sizes.mark({"ids": ids, "mask": mask})
    mark_sizes.mark({"alone": alone})
    assert marked(ids) == marked(mask) == {1} and not marked(alone)


@pytest.mark.parametrize("dynamic, graphs", [(None, 1), (True, 1), (False, 2)])
def test_who_asks_for_numbers_gets_them(dynamic, graphs):
    counters.clear()
    compiled = torch.compile(lambda ids, mask: ids * mask, backend="akvq", dynamic=dynamic, options=EAGER)
    for batch in (2, 3):
        assert compiled(integers(batch, 5), integers(batch, 5)).shape == (batch, 5)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_number_where_a_model_needs_one():
    """A table for each number of rows: another graph for another number, without a word and without an error."""
    counters.clear()
    tables = torch.nn.ParameterList([torch.ones(rows, 1) for rows in range(5)])
    compiled = torch.compile(lambda ids, mask: ids * mask * tables[len(ids)], backend="akvq", options=EAGER)
    for batch in (2, 3, 2):
        compiled(integers(batch, 5), integers(batch, 5))
    assert counters["stats"]["unique_graphs"] == 2


def test_sizes_that_the_user_made_numbers_stay_numbers():
    ids, mask = integers(3, 7), integers(3, 7)
    torch._dynamo.mark_static(ids, 0)
    mark_sizes.mark({"ids": ids, "mask": mask})
    assert marked(ids) == {1} and marked(mask) == {0, 1}
    counters.clear()
    compiled = torch.compile(lambda ids, mask: ids * mask, backend="akvq", options=EAGER)
    for batch in (2, 3):
        ids, mask = integers(batch, 5), integers(batch, 5)
        torch._dynamo.mark_static(ids, 0)
        torch._dynamo.mark_static(mask, 0)
        compiled(ids, mask)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict])
def test_a_batch_of_inputs_as_one_argument(kind):
    first, second = ({"ids": integers(3, 7), "mask": integers(3, 7)} for _ in range(2))
    mark_sizes.mark({"batch": kind(first), "kwargs": {"batch": kind(second)}})
    for given in (first, second):
        assert marked(given["ids"]) == marked(given["mask"]) == {0, 1}


def test_other_backends_see_no_marks():
    ids, mask = integers(2, 5), integers(2, 5)
    torch.compile(lambda ids, mask: ids * mask, backend="eager")(ids, mask)
    assert not marked(ids)
