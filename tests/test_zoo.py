"""Model families of transformers, built tiny from config: lossless generation is token-identical, 2-bit generation runs
on codes.

Every family runs lossless and at 2 bits, where a family whose report says that every cache stays at 16 bits must be
exact: with a growing cache and a left-padded batch of two, and a few with a static cache and one row instead, which is
traced in half the time. Families whose graphs have another one's form are left out (REPEATED): AKVQ_ZOO=full runs
every family with every combination. Models have two layers, of which tsa_layers=(0,) leaves one for each policy.
"""

import os
import warnings

import pytest
import torch
import transformers

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.kernels.layout import VISION
from akvq_fx.transformers_names import cache_of
from tests.both_bits import BothBits
from tests.zoo import ZOO

FULL = os.environ.get("AKVQ_ZOO") == "full"
# family left out: the one that runs, whose attention and cache have the same form
REPEATED = {
    "aya_vision": "cohere",
    "gemma3_text": "gemma3",
    "gemma4": "gemma3n_text",
    "glm4v": "qwen2_5_vl",
    "gptj": "cohere",
    "instructblip_opt": "blip2_opt",
    "lfm2_vl": "qwen3_5",
    "llava_mha64": "llava",
    "llava_next_mistral": "llava",
    "llava_next_vicuna": "llava",
    "llava_onevision": "internvl",
    "molmo2": "phi3",
    "ovis2": "internvl",
    "paligemma": "gemma3",
    "phi": "gpt_neox",
    "phi4_multimodal": "phi3",
    "pixtral_llava": "llava",
    "qwen2": "qwen2_5_vl",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3_next": "qwen3_5",
    "smolvlm": "idefics3",
}
# cheap ones of every form that static caches are used with; each has relatives that grow
STATIC = {"llama", "qwen3", "phi3", "gpt2", "idefics3", "internvl", "qwen2_5_vl", "gemma3"}
if FULL:
    CASES = [(family, cache, batch) for family in ZOO for cache in ("dynamic", "static") for batch in (1, 2)]
else:
    CASES = [(f, "static", 1) if f in STATIC else (f, "dynamic", 2) for f in ZOO if f not in REPEATED]
TOKENS = 8
SMALL = {"inner": "eager", "window": 8, "pivots": 3, "tsa_layers": (0,)}

# generate() of these runs an inner module; compiling the outer one compiles nothing
INNER = {"blip2_opt": "language_model", "instructblip_opt": "language_model", "kosmos2": "text_model"}
# caches that a graph must leave at 16 bits: their attention is latent (MLA), or reads its values through other ops
# (DiffLlama)
ALL_16BIT = {"deepseek_v3", "diffllama"}
# every layer is a sliding window, whose static cache rolls once it is full: then it stays at 16 bits
SLIDING_ONLY = {"mistral_swa", "idefics2"}
# stock torch.compile changes these too, so the uncompiled model is no reference: they are compared with backend="eager"
COMPARE_COMPILED = {"phi4_multimodal"}
NO_STATIC = {"kosmos2"}  # transformers fails before any compiler sees it
# the uncompiled model does not run in every version of transformers: Llama-4 in 5.24, the others in 5.17
MAY_FAIL = {"llama4", "mllama", "molmo2"}


def to_compile(family, model):
    return getattr(model, INNER[family]) if family in INNER else model


def generate(model, inputs, cache):
    """(sequences, cache tensors) of one greedy generation."""
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**inputs, max_new_tokens=TOKENS, return_dict_in_generate=True, **extra)
    tensors = []
    for part in (cache_of(out), *(getattr(cache_of(out), n, None) for n in
                 ("self_attention_cache", "cross_attention_cache"))):  # fmt: skip
        tensors += [layer.keys for layer in getattr(part, "layers", []) if getattr(layer, "keys", None) is not None]
    return out.sequences, tensors


def built(family, batch, attention=""):
    """(model, inputs); attention: its attn_implementation, "" for the family's own choice."""
    model, inputs = ZOO[family](batch=batch)
    if attention:
        model.set_attn_implementation(attention)
    return model, inputs


def reference(family, cache, batch, attention=""):
    """Sequences of the uncompiled model; skips the test where it does not run."""
    try:
        model, inputs = built(family, batch, attention)
        if family in COMPARE_COMPILED:
            to_compile(family, model).compile(backend="eager")
        return generate(model, inputs, cache)[0]
    except Exception as error:
        if family not in MAY_FAIL:
            raise
        pytest.skip(f"the uncompiled model fails in transformers {transformers.__version__}: {error}")
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("family, cache, batch", CASES)
def test_family(family, cache, batch):
    if cache == "static" and family in NO_STATIC:
        pytest.skip("transformers cannot run this family with a static cache")
    check_family(family, cache, batch)


# llava's text model and vision tower, rotary sections, a static cache; ALiBi by baddbmm is bloom's, above
@pytest.mark.parametrize(
    "family, cache, batch", [("llava", "dynamic", 2), ("qwen2_vl", "dynamic", 2), ("qwen3", "static", 1)]
)
def test_eager_attention_packs_as_sdpa_does(family, cache, batch):
    check_family(family, cache, batch, "eager")


def test_eager_attention_by_the_way_of_users():
    """Default options, whose inner compiler is Inductor; the prompt is within the window, so tokens are exact."""
    expected = reference("llama", "dynamic", 2, "eager")
    model, inputs = built("llama", 2, "eager")
    model.compile(backend="akvq")
    sequences, tensors = generate(model, inputs, "dynamic")
    assert torch.equal(sequences, expected)
    assert all(isinstance(t, PackedKV) and t.layout_of.body_bits == 2 for t in tensors)
    assert not akvq_fx.report(model).refused


def check_family(family, cache, batch, attention=""):
    expected = reference(family, cache, batch, attention)

    model, inputs = built(family, batch, attention)
    inner = to_compile(family, model)
    backend = BothBits(SMALL)
    inner.compile(backend=backend)
    lossless, tensors = generate(model, inputs, cache)
    report = akvq_fx.report(inner)
    assert torch.equal(lossless, expected), f"lossless tokens differ\n{report}"
    untouched = family in ALL_16BIT or (family in SLIDING_ONLY and cache == "static")
    assert any(isinstance(t, PackedKV) for t in tensors) or family in ALL_16BIT | SLIDING_ONLY | set(INNER), str(report)
    assert all(row.reason for row in report.refused)

    backend.runs = 2
    two_bits, tensors = generate(model, inputs, cache)
    report = akvq_fx.report(inner)
    assert two_bits.shape == expected.shape
    if untouched:
        assert torch.equal(two_bits, expected), f"every cache stays at 16 bits, yet tokens differ\n{report}"
        assert report.refused and not report.packed
    elif family not in INNER and family not in SLIDING_ONLY:
        packed = [t for t in tensors if isinstance(t, PackedKV)]
        assert packed and all(t.codes.dtype == torch.int16 for t in packed), str(report)
        decoded = {row.bits for graph, row in report.rows if (graph.kind, row.status) == ("decode", "packed")}
        assert decoded - {"16"}, str(report)
        # images may have left a sliding window
        text_first = [t for t in packed if t.layout_of.policy == "TSA" and not t.storage.slides]
        assert all((t.classes() == VISION).any() for t in text_first), "no image was recognised, the report says so"


@pytest.mark.parametrize("family", sorted(INNER))
def test_says_which_module_to_compile(family):
    torch._dynamo.reset()
    model, inputs = ZOO[family]()
    model.compile(backend="akvq", options=SMALL)
    model.generate(**inputs, max_new_tokens=2)
    assert f"model.{INNER[family]}.compile" in str(akvq_fx.report(model))
