"""AKVQConfig: every number of the method in one frozen place, each with its source: torch.compile's `options=`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from akvq_fx.recipes import RECIPES

# what an option is where neither the user nor the recipe sets it: AKVQ-VL's numbers, with their place in its paper
DEFAULTS = {
    "body_bits": 2,
    "text_bits": 4,  # section III-B, text-salient attention
    "psa_text_key_bits": 2,  # section III-B: of pivot-salient layers only pivots and recent tokens are salient
    "center_blocks": False,
    "uneven_keys": False,
    "share_pairs": False,
    "symmetric_values": False,
    "group": 128,  # section IV-A
    "window": 128,  # section IV-A
    "pivots": 15,  # figure 8
    "tsa_layers": (0, 1),  # table I, LLaVA-1.5, LLaVA-1.6-vicuna, Qwen2-VL
    "value_rotation": "online",  # the paper folds, which needs these weights a second time, so it is opt-in
}
# options of the packed path; a simulated recipe takes none of them, since it has its own numbers
PACKED_ONLY = ("body_bits", "text_bits", "psa_text_key_bits", "body_clip", "text_clip", "group", "window", "pivots",
               "center_keys", "center_blocks", "balance_keys", "uneven_keys", "share_pairs", "symmetric_values",
               "rotate")  # fmt: skip
CLIPS = {2: 0.8, 4: 1.0, 8: 1.0, 16: 1.0}  # range clipping by bits: paper section IV-A; no clipping above 2 bits
CAPTURED_MODE = "reduce-overhead"  # decode steps in CUDA graphs; Inductor's own graphs are never asked for
INNERS = ("inductor", "aot_eager", "eager")
ALWAYS = "always"
CHOICES = {
    "body_bits": (2, 4, 8, 16),
    "text_bits": (2, 4, 8, 16),
    "psa_text_key_bits": (2, 4, 8),
    "pivot_mode": ("topk", "massive"),
    "value_rotation": ("fold", "online", "off"),
    "prefill": ("exact", "quantized"),
    "inner": INNERS,
}


@dataclasses.dataclass(frozen=True)
class AKVQConfig:
    """Settings of one compiled model. On construction None is replaced by the recipe's choice, else by a default.

    recipe          a method of akvq_fx.recipes; a simulated one takes none of PACKED_ONLY
    body_bits       bits of every token that is not salient; 16 is lossless mode, in which nothing is quantized
    text_bits       bits of text tokens in TSA layers; 16 keeps TSA layers wholly at 16 bits; with body_bits or fewer
                    they are treated like the others
    psa_text_key_bits
                    bits of text tokens' keys in the other (PSA) layers, where vision tokens are known and this is more
                    than body_bits; values of text tokens have body_bits there
    tsa_layers      decoder layers that attend to text first; where no vision tokens are known they act as PSA layers.
                    "auto": as akvq_fx.calibrate measured, else the paper's table (akvq_fx/policy.py)
    window          most recent tokens kept at 16 bits, in every layer
    pivots          tokens kept at 16 bits in PSA layers; pivot_mode "topk" fills all slots by max |h|, "massive" only
                    with tokens above massive_floor and massive_ratio times the median
    center_blocks   codes of keys are differences from the mean of their block of 64 tokens, so that centres do not go
                    stale; not in layers that keep text at more bits, but with "always"
    uneven_keys     of a head's channels the quarter that moves scores most gets 4 bits, the last quarter none (needs
                    2 bits and rotate); not in layers that keep text at more bits
    share_pairs     with uneven_keys: the two channels that a rotary embedding turns into each other are ranked and
                    balanced by statistics in common, the more the shorter the prompt
    symmetric_values
                    values have a scale alone, without a minimum; not in layers that keep text at more bits
    group           channels that share a scale; a head dim that is no multiple of it is one group
    rotate          Walsh-Hadamard rotation of keys and values; None: on, but off in lossless mode
    value_rotation  "online": in the graph, where tokens are written and read; "fold": into copies of W_V and W_O where
                    the graph proves that legal, else online; "off"
    prefill         "exact": the prompt attends to its own 16-bit keys, as serving systems do; "quantized": to the
                    packed ones
    cuda_graphs     on a CUDA device, decode steps are replayed from CUDA graphs
    kept_share      share of the device's memory that CUDA graphs may keep of caches, so that later generations capture
                    nothing (akvq_fx/kept_buffers.py)
    share_layers    layers of a graph that are alike are compiled once (akvq_fx/regions.py)
    compile_uncached, compile_prompts
                    graphs without a cache (vision towers, projectors), and graphs of prompts, go to the inner compiler
                    too, else they run as they are
    inner, mode     the compiler of the rewritten graph, and its torch.compile mode (Inductor only)
    """

    recipe: str = "akvq"
    body_bits: int | None = None
    text_bits: int | None = None
    body_clip: float | None = None
    text_clip: float | None = None
    group: int | None = None
    window: int | None = None
    pivots: int | None = None
    pivot_mode: str = "topk"
    massive_floor: float = 100.0  # Sun et al., arXiv 2402.17762
    massive_ratio: float = 1000.0  # the same
    psa_text_key_bits: int | None = None
    tsa_layers: tuple[int, ...] | str | None = None
    center_keys: bool | None = None
    center_blocks: bool | str | None = None
    balance_keys: bool | None = None
    uneven_keys: bool | None = None
    share_pairs: bool | None = None
    symmetric_values: bool | None = None
    rotate: bool | None = None
    value_rotation: str | None = None
    prefill: str = "exact"
    capacity_step: int = 128  # tokens a dynamic cache grows by; one reallocation a step
    cuda_graphs: bool = True
    kept_share: float = 0.05
    share_layers: bool = True
    compile_uncached: bool = False
    compile_prompts: bool = False
    inner: str = "inductor"
    mode: str | None = None

    def __post_init__(self):
        if self.recipe not in tuple(RECIPES):
            self._refuse("recipe", "one of " + ", ".join(map(repr, RECIPES)))
        self._fill_in()
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                self._refuse(name, "one of " + ", ".join(map(repr, accepted)))
        for name in ("window", "pivots"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                self._refuse(name, "an integer >= 0")
        if not _is_int(self.group) or self.group < 8 or self.group % 8:
            self._refuse("group", "a multiple of 8")
        if not _is_int(self.capacity_step) or self.capacity_step < 1:
            self._refuse("capacity_step", "an integer >= 1")
        for name in ("massive_floor", "massive_ratio"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                self._refuse(name, "a number >= 0")
        for name in ("center_keys", "balance_keys", "uneven_keys", "share_pairs", "symmetric_values", "rotate"):
            if getattr(self, name) not in (None, True, False):
                self._refuse(name, "True, False or None")
        if self.center_blocks not in (None, True, False, ALWAYS):
            self._refuse("center_blocks", f"True, False, {ALWAYS!r} or None")
        for name, bits in (("body_clip", self.body_bits), ("text_clip", self.text_bits)):
            clip = getattr(self, name)
            if clip is None:
                object.__setattr__(self, name, CLIPS[bits])
            elif not _is_number(clip) or not 0 < clip <= 1:
                self._refuse(name, "a number in (0, 1]")
        if self.tsa_layers != "auto":  # akvq_fx/policy.py replaces "auto" by layer numbers, before any pass runs
            sequence = isinstance(self.tsa_layers, Iterable) and not isinstance(self.tsa_layers, (str, bytes))
            if not sequence or not all(_is_int(i) and i >= 0 for i in self.tsa_layers):
                self._refuse("tsa_layers", 'a sequence of layer numbers >= 0, or "auto"')
            object.__setattr__(self, "tsa_layers", tuple(sorted(set(self.tsa_layers))))
        for name in ("cuda_graphs", "share_layers", "compile_uncached", "compile_prompts"):
            if getattr(self, name) not in (True, False):
                self._refuse(name, "True or False")
        if not _is_number(self.kept_share) or not 0 <= self.kept_share <= 1:
            self._refuse("kept_share", "a number in [0, 1]")
        if self.mode == CAPTURED_MODE and not self.cuda_graphs:
            self._refuse("mode", "another mode with cuda_graphs=False")
        if self.center_blocks and self.body_bits == 16:
            self._refuse("center_blocks", "False where body_bits is 16")
        if self.uneven_keys and not (self.rotate and self.body_bits == 2):
            self._refuse("uneven_keys", "False where body_bits is not 2 or rotate is False")
        if self.share_pairs and not self.uneven_keys:
            self._refuse("share_pairs", "False where uneven_keys is False")
        if self.symmetric_values and self.body_bits not in (2, 4):
            self._refuse("symmetric_values", f"False with body_bits={self.body_bits}, or body_bits of 2 or 4")
        if self.mode is not None and self.inner != "inductor":
            self._refuse("mode", f"None when inner={self.inner!r}: only Inductor has modes")

    def _fill_in(self):
        """Put the recipe's choice, else the default, where the user gave none."""
        recipe = RECIPES[self.recipe]
        if recipe.simulated:
            for name in PACKED_ONLY:
                if getattr(self, name) is not None:
                    packed = ", ".join(repr(r.name) for r in RECIPES.values() if not r.simulated)
                    self._refuse(
                        name,
                        f"no value with recipe={self.recipe!r}, which has its own numbers, "
                        f"or a packed recipe: {packed}",
                    )
            if self.mode == CAPTURED_MODE:
                self._refuse(
                    "mode", f"others with recipe={self.recipe!r}: a simulated cache cannot be read in a CUDA graph"
                )
        chosen = {**DEFAULTS, **recipe.options}
        if recipe.simulated:
            chosen |= {"body_bits": 16, "window": 0, "pivots": 0}
        bits = chosen["body_bits"] if self.body_bits is None else self.body_bits
        if bits == 16:  # lossless
            chosen |= {"center_keys": False, "center_blocks": False, "balance_keys": False, "rotate": False}
        if bits != 2 or self.rotate is False:  # where the user's choice leaves no room for the recipe's
            chosen["uneven_keys"] = False
        if not (chosen["uneven_keys"] if self.uneven_keys is None else self.uneven_keys):
            chosen["share_pairs"] = False
        if bits not in (2, 4):
            chosen["symmetric_values"] = False
        chosen.setdefault("rotate", True)
        for name, value in chosen.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _refuse(self, name: str, accepted: str):
        raise ValueError(f"akvq: option {name}={getattr(self, name)!r} is not accepted; accepted: {accepted}")

    @property
    def simulated(self) -> bool:
        """Tokens are kept as they are and quantized whenever they are read, by the recipe's arithmetic."""
        return RECIPES[self.recipe].simulated

    @property
    def keeps_psa_text_keys(self) -> bool:
        """PSA layers keep text tokens' keys at more bits than other keys, where vision tokens are known."""
        return self.psa_text_key_bits > self.body_bits

    @property
    def lossless(self) -> bool:
        return self.body_bits == 16 and not self.simulated

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> AKVQConfig:
        """The config that torch.compile(backend="akvq", options=..., mode=...) means.

        Raises ValueError for an unknown option (listing the known ones) or a value out of range.
        """
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in options if key not in known]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"akvq: unknown option {unknown[0]!r}.{hint} Known options: {', '.join(known)}")
        if mode is not None and mode != "default":
            options.setdefault("mode", mode)
        if isinstance(options.get("tsa_layers"), list):
            options["tsa_layers"] = tuple(options["tsa_layers"])
        return cls(**options)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
