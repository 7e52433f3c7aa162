"""One request of akvq_fx.Slots: what `generate` prepares of its inputs, its prompt in pieces, the choice of its tokens.

    request = prepared(model, {"input_ids": ..., "pixel_values": ...}, {"max_new_tokens": 64})
    while request.pieces:
        request.run_piece(model)     # fills a cache of its own
    request.choose(request.logits)   # the first token

`generate` itself prepares: it calls what it was given as `custom_generate` with ids, positions (of images too), token
types, logits processors and stopping criteria. So a request is what it is alone, for any model that generates.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from akvq_fx.transformers_names import CACHE_NAMES, cache_of

SLIDING = "DynamicSlidingWindowLayer"
GROWING = {"DynamicLayer", SLIDING, "DummyLayer"}  # layers of keys and values, or of another one's
TOKEN_TYPES = re.compile("token_type_ids$")  # one number a token, which generate makes longer
OF_TOKENS = ("attention_mask", "position_ids")
OF_VISION = re.compile("image|video|pixel|grid|audio|spatial")  # read with a prompt's images, not after them
VISION_TOKENS = re.compile("(image|video|audio)_token_(id|index)$")  # of a config: the ids that features replace
SHARED = (type(None), bool, int, float, str, torch.dtype)  # inputs of a step that are the same for all rows
MODES = ("greedy_search", "sample")  # of generate, which choose one token a step for one sequence
INSTEAD = {  # options of generate that rows have no use for, and what to do
    "streamer": "step() hands tokens out",
    "tokenizer": "for stop strings give stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]",
    "assistant_model": "a step decodes one token of each row",
    "custom_generate": "Slots is one",
}


class Request:
    """One row's request. `ids` [1, n] int64 on the CPU are prompt and tokens so far.

    begun    tokens of the prompt that its cache had at the beginning: a prefix
    pieces   (first, behind last) token of the prompt's pieces that have not run
    length   tokens of the prompt
    cache    a growing cache of its own, until its row takes it

    and when the prompt has run:

    logits   [vocabulary], of its last token
    seen     [length] int64, its mask
    inputs   what the model is called with for a token, but for ids, cache and mask; tensors are [..., 1, 1]
    """

    def __init__(self, module, ids: Tensor, processors, criteria, config, kwargs: dict[str, Any], seed: int | None):
        self.module, self.processors, self.criteria = module, processors, criteria
        self.samples, self.kwargs, self.given, self.seed = config.do_sample, kwargs, ids, seed
        self.cache_name = next((name for name in CACHE_NAMES if name in kwargs), CACHE_NAMES[0])
        self.cache = new_cache(kwargs.pop(self.cache_name, None))
        self.ids, self.generator = ids.cpu(), None
        embeds = kwargs.get("inputs_embeds")
        self.length = ids.shape[1] if embeds is None else embeds.shape[1]
        self.begun = self.cache.get_seq_length()
        if self.begun >= self.length:
            raise ValueError(
                f"akvq: the inputs have {self.length} tokens, and their cache {self.begun}; accepted: all of the "
                "prompt's tokens, and a cache of fewer"
            )
        self.pieces = deque([(self.begun, self.length)])

    def cut(self, chunk: int) -> None:
        """Run the prompt in pieces of `chunk` tokens; what comes before the last image's end is one piece."""
        first = 0
        if self.images:
            config = self.module.config.to_dict()
            known = [x for name, x in config.items() if VISION_TOKENS.match(name) and isinstance(x, int)]
            places = torch.isin(self.ids[0], torch.tensor(known, dtype=torch.int64)).nonzero()
            first = int(places[-1]) + 1 if len(places) else self.length
        ends = [*range(max(first, min(self.begun + chunk, self.length)), self.length, chunk), self.length]
        self.pieces = deque(zip([self.begun, *ends[:-1]], ends, strict=True))

    @property
    def images(self) -> set[str]:
        """Names of inputs that are no numbers of tokens: pixels, features that generate made of them, embeddings."""
        return {
            name
            for name, x in self.kwargs.items()
            if not (isinstance(x, SHARED) or name in OF_TOKENS or TOKEN_TYPES.search(name) or is_empty(x))
        }

    def run_piece(self, forward) -> None:
        """Run the next piece of the prompt by `forward`, the model, compiled or not."""
        begin, end = self.pieces[0]
        kwargs, ids = {**self.kwargs, self.cache_name: self.cache}, self.given
        if (begin, end) != (0, self.length):
            ids = ids[:, begin:end]
            for name, x in self.kwargs.items():
                if name in self.images and begin:
                    del kwargs[name]
                elif name == "position_ids":
                    kwargs[name] = x[..., begin:end]
                elif isinstance(x, Tensor) and name not in self.images:
                    kwargs[name] = x[..., :end]
        inputs = self.module.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        output = forward(**inputs, return_dict=True)
        self.cache = cache_of(output)
        self.pieces.popleft()
        if not self.pieces:
            self.become_a_row(output)

    def become_a_row(self, output) -> None:
        """After the prompt: keep what steps need, and let go of images."""
        self.logits = output.logits[0, -1].clone()
        kwargs = self.module._update_model_kwargs_for_generation(
            output, {**self.kwargs, self.cache_name: self.cache}, is_encoder_decoder=False
        )
        mask, device = kwargs.get("attention_mask"), self.logits.device
        self.seen = torch.ones(self.length, dtype=torch.int64, device=device)
        if mask is not None:
            self.seen = mask[0, : self.length].to(device, torch.int64)
        ids = torch.nn.functional.pad(self.given, (0, 1))  # the token to come, whichever it is
        inputs = self.module.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        self.inputs = of_a_step(self.module, self.cache_name, inputs)
        self.given, self.kwargs = None, {}

    def choose(self, logits: Tensor) -> Tensor:
        """The next token, [] int64, of logits [vocabulary], as generate chooses it."""
        scores = self.processors(self.ids.to(logits.device), logits[None].to(torch.float32, copy=True))
        if not self.samples:
            return scores.argmax(-1)[0]
        if self.generator is None:
            self.generator = torch.Generator(logits.device)
            self.generator.seed() if self.seed is None else self.generator.manual_seed(self.seed)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[0, 0]

    @property
    def plain(self) -> bool:
        """Whether its next token is the one of the largest logit."""
        return not self.samples and not len(self.processors)

    def take(self, token: int) -> bool:
        """Add a token; whether it was the last one."""
        self.ids = torch.cat([self.ids, torch.tensor([[token]])], 1)
        return bool(self.criteria(self.ids, None).all())


def is_empty(x) -> bool:
    """Of features by kind of input: whether there are none."""
    return isinstance(x, Mapping) and all(value is None for value in x.values())


def of_a_step(module, cache_name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What rows can share or join of the inputs that generate prepares for one token."""
    kept = {}
    for name, x in inputs.items():
        if name in ("input_ids", "attention_mask", "inputs_embeds", cache_name):
            continue
        if TOKEN_TYPES.search(name) and isinstance(x, Tensor):
            x = x[..., -1:]  # older versions hand on the whole prompt's
        joins = x.shape[-2:] == (1, 1) if isinstance(x, Tensor) else isinstance(x, SHARED)
        if joins:
            kept[name] = x
        elif not OF_VISION.search(name):
            shown = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise NotImplementedError(
                f"akvq: {type(module).__name__} takes {name} ({shown}) in every step, which Slots cannot join over "
                "rows; accepted: a mask, position ids, token types, and numbers. Use generate"
            )
    return kept


def new_cache(given):
    """The cache that generate prepared where it has tokens, else an empty one, for all tokens of all layers, so that
    rows of any length share one."""
    kinds = {type(layer).__name__ for layer in getattr(given, "layers", ())}
    begun = type(given).__name__ == "DynamicCache" and given.get_seq_length() > 0
    known = GROWING - {SLIDING} if begun else GROWING  # a filled sliding window has not all tokens
    if type(given).__name__ != "DynamicCache" or not kinds <= known or getattr(given, "offloading", False):
        shown = type(given).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
        raise NotImplementedError(
            f"akvq: rows cannot be replaced in this model's cache, {shown}; accepted: a DynamicCache of keys and "
            "values, and use_cache=True"
        )
    return given if begun else type(given)()


def prepared(model, inputs: dict[str, Any], options: dict[str, Any], seed: int | None) -> Request:
    """What generate makes of one request's inputs and options, before it would run the model."""
    module = getattr(model, "_orig_mod", model)
    for name in INSTEAD.keys() & options.keys():
        raise ValueError(f"akvq: leave {name} out: {INSTEAD[name]}")

    def custom(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        mode = str(generation_config.get_generation_mode().value)
        if mode not in MODES or generation_config.num_return_sequences not in (None, 1):
            raise ValueError(
                f"akvq: a row of Slots is one sequence, but these options are of {mode}, "
                f"num_return_sequences={generation_config.num_return_sequences}; accepted: greedy and sampled tokens"
            )
        if self.config.is_encoder_decoder:
            raise NotImplementedError(f"akvq: {type(self).__name__} is an encoder and decoder; Slots needs a decoder")
        rows = len(input_ids)
        if rows != 1:
            raise ValueError(f"akvq: inputs have {rows} rows, and a request of Slots is one; insert them one by one")
        return Request(self, input_ids, logits_processor, stopping_criteria, generation_config, kwargs, seed)

    return module.generate(**inputs, **options, custom_generate=custom)
