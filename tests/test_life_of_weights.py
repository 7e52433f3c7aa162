"""Weights that live: whatever happens to them between two calls, a compiled model answers as the uncompiled one does,
with values that are rotated online and with folded copies; and a cache belongs to the contents of the weights that made
it."""

import copy
import itertools
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, prune, vector_to_parameters

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.digest import DIGESTS, Digests
from akvq_fx.transformers_names import cache_of
from tests.attention_models import Biased, Decoder, roll, token_ids
from tests.zoo import T, finish

OPTIONS = {"body_bits": 16, "rotate": True, "inner": "eager"}  # nothing is quantized, and rotation matters
ROTATIONS = ("online", "fold")


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo():
    """In place of conftest's: compiled models are shared by the tests of this module."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, rotation: str):
    torch._dynamo.reset()
    model.compile(backend="akvq", options={**OPTIONS, "value_rotation": rotation})
    return model


class Pair:
    """A compiled model and an uncompiled twin, to which the same changes are applied."""

    def __init__(self, rotation: str, layers: int = 2):
        self.rotation = rotation
        self.plain = Decoder(Biased, layers=layers).double()
        self.model = compiled(copy.deepcopy(self.plain), rotation)

    def apply(self, change) -> None:
        with torch.no_grad():
            change(self.model)
            change(self.plain)

    def agree(self) -> None:
        """The same logits of a prompt, of steps and of a chunk, on a packed cache, by weights that are the same to the
        bit."""
        want, _ = roll(self.plain, steps=2)
        got, cache = roll(self.model, steps=2)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
        assert all(isinstance(x, PackedKV) for layer in cache for x in layer)
        one, other = self.model.state_dict(), self.plain.state_dict()
        assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)

    def live(self, *changes) -> None:
        """The two agree before the changes and after each of them, and the first one changes the answer."""
        self.agree()
        before = roll(self.plain, steps=0)[0][0]
        for number, change in enumerate(changes):
            self.apply(change)
            if number == 0:
                assert (roll(self.plain, steps=0)[0][0] - before).abs().max() > 1e-4, "a change that nothing shows"
            self.agree()


@pytest.fixture(scope="module", params=ROTATIONS)
def pair(request):
    """Shared by the tests that only change numbers, which compiles nothing anew."""
    shared = Pair(request.param)
    shared.agree()
    folds = {row.values for row in akvq_fx.report(shared.model).packed}
    assert folds == {"folded" if request.param == "fold" else "online"}
    return shared


@pytest.fixture(autouse=True)
def as_at_first(request):
    """The shared pair begins each test with the same numbers."""
    if "pair" in request.fixturenames:
        pair = request.getfixturevalue("pair")
        pair.apply(lambda model: model.load_state_dict(Decoder(Biased, layers=2).double().state_dict()))


@pytest.fixture(params=ROTATIONS)
def fresh(request):
    """For tests that change code: each compiles anew, so of one layer."""
    return Pair(request.param, layers=1)


def parts(model):
    return [layer.attention for layer in model.layers]


def noise(like, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def each(name, field, do):
    """A change of one tensor of every layer."""

    def change(model):
        for i, part in enumerate(parts(model)):
            linear = getattr(part, name)
            do(linear, field, noise(getattr(linear, field), i))

    return change


def add_through_data(sign):
    def do(linear, field, delta):
        getattr(linear, field).data += sign * delta

    return do


def add_in_place(sign):
    return lambda linear, field, delta: getattr(linear, field).add_(sign * delta)


def replace(linear, field, delta):
    setattr(linear, field, nn.Parameter(getattr(linear, field) + delta))


def replace_data(linear, field, delta):
    getattr(linear, field).data = getattr(linear, field) + delta


def reload(linear, field, delta):
    linear.load_state_dict({field: getattr(linear, field) + delta}, strict=False)


def reload_assigned(linear, field, delta):
    linear.load_state_dict({field: getattr(linear, field) + delta}, strict=False, assign=True)


def zero_heads(model):
    for part in parts(model):
        part.v_proj.weight[: part.dim] = 0
        part.v_proj.bias[: part.dim] = 0
        part.o_proj.weight[:, -part.dim :] = 0


def exchange_layers(model):
    one, other = parts(model)
    one.v_proj, other.v_proj = other.v_proj, one.v_proj
    one.o_proj.weight, other.o_proj.weight = other.o_proj.weight, one.o_proj.weight


def load_all(model):
    model.load_state_dict(Decoder(Biased, layers=2, seed=5).double().state_dict())


def load_all_assigned(model):
    model.load_state_dict(Decoder(Biased, layers=2, seed=6).double().state_dict(), assign=True)


def one_vector(model):
    """Every parameter becomes a view of one vector."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    vector_to_parameters(flat + noise(flat), model.parameters())


def trained(model):
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        logits, _ = model.forward(token_ids(2, 6))
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MERGES = {"data": add_through_data, "add_": add_in_place}
NUMBERS = {
    **{
        f"{how}, {name}": [each(name, "weight", add(+1)), each(name, "weight", add(-1))]
        for how, add in MERGES.items()
        for name in ("v_proj", "o_proj", "k_proj")
    },
    **{
        f"{do.__name__}, {name}.{field}": [each(name, field, do)]
        for do in (replace, replace_data, reload, reload_assigned)
        for name, field in (("v_proj", "weight"), ("v_proj", "bias"), ("o_proj", "weight"))
    },
    "zeroed heads": [zero_heads],
    "layers exchanged": [exchange_layers],
    "load_state_dict": [load_all],
    "load_state_dict, assigned": [load_all_assigned],
    "one vector": [one_vector],
    "a step of training": [trained],
}


@pytest.mark.parametrize("changes", NUMBERS.values(), ids=NUMBERS)
def test_changed_numbers(pair, changes):
    pair.agree()
    counters.clear()
    pair.live(*changes)
    assert not counters["stats"]["unique_graphs"], "compiled anew"


def test_a_change_while_a_cache_lives(pair):
    """Of what makes no keys or values: the cache goes on, by the new weights. Of what makes them: it is refused."""
    ids = token_ids(2, 9)
    with torch.no_grad():
        caches = [
            each.forward(ids[:, :6])[1] if each is pair.plain else each(ids[:, :6])[1]
            for each in (pair.model, pair.plain)
        ]
        for at, change in (
            (6, lambda model: parts(model)[0].o_proj.weight.mul_(1.5)),
            (7, lambda model: replace(parts(model)[1].o_proj, "weight", noise(parts(model)[1].o_proj.weight))),
            (8, lambda model: model.layers[1].down.weight.data.mul_(0.5)),
        ):
            pair.apply(change)
            got, caches[0] = pair.model(ids[:, at : at + 1], caches[0])
            want, caches[1] = pair.plain(ids[:, at : at + 1], caches[1])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, field", [("k_proj", "weight"), ("v_proj", "weight"), ("v_proj", "bias")])
def test_a_live_cache_is_refused_by_changed_weights(pair, name, field):
    ids = token_ids(2, 9)
    with torch.no_grad():
        cache = pair.model(ids[:, :6])[1]
        cache = pair.model(ids[:, 6:7], cache)[1]
        pair.apply(lambda model: getattr(getattr(parts(model)[1], name), field).mul_(1.5))
        for some in (ids[:, 7:8], ids[:, 7:9]):
            with pytest.raises(ValueError, match="made by other weights.*start with an empty cache, or.*dequantize"):
                pair.model(some, cache)
        plain = tuple(tuple(x.dequantize() for x in layer) for layer in cache)
        want, _ = pair.plain(ids[:, 7:8], plain)
        got, _ = pair.model(ids[:, 7:8], plain)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    pair.agree()


def test_unfold_twice(pair):
    folds = 2 if pair.rotation == "fold" else 0
    pair.agree()
    before = copy.deepcopy(pair.model.state_dict())
    assert [akvq_fx.unfold(pair.model) for _ in range(3)] == [folds, 0, 0]
    assert all(torch.equal(x, before[key]) for key, x in pair.model.state_dict().items())
    pair.agree()
    assert akvq_fx.unfold(pair.model) == folds


def test_copies_are_as_the_original(pair, tmp_path):
    """deepcopy, pickle and a state dict hold what the model held, uncompiled and compiled anew."""
    pair.agree()
    torch.save(pair.model.state_dict(), tmp_path / "weights.pt")
    loaded = Decoder(Biased, layers=2, seed=9).double()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    want = roll(pair.plain)[0]
    for model in (copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model)), loaded):
        assert model._compiled_call_impl is None
        for a, b in zip(want, roll(model)[0], strict=True):
            assert torch.equal(a, b)
        model.compile(backend="akvq", options={**OPTIONS, "value_rotation": pair.rotation})
        for a, b in zip(want, roll(model)[0], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


class Lora(nn.Module):
    """A linear with a low-rank term that can be switched on, or merged as adapters' libraries do it: through
    `.data`."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.enabled = base, False
        self.down = nn.Parameter(noise(base.weight[:2], 1))
        self.up = nn.Parameter(noise(base.weight[:, :2], 2))

    def forward(self, x):
        y = self.base(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.down), self.up) if self.enabled else y


def add_adapter(name, enabled):
    def change(model):
        for part in parts(model):
            lora = Lora(getattr(part, name))
            lora.enabled = enabled
            setattr(part, name, lora)

    return change


def switch(name, enabled):
    def change(model):
        for part in parts(model):
            getattr(part, name).enabled = enabled

    return change


def merge(name, sign):
    def change(model):
        for part in parts(model):
            lora = getattr(part, name)
            lora.base.weight.data += sign * (lora.up @ lora.down)

    return change


@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
def test_adapter(fresh, name):
    """Added after a run without, switched off, merged, unmerged, switched on again."""
    fresh.live(
        add_adapter(name, True),
        switch(name, False),
        merge(name, +1),
        merge(name, -1),
        switch(name, True),
    )


def test_pruned_heads(fresh):
    """A mask of torch.nn.utils.prune, then made permanent."""

    def masked(model):
        for part in parts(model):
            mask = torch.ones_like(part.v_proj.weight)
            mask[: part.dim] = 0
            prune.custom_from_mask(part.v_proj, "weight", mask)

    def permanent(model):
        for part in parts(model):
            prune.remove(part.v_proj, "weight")

    fresh.live(masked, permanent)


def test_parametrized(fresh):
    """A weight that is computed in the graph from then on."""

    def change(model):
        for part in parts(model):
            parametrizations.weight_norm(part.o_proj)
            part.o_proj.parametrizations.weight.original0.mul_(1.5)

    fresh.live(change)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="dynamo of torch 2.11 keeps a graph when model.to() changes the weights' dtype"
)
def test_dtypes_there_and_back(fresh):
    """float64 to float16 and back: other graphs, then the first ones with their weights in other memory."""
    ids = token_ids(2, 7)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float16, 1e-2), (torch.float64, 1e-10)):
        fresh.apply(lambda model, dtype=dtype: model.to(dtype))
        with torch.no_grad():
            want, cache = fresh.plain(ids[:, :6])
            got, packed = fresh.model(ids[:, :6])
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            assert isinstance(packed[0][0], PackedKV) and packed[0][0].dtype == dtype
            want, got = fresh.plain(ids[:, 6:], cache)[0], fresh.model(ids[:, 6:], packed)[0]
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_hooks(fresh):
    """With any backend, dynamo finds hooks that are added later only if configured to; then it compiles again."""

    def after(model):
        for part in parts(model):
            part.o_proj.register_forward_hook(lambda module, args, y: y * 1.5)

    def before(model):
        for part in parts(model):
            part.o_proj.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))

    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        fresh.live(before, after)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_no_gradient_of_one_projection_is_lost_in_silence(rotation):
    model = compiled(Decoder(Biased, layers=1).requires_grad_(False), rotation)
    model.layers[0].attention.v_proj.weight.requires_grad_(True)
    logits, _ = model(token_ids(2, 6))
    with pytest.raises(RuntimeError, match="no gradient goes through a packed cache"):
        logits.sum().backward()


def test_inference_mode_there_and_back(fresh):
    """What inference mode made goes on outside it, where torch forbids to write to its tensors."""
    ids = token_ids(2, 9)
    for outer, inner in itertools.product((torch.inference_mode, torch.no_grad), repeat=2):
        with outer():
            want, cache = fresh.plain(ids[:, :6])
            got, packed = fresh.model(ids[:, :6])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            fresh.model(ids[:, 6:7], copy.deepcopy(packed))
        with inner():
            for at in (6, 7):
                want, cache = fresh.plain(ids[:, at : at + 1], cache)
                got, packed = fresh.model(ids[:, at : at + 1], packed)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
                assert isinstance(packed[0][0], PackedKV)


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return finish(transformers.LlamaForCausalLM(transformers.LlamaConfig(**T(num_hidden_layers=1))))


def test_saved_and_loaded_and_merged_around_generate(tmp_path):
    """save_pretrained and from_pretrained, deepcopy, and a merge before one generate that is undone after it."""
    model, plain = llama(), llama()
    before = copy.deepcopy(model.state_dict())
    compiled(model, "fold")
    ids = token_ids(2, 7) + 10
    generate = lambda one: one.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)

    def agree():
        out = generate(model)
        assert torch.equal(out.sequences, generate(plain).sequences)
        assert all(isinstance(layer.values, PackedKV) for layer in cache_of(out).layers)
        return out.sequences

    first = agree()
    for sign in (+1, -1):
        for one in (model, plain):
            for i, layer in enumerate(one.model.layers):
                for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj):
                    linear.weight.data += sign * noise(linear.weight, i)
        assert torch.equal(agree(), first) == (sign < 0)
    for one in (model, plain):
        one.load_state_dict(before)
    assert torch.equal(agree(), first)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        state = other.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
        assert torch.equal(generate(other).sequences, first)


# digests

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)
contents = st.tuples(st.sampled_from(DTYPES), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))


def made(dtype, rows, columns, seed):
    return (noise(torch.empty(rows, columns, dtype=torch.float64), seed) * 100).to(dtype)


def digest(x):
    (text,) = Digests().of([x])
    return text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(contents, st.data())
def test_any_change_changes_the_digest(drawn, data):
    x = made(*drawn)
    text = digest(x)
    assert digest(x.clone()) == text == digest(x.t().contiguous().t()) == digest(torch.nn.Parameter(x, False))
    assert digest(torch.cat([x[:1], x])[1:]) == text
    at = data.draw(st.integers(0, x.numel() - 1))
    changed = x.clone().flatten()
    bit = data.draw(st.integers(0, x.element_size() * 8 - 1))
    raw = changed.view(torch.uint8)
    raw[at * x.element_size() + bit // 8] ^= 1 << bit % 8
    others = [changed.view(x.shape), torch.cat([x, x[:1] * 0]), x[:, None], x.flatten()]
    if x.is_floating_point():
        others += [x.to(torch.float32 if x.dtype == torch.float64 else torch.float64), -x, x.view(torch.int16)]
    order = data.draw(st.permutations(range(len(x))))
    others += [x[order]] if not torch.equal(x[order], x) else []
    half = x.clone()
    half[: len(x) // 2] *= -1
    others += [half] if (half != x).any() else []
    for i, other in enumerate(others):
        assert digest(other) != text, i


def test_large_weights_are_read_whole():
    """Longer than one chunk of the digest: every part counts, and so does its place."""
    x = torch.zeros(3 << 17, dtype=torch.float64)
    texts = {digest(x)}
    for at in (0, (1 << 17) - 1, 1 << 17, (2 << 17) + 5, (3 << 17) - 1):
        y = x.clone()
        y[at] = 1.0
        texts.add(digest(y))
    assert len(texts) == 6


def test_a_change_is_seen_or_looked_for():
    """In place by its mark, through `.data` where the caller asks for the contents anew."""
    weight, digests = nn.Parameter(torch.ones(4, 4)), Digests()
    (first,) = digests.of([weight])
    weight.data[0] += 1
    assert digests.of([weight]) == [first] and digests.of([weight], anew=True) != [first]
    weight.data[0] -= 1
    assert digests.of([weight], anew=True) == [first]
    with torch.no_grad():
        weight[1] *= 2
    assert digests.of([weight]) != [first]


CONTINUE = """
import json, sys
import torch
from akvq_fx import PackedKV
from tests.test_life_of_weights import DIGESTS, OPTIONS, Biased, Decoder, digest_samples, token_ids

said, ids = {"digests": digest_samples()}, token_ids(2, 9)

def step(rotation, change):
    caches = PackedKV.load(f"{sys.argv[1]}/{rotation}")
    cache = tuple((caches[f"{i}.keys"], caches[f"{i}.values"]) for i in range(2))
    model = Decoder(Biased, layers=2).double()
    model.compile(backend="akvq", options={**OPTIONS, "value_rotation": rotation})
    with torch.no_grad():
        model(ids[:, :6])
        change(model.layers[1].attention)
        try:
            return model(ids[:, 6:7], cache)[0].tolist()
        except ValueError as error:
            return str(error)

def through_data(part):
    part.v_proj.weight.data[3] *= -1

for rotation in ("online", "fold"):
    said[rotation] = {
        "same": step(rotation, lambda part: None),
        "in place": step(rotation, lambda part: part.k_proj.weight[0, 0].add_(1e-9)),
        "through data": step(rotation, through_data),
    }
print(json.dumps(said))
"""


def digest_samples():
    return DIGESTS.of([made(dtype, 5, 7, 3) for dtype in DTYPES])


def test_another_process(tmp_path):
    """Equal weights have equal digests there: a file's cache goes on, and by changed weights it does not."""
    model = Decoder(Biased, layers=2).double()
    ids = token_ids(2, 9)
    want = model(ids[:, 6:7], model(ids[:, :6])[1])[0]
    for rotation in ROTATIONS:
        with torch.no_grad():
            cache = compiled(model, rotation)(ids[:, :6])[1]
        tensors = {
            f"{i}.{name}": x for i, layer in enumerate(cache) for name, x in zip(("keys", "values"), layer, strict=True)
        }
        PackedKV.save(tensors, tmp_path / rotation)
    done = subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["digests"] == digest_samples()
    for rotation in ROTATIONS:
        got = said[rotation]
        torch.testing.assert_close(torch.tensor(got["same"], dtype=torch.float64), want, rtol=0, atol=1e-10)
        assert "made by other weights" in got["in place"] and "made by other weights" in got["through data"]


def test_two_threads_two_models():
    """Two models of one class share code; each answers with its own tokens every time, on its own cache."""
    torch._dynamo.reset()
    models, ids = [llama(), llama()], token_ids(1, 7) + 10
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(noise(parameter, scale=0.05))
    generate = lambda model: model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = [generate(model) for model in models]
    assert not torch.equal(*expected)
    found: list = [[], []]

    def work(i):
        for _ in range(10):
            try:
                found[i].append(generate(models[i]))
            except Exception as error:  # noqa: BLE001 - what a thread raises is lost otherwise
                found[i].append(error)

    for rotation in ROTATIONS:
        for model in models:
            model._compiled_call_impl = None
            model.compile(backend="akvq", options={**OPTIONS, "value_rotation": rotation})
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for some, want in zip(found, expected, strict=True):
        assert len(some) == 2 * 10
        assert [x for x in some if not isinstance(x, torch.Tensor) or not torch.equal(x, want)] == []
