"""Whatever is done to a cache and to the weights, in any order: lossless as an uncompiled twin does it to its plain
cache, and at two bits as a twin that was compiled anew.

One compiled model for each kind of test takes all examples, so that what an example leaves behind is met by the next
one. AKVQ_SEQUENCES=50 runs that many examples of each test instead of a few.
"""

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from akvq_fx import PackedKV
from akvq_fx.backend import akvq
from tests.attention_models import Biased, Decoder, token_ids
from tests.test_life_of_weights import add_adapter, noise, parts

LOSSLESS = {"body_bits": 16, "rotate": True, "inner": "eager"}
TWO_BITS = {"window": 4, "pivots": 2, "inner": "eager"}
EXAMPLES = int(os.environ.get("AKVQ_SEQUENCES", 0))


def few(count: int):
    """An example may compile: a failing one is shown as found, shrinking it would take minutes."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    quiet = list(HealthCheck)
    return settings(
        max_examples=EXAMPLES or count, derandomize=True, deadline=None, phases=phases, suppress_health_check=quiet
    )


small = st.integers(1, 3)
OPERATIONS = {
    "prompt": st.tuples(small, st.integers(3, 9)),
    "decode": st.tuples(small),
    "crop": st.tuples(small),
    "reorder": st.tuples(st.integers(0, 5)),
    "evict": st.tuples(st.integers(1, 2), st.integers(2, 5)),
    "expand": st.tuples(st.integers(2, 3)),
    "join": st.tuples(st.integers(0, 9)),
    "file": st.tuples(),
    "adapter": st.tuples(st.booleans()),
    "merge": st.tuples(st.sampled_from(["v_proj", "o_proj"]), st.sampled_from([-1.0, 1.0])),
    "reload": st.tuples(st.sampled_from(["k_proj", "v_proj", "o_proj"]), st.integers(0, 9)),
}
operation = st.one_of(*(st.tuples(st.just(name), given) for name, given in OPERATIONS.items()))
sequences = st.lists(operation, min_size=4, max_size=8)


def model_at_first(layers=2, dtype=torch.float64):
    model = Decoder(Biased, layers=layers).to(dtype)
    for name in ("v_proj", "o_proj"):
        add_adapter(name, False)(model)
    return model


class Session:
    """A model and the cache that it goes on with. `run` is what answers: the model itself, or what it was compiled
    into."""

    def __init__(self, model, run=None, through_data=True):
        """through_data: weights are merged as adapters' libraries do it."""
        self.through_data = through_data
        self.model, self.cache, self.plain = model, None, run is None
        self.run = model if self.plain else run

    def restart(self, weights) -> None:
        self.model.load_state_dict(weights)
        self.cache = None
        self.adapter(False)

    def logits(self, ids):
        out, self.cache = self.run(ids, self.cache)
        if not self.plain:
            assert all(isinstance(x, PackedKV) for layer in self.cache for x in layer)
        return out

    def change(self, do) -> None:
        self.cache = tuple(tuple(do(x) for x in layer) for layer in self.cache)

    @property
    def shape(self):
        return None if self.cache is None else self.cache[0][0].shape

    def reorder(self, seed):
        order = torch.randperm(self.shape[0], generator=torch.Generator().manual_seed(seed))
        self.change(lambda x: x.index_select(0, order))

    def crop(self, count):
        if self.shape[2] > count:
            self.change(lambda x: x[:, :, :-count])

    def evict(self, sinks, recent):
        if self.shape[2] > sinks + recent:
            self.change(lambda x: torch.cat([x[:, :, :sinks], x[:, :, -recent:]], 2))

    def expand(self, rows):
        if self.shape[0] == 1:
            self.change(lambda x: x.expand(rows, -1, -1, -1))

    def join(self, seed):
        """Rows of another prompt, of as many tokens."""
        if self.shape[0] > 6:
            return
        mine, self.cache = self.cache, None
        self.logits(token_ids(2, mine[0][0].shape[2], seed))
        joined = zip(mine, self.cache, strict=True)
        self.cache = tuple(tuple(torch.cat(pair) for pair in zip(*layers, strict=True)) for layers in joined)

    def file(self, path):
        if not all(isinstance(x, PackedKV) for layer in self.cache for x in layer):
            return  # the twin's, or rows that two states of the weights made, which codes cannot join
        PackedKV.save({f"{i} {j}": x for i, layer in enumerate(self.cache) for j, x in enumerate(layer)}, path)
        loaded = PackedKV.load(path)
        self.cache = tuple(tuple(loaded[f"{i} {j}"] for j in range(2)) for i in range(len(self.cache)))

    def adapter(self, enabled):
        for part in parts(self.model):
            part.v_proj.enabled = part.o_proj.enabled = enabled

    def merge(self, name, sign):
        for part in parts(self.model):
            lora = getattr(part, name)
            weight, delta = lora.base.weight, sign * (lora.up @ lora.down)
            if self.through_data:
                weight.data += delta
            else:
                weight.add_(delta)

    def reload(self, name, seed):
        for i, part in enumerate(parts(self.model)):
            linear = getattr(getattr(part, name), "base", getattr(part, name))
            linear.load_state_dict({"weight": noise(linear.weight, seed + i, scale=0.2)}, strict=False)


def answers(session, ids):
    """Logits, or None where the cache was refused since its weights changed."""
    try:
        return session.logits(ids)
    except ValueError as error:
        assert "made by other weights" in str(error)
        return None


@torch.no_grad()
def play(session, twin, operations, path, tolerance: float, same_refusals: bool) -> None:
    """Do the same to both and compare all their logits. A refused cache is given up by both."""

    def ask(ids):
        got, want = answers(session, ids), answers(twin, ids)
        if same_refusals:
            assert (got is None) == (want is None)
        if got is None:
            session.cache = twin.cache = None
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance)

    for number, (name, numbers) in enumerate([("prompt", (2, 5)), *operations, ("decode", (2,))]):
        if name == "prompt":
            session.cache = twin.cache = None
            ask(token_ids(*numbers, seed=number))
        elif name == "decode":
            for step in range(numbers[0]):
                batch = 1 if session.cache is None else session.shape[0]
                ask(token_ids(batch, 1 if session.cache is not None else 4, seed=10 * number + step))
        elif session.cache is not None or name in ("adapter", "merge", "reload"):
            for one in (session, twin):
                getattr(one, name)(*numbers, *([path] if name == "file" else []))
            assert session.shape == twin.shape


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo():
    """In place of conftest's: compiled models are shared by all examples, whose number of graphs is no concern here."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=200, accumulated_recompile_limit=2000):
        yield
    torch._dynamo.reset()


def compiled(model, options):
    """By a backend of its own: nothing that dynamo made for another model of the class is taken."""
    run = torch.compile(model, backend=lambda gm, inputs: akvq(gm, inputs, options=options))
    # what goes through `.data` while a cache lives leaves no mark: folded copies are made anew with the next prompt
    # only
    return Session(model, run, through_data=options["value_rotation"] == "online")


@pytest.fixture(scope="module", params=["online", "fold"])
def lossless(request):
    return compiled(model_at_first(), {**LOSSLESS, "value_rotation": request.param})


@pytest.fixture(scope="module", params=["online", "fold"] if EXAMPLES else ["online"])
def two_bits(request):
    options = {**TWO_BITS, "value_rotation": request.param}
    return compiled(model_at_first(1, torch.float32), options), options


@pytest.mark.filterwarnings("ignore:akvq")
@few(10)
@given(operations=sequences)
def test_lossless_as_uncompiled(lossless, tmp_path_factory, operations):
    twin = Session(model_at_first(), through_data=lossless.through_data)
    lossless.restart(twin.model.state_dict())
    play(lossless, twin, operations, tmp_path_factory.mktemp("cache") / "file", 1e-10, same_refusals=False)


@pytest.mark.filterwarnings("ignore:akvq")
@few(2)
@given(operations=sequences)
def test_two_bits_as_compiled_anew(two_bits, tmp_path_factory, operations):
    session, options = two_bits
    twin = compiled(model_at_first(1, torch.float32), options)
    session.restart(copy.deepcopy(twin.model.state_dict()))
    play(session, twin, operations, tmp_path_factory.mktemp("cache") / "file", 1e-5, same_refusals=True)
