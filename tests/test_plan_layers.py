"""plan_layers: vision tokens are found wherever a model places its images; only then do first layers act as TSA."""

import pytest
import torch

import akvq_fx
from akvq_fx import AKVQConfig, runtime, vision_carry
from akvq_fx.kernels.layout import TEXT, VISION
from akvq_fx.passes.patterns.site import layer_of
from akvq_fx.passes.plan_layers import layout_of
from akvq_fx.records import bits_of
from akvq_fx.storage import text_slots
from tests import attention_models as models
from tests.attention_models import Decoder, VisionDecoder, captured, token_ids

PLACEMENTS = ("masked_scatter", "masked_scatter_", "setitem", "index_put", "mark_vision")
OPTIONS = {"window": 2, "pivots": 2}


def scene(count: int = 10, first: int = 2):
    """tokens, images and a mask [2, T] with four image tokens, which start one later in the second row."""
    at_image = torch.zeros(2, count, dtype=torch.bool)
    at_image[0, first : first + 4] = at_image[1, first + 1 : first + 5] = True
    images = torch.randn(8, models.WIDTH, generator=torch.Generator().manual_seed(5))
    return token_ids(2, count), images, at_image


def run_all(model, *prompts, **options):
    """Logits and caches of several prompts of one compiled model."""
    spy = models.Spy(**{**OPTIONS, **options})
    run = torch.compile(model, backend=spy)
    with torch.no_grad():
        return [run(tokens, None, *rest) for tokens, *rest in prompts], spy, run


def policies(capture) -> list[str]:
    return [site.policy for site in capture.state.sites]


def vision_of(cache, layer: int = 0):
    """[B, T] bool: tokens that the cache of a TSA layer holds as vision tokens."""
    classes = cache[layer][0].classes()
    assert ((classes == VISION) | (classes == TEXT)).all()
    return classes == VISION


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_vision_tokens_are_found(placement):
    model, (tokens, images, at_image) = VisionDecoder(placement), scene()
    with torch.no_grad():
        want, plain = model(tokens, None, images, at_image)
        step, _ = model(tokens[:, :1], plain)
    [(got, cache)], spy, run = run_all(model, (tokens, images, at_image))
    assert policies(spy.captures[-1]) == ["TSA", "TSA", "PSA"]
    assert torch.equal(vision_of(cache, 0), at_image) and torch.equal(vision_of(cache, 1), at_image)
    assert [pair[0].layout_of.text_bits for pair in cache] == [4, 4, 4]
    assert [pair[0].layout_of.pivots for pair in cache] == [0, 0, 2]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    with torch.no_grad():
        after, cache = run(tokens[:, :1], cache)
    assert (after - step).abs().max() < 1
    assert [c.state.sites[0].policy for c in spy.captures][-1] == "TSA"
    assert int(vision_of(cache).sum()) == 8 and cache[0][0].shape[2] == 11


def test_vision_tokens_placed_by_uncompiled_code_are_found():
    """As in a loop with a graph break in it, which dynamo skips: no graph has the mask. Every other prompt has none."""
    (tokens, images, at_image), later = scene(), scene(10, 4)
    nothing = tokens, images[:0], torch.zeros_like(at_image)
    results, *_ = run_all(VisionDecoder("uncompiled", layers=2), nothing, scene(), nothing, later)
    for (_, cache), want in zip(results, (nothing[2], at_image, nothing[2], later[2]), strict=True):
        assert torch.equal(vision_of(cache), want)


def test_images_that_no_compiled_code_places_are_told():
    """The decoder alone is compiled, and gets embeddings: which are images is unknown, and the report says so."""

    class Layers(Decoder):
        def forward(self, x):
            return self.run(x, None, *self.start(x[..., 0], None, None))

    note = "no compiled code has placed images so far"
    model, whole = Layers(layers=2), VisionDecoder("uncompiled", layers=2)
    model.compile(backend="akvq", options={**OPTIONS, "inner": "eager"})
    whole.compile(backend="akvq", options={**OPTIONS, "inner": "eager"})
    with torch.no_grad():
        model(torch.randn(2, 10, models.WIDTH))
        whole(scene()[0], None, *scene()[1:])
    assert note in str(akvq_fx.report(model))
    assert note not in str(akvq_fx.report(whole))


def test_embeddings_that_tell_nothing_about_images():
    """Scaled, of another shape, or of a model that is gone; and what was asked once is not asked again, since later
    graphs of a call get hidden states."""
    ids, weight = torch.tensor([[1, 2, 3]]), torch.randn(5, 4)
    embeddings = torch.nn.functional.embedding(ids, weight)
    ask = lambda x, count=3: vision_carry.take(1, count, x.device, x).tolist()
    mixed = torch.where(torch.tensor([[[False], [True], [False]]]), 9.0, embeddings)
    for given, want in ((mixed, [0, 1, 0]), (embeddings, [0, 0, 0]), (2 * embeddings, [0, 0, 0])):
        vision_carry.begin(ids, weight)
        vision_carry.begin(ids[0], weight)  # a vision tower's positions
        vision_carry.begin()
        assert ask(given) == [[bool(x) for x in want]]
        assert ask(given + torch.tensor([[[0.0], [0.0], [1.0]]])) == [[bool(x) for x in want]]
    vision_carry.begin(ids, weight)
    assert ask(torch.cat([mixed, mixed], 1), 6) == [[False] * 6]
    vision_carry.begin(ids, weight.clone())
    assert ask(mixed) == [[False] * 3]


def test_text_slots_are_asked_for_once_a_prompt(monkeypatch):
    model, asked = VisionDecoder("masked_scatter"), []
    monkeypatch.setattr(runtime, "text_slots", lambda *args: asked.append(args) or text_slots(*args))
    (first, second), *_ = run_all(model, scene(), scene(10, 4))
    assert len(asked) == 2
    for (_, cache), (_, _, at_image) in zip((first, second), (scene(), scene(10, 4)), strict=True):
        for key, _ in cache:  # three layers, whose keys hold the same text
            text_at = key.storage["text_at"]
            for row in range(2):
                kept = text_at[row, text_at[row] >= 0]
                assert torch.equal(kept, torch.nonzero(~at_image[row]).flatten().int())


def test_token_types_by_name():
    tokens, _, at_image = scene()
    (capture,) = captured(VisionDecoder("none"), tokens, mm_token_type_ids=at_image.long(), options=OPTIONS)
    assert policies(capture) == ["TSA", "TSA", "PSA"]


def test_token_types_reach_the_cache():
    model, (tokens, _, at_image) = VisionDecoder("none"), scene()
    run = torch.compile(model, backend=models.Spy(**OPTIONS))
    with torch.no_grad():
        _, cache = run(tokens, mm_token_type_ids=2 * at_image.long())
    assert torch.equal(vision_of(cache), at_image)


def test_no_vision_tokens_no_tsa():
    (capture,) = captured(Decoder(layers=3), token_ids(2, 10), options=OPTIONS)
    assert policies(capture) == ["PSA"] * 3 and capture.state.vision is None
    assert all(site.key_layout.text_bits == 0 for site in capture.state.sites)


@pytest.mark.parametrize(
    "more, keys, values",
    [
        ({"recipe": "akvq-vl"}, [4, 4, 0], [4, 4, 0]),
        ({"recipe": "akvq"}, [4, 4, 4], [4, 4, 0]),
        ({"psa_text_key_bits": 2}, [4, 4, 0], [4, 4, 0]),
        ({"psa_text_key_bits": 8, "tsa_layers": ()}, [8] * 3, [0] * 3),
        ({"body_bits": 4, "recipe": "akvq"}, [0] * 3, [0] * 3),
    ],
    ids=str,
)
def test_text_bits_of_later_layers(more, keys, values):
    tokens, *images = scene()
    (capture,) = captured(VisionDecoder("masked_scatter"), tokens, None, *images, options={**OPTIONS, **more})
    assert [site.key_layout.text_bits for site in capture.state.sites] == keys
    assert [site.value_layout.text_bits for site in capture.state.sites] == values


def test_the_report_says_whose_text_has_more_bits():
    tokens, *images = scene()
    (capture,) = captured(VisionDecoder("masked_scatter"), tokens, None, *images, options={**OPTIONS, "recipe": "akvq"})
    first, _, last = (bits_of(site.key_layout, site.value_layout) for site in capture.state.sites)
    assert first == "recent 2: 16, text: 4, rest: 2"
    assert last == "recent 2: 16, pivots 2: 16, keys of text: 4, rest: 2"


@pytest.mark.parametrize(
    "layers, expected", [((), ["PSA"] * 3), ((2,), ["PSA", "PSA", "TSA"]), ((0, 1, 2), ["TSA"] * 3)], ids=str
)
def test_layers_are_the_configured_ones(layers, expected):
    tokens, *images = scene()
    options = {"tsa_layers": layers}
    (capture,) = captured(VisionDecoder("masked_scatter"), tokens, None, *images, options=options)
    assert policies(capture) == expected


def test_text_at_16_bits_keeps_the_layer_plain():
    model, (tokens, images, at_image) = VisionDecoder("masked_scatter"), scene()
    [(_, cache)], spy, _ = run_all(model, (tokens, images, at_image), text_bits=16)
    assert [isinstance(pair[0], akvq_fx.PackedKV) for pair in cache] == [False, False, True]
    reasons = {row.reason.split(" [")[0] for row in akvq_fx.report(model).refused}
    assert reasons == {"text_bits=16 keeps TSA layers at 16 bits"}


@pytest.mark.parametrize("text_key_bits", (2, 4))
def test_channels_are_uneven_where_text_has_no_bits_of_its_own(text_key_bits):
    config = AKVQConfig(recipe="akvq", psa_text_key_bits=text_key_bits)
    of = lambda tsa, vision: [layout_of(config, half, 64, torch.bfloat16, tsa, vision) for half in ("keys", "values")]
    for tsa, vision in ((False, False), (False, True), (True, True)):
        overlay = vision and (tsa or text_key_bits == 4)
        key, value = of(tsa, vision)
        assert (key.uneven, key.symmetric, value.symmetric, value.uneven) == (*[not overlay] * 3, False)
        assert bool(key.text_bits) == overlay and key.body_clip == (0.8 if overlay else 1.0)


@pytest.mark.parametrize("blocks", (True, False, "always"))
def test_blocks_have_means_where_text_has_no_bits_of_its_own_or_always(blocks):
    config = AKVQConfig(center_blocks=blocks)
    of = lambda tsa, vision: layout_of(config, "keys", 64, torch.bfloat16, tsa, vision)
    assert of(False, False).blocks == bool(blocks)
    for keys in (of(True, True), of(False, True)):
        assert keys.text_bits == 4 and not keys.uneven and keys.blocks == (blocks == "always")
    assert not layout_of(config, "values", 64, torch.bfloat16, True, True).blocks


def test_center_blocks_has_no_other_values():
    with pytest.raises(ValueError, match="center_blocks.*accepted: True, False, 'always' or None"):
        AKVQConfig(center_blocks="images")


def test_lossless_needs_no_policy():
    (capture,) = captured(VisionDecoder("masked_scatter"), *[scene()[0], None, *scene()[1:]], options=models.LOSSLESS)
    assert policies(capture) == ["lossless"] * 3


def test_two_placements_are_one_mask():
    class Twice(VisionDecoder):
        """Images in two goes."""

        def place(self, x, images, at_image):
            early = at_image & (torch.arange(at_image.shape[1]) < 4)
            x = x.masked_scatter(early[..., None].expand_as(x), images)
            return x.masked_scatter((at_image & ~early)[..., None].expand_as(x), images)

    model, (tokens, images, at_image) = Twice("masked_scatter"), scene()
    [(_, cache)], _, _ = run_all(model, (tokens, images, at_image))
    assert torch.equal(vision_of(cache), at_image)


def test_mask_is_carried_across_a_graph_break():
    model, (tokens, images, at_image) = VisionDecoder("masked_scatter", broken=True), scene()
    [(_, cache)], spy, _ = run_all(model, (tokens, images, at_image))
    place, layers = spy.captures
    assert place.state.program.vision == "make" and layers.state.program.vision == "take"
    assert policies(layers) == ["TSA", "TSA", "PSA"]
    assert torch.equal(vision_of(cache), at_image)


def test_carried_mask_is_not_stale():
    model, (tokens, images, at_image) = VisionDecoder("masked_scatter", broken=True), scene()
    _, _, later = scene(first=5)
    prompts = (tokens, images, at_image), (tokens,), (tokens, images, later)
    results, spy, _ = run_all(model, *prompts)
    (_, with_image), (_, text_only), (_, moved) = results
    assert torch.equal(vision_of(with_image), at_image)
    assert not vision_of(text_only).any()
    assert torch.equal(vision_of(moved), later)


def test_carried_mask_of_another_shape_is_not_used():
    model, (tokens, images, at_image) = VisionDecoder("masked_scatter", broken=True), scene()
    [(_, first), (_, second)], _, _ = run_all(model, (tokens, images, at_image), (tokens[:, :7],))
    assert vision_of(first).any() and not (second[0][0].classes() == VISION).any()


def test_mask_is_carried_into_layers_that_a_text_prompt_compiled():
    model, (tokens, images, at_image) = VisionDecoder("masked_scatter", broken=True), scene()
    [_, (_, cache)], _, _ = run_all(model, (tokens,), (tokens, images, at_image))
    assert torch.equal(vision_of(cache), at_image)


def test_without_the_rotation_keys_are_stored_as_they_are():
    evidence = models.evidence(models.Decoder(models.Direct), {"rotate": False, "window": 4, "pivots": 0}, steps=1)
    layout = evidence.cache[0][0].layout_of
    assert not layout.rotated and not layout.affine


def test_a_layers_number_is_in_its_path_else_its_place():
    """A graph may begin with any layer, so the order of sites counts only where paths have no number."""
    graph = torch.fx.Graph()
    sixth = graph.placeholder("L_self_modules_layers_modules_5_modules_k_proj_parameters_weight_")
    plain = graph.placeholder("L_self_modules_k_proj_parameters_weight_")
    assert [layer_of(weight, 2)[0] for weight in (sixth, plain, None)] == [5, 2, 2]
