"""Runtime: the callable that dynamo gets. Unwraps PackedKV arguments, calls the compiled graph, wraps its results.

Host work only, a few microseconds a layer; nothing here reads the device in a decode step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Sequence

import torch

from akvq_fx import sliding, vision_carry
from akvq_fx.cuda_graph import DecodeStep, picker
from akvq_fx.digest import DIGESTS, compute
from akvq_fx.folding import FOLDED
from akvq_fx.kept_buffers import with_room
from akvq_fx.pack_buffers import pack_buffers
from akvq_fx.packed_kv import PackedKV, Storage
from akvq_fx.program import Appended, Packed, Program
from akvq_fx.storage import text_slots

MODELS = 8  # whose weights a graph remembers at a time; those of another are digested again when it runs


class Weights:
    """One model's weights in one graph, as last checked, and the owners of the caches that they make.

    owners    positions of weights -> the digests of their contents, as one text; None where there are no weights
    """

    def __init__(self, weights: Sequence[torch.Tensor], owners: dict[tuple[int, ...], str | None]):
        self.ids, self.versions, self.owners, self.gone = list(map(id, weights)), versions(weights), owners, False
        me = weakref.ref(self)

        def forget(_):
            weights = me()
            if weights is not None:
                weights.gone = True

        self.refs = [weakref.ref(weight, forget) for weight in weights]

    def are_same(self, weights: Sequence[torch.Tensor]) -> bool:
        """Called in every decode step; takes about ten microseconds for a hundred weights."""
        return not self.gone and list(map(id, weights)) == self.ids and versions(weights) == self.versions


def versions(weights: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [weight._version for weight in weights]
    except RuntimeError:  # inference tensors count no versions
        return [0 if weight.is_inference() else weight._version for weight in weights]


class Runtime:
    """One rewritten graph, ready to be called with the arguments of the original one.

    Of a call it keeps nothing but what it learned about weights, so threads may call it concurrently.
    """

    def __init__(self, program: Program, inner, step: int, starts_call: bool):
        self.program, self.inner, self.step, self.starts_call = program, inner, step, starts_call
        growth = dict(program.appends)
        # PackedKV arguments with the weights that make their tokens and the tokens that they are given
        self.takes = [(i, program.owners.get(i), growth.get(i)) for i in program.packed]
        made = [output.owner for output in program.outputs if isinstance(output, Packed)]
        made += [pair.owner for pair in program.exchanges]
        self.makes_caches = bool(made)
        self.groups = {*program.owners.values(), *made}
        self.watched = sorted({i for group in self.groups for i in group})
        self.watched_of = picker(self.watched)
        # by the id of the first watched weight, since models of one class share a graph
        self.weights: dict[int, Weights] = {}
        # the order of placeholders: own arguments, the carried vision mask, the buffers of each packed tensor
        self.plain = [i for i in program.inputs if type(i) is int]
        self.bound = list(dict.fromkeys(i[0] for i in program.inputs if type(i) is not int))
        fields = [
            (i, n) for i in self.bound for n in range(sum(type(j) is not int and j[0] == i for j in program.inputs))
        ]
        assert program.inputs == [*self.plain, *fields], "akvq: buffers of a packed tensor are not in order"
        self.captured = inner if isinstance(inner, DecodeStep) else None
        if self.captured is not None:
            inner.keep_from(len(self.plain) + (program.vision == "take"), len(fields))

    def __call__(self, *args):
        program = self.program
        owners = self.owners_of(args, anew=self.makes_caches)
        if self.starts_call and program.vision is None or program.packed:
            vision_carry.put(None)
        storages = self.writable_storages(args, owners)
        given = args
        if program.unpacked or program.folds:
            given = list(args)
            for i in program.unpacked:
                given[i] = args[i].unpack()
            self.fold(given)
        inputs = [given[i] for i in self.plain]
        if program.vision == "take":
            batch, tokens = (size(args) for size in program.vision_size)
            embeddings = None if program.embeddings is None else args[program.embeddings]
            inputs.append(vision_carry.take(batch, tokens, self.device(args), embeddings))
            self.on_images(vision_carry.peek() is not None)
        for position in self.bound:
            rows = program.rows.get(position)
            inputs += storages[position].buffers if rows is None else storages[position].first_rows(rows(args)).held
        inputs += [args[position].dropped for position in program.firsts]
        more = {} if self.captured is None else {"storages": [storages[position] for position in self.bound]}
        run = lambda: list(self.inner(*inputs, **more))
        with torch.no_grad() if program.inference else contextlib.nullcontext():
            results = run() if self.writes else with_room(run)
        if program.vision == "make":
            vision_carry.put(results.pop().detach())
        extra = results[len(results) - program.extra :]
        del results[len(results) - program.extra :]
        if program.inference and torch.is_grad_enabled():
            results = refuse_backward(results, args)
        outputs = self.wrap_outputs(given, storages, results, owners)
        if program.exchanges:
            for number, why in pack_buffers(program.exchanges, args, extra, owners):
                self.on_left(number, why)
        return outputs

    def owners_of(self, args, anew: bool) -> dict[tuple[int, ...], str | None]:
        """Digests of what makes each cache's tokens; `anew`: read again, since `.data` changes leave no mark."""
        if not self.watched:
            return dict.fromkeys(self.groups)
        weights = self.watched_of(args)
        first = id(weights[0])
        known = self.weights.get(first)
        if known is not None and not anew and known.are_same(weights):
            return known.owners
        texts = dict(zip(self.watched, DIGESTS.of(weights, anew), strict=True))
        owners = {group: sys.intern(" ".join(sorted({texts[i] for i in group}))) or None for group in self.groups}
        if known is None and self.on_weights is not None:
            self.on_weights(args)
        kept = list(self.weights.items())[1 - MODELS :]
        self.weights = {**dict(kept), first: Weights(weights, owners)}
        return owners

    writes = True  # the graph writes some tensor in place, so a call that failed is not repeated
    on_left = None  # the report's callback: gets the number of an exchange whose buffers stay plain, and why
    on_images = staticmethod(lambda told: None)  # the same: whether an earlier graph told which tokens are images
    on_weights = None  # the report's callback: gets the arguments when the graph first runs with other weights

    def fold(self, args: list) -> None:
        """Replace weights by folded copies, computed again for every prompt: `.data` changes leave no mark."""
        for fold in self.program.folds:
            at = (fold.value_weight, fold.value_bias, fold.output_weight)
            sources = [None if i is None else args[i] for i in at]
            for i, copy in zip(at, FOLDED.of(sources, fold.rows, fold.columns, not self.program.step), strict=True):
                if i is not None:
                    args[i] = copy

    def writable_storages(self, args, owners) -> dict[int, Storage]:
        """Storages of the PackedKV arguments, ready to be written."""
        storages, short = {}, {}
        plain_mode = not torch.is_inference_mode_enabled()
        for position, group, tokens in self.takes:
            packed = args[position]
            storage = packed.storage or packed._storage()
            if group is not None and storage.owner is not owners[group]:
                self.check_owner(packed, storage, owners[group], group, args)
            if tokens is not None:
                count = tokens.constant if tokens.constant is not None else tokens(args)
                end = packed.first + packed.length + count
                # what to_be_written would find in most steps, without the call
                if storage.end != end - count or storage.borrowers or end > storage.capacity:
                    storage, capacity = packed.to_be_written(count, self.step)
                    if capacity > storage.capacity:
                        short[position] = capacity
                storage.end = end
            if plain_mode and storage.held[0].is_inference():
                storage.held = [buffer.clone() for buffer in storage.buffers]  # torch forbids to write to the old ones
                storage.mark_dynamic()
            storages[position] = storage
        if short:
            self.grow(storages, short)
        return storages

    def grow(self, storages: dict[int, Storage], capacities: dict[int, int]) -> None:
        """Make room in those of a call's storages whose capacities are given, where it can be in kept buffers."""
        if self.captured is not None:
            every = [capacities.get(i, storages[i].capacity) for i in self.bound]
            if self.captured.grow([storages[i] for i in self.bound], every):
                return
        for i, capacity in capacities.items():
            with_room(functools.partial(storages[i].grow, capacity, apart=self.captured is not None))

    def check_owner(self, packed, storage: Storage, expected: str | None, group, args) -> None:
        """Raises ValueError for a cache of other weights, after their contents have been digested once more."""
        if storage.owner is None or expected is None:
            return
        if not same_weights(storage.owner, expected) or storage.loaded:
            expected = self.owners_of(args, anew=True)[group]
        if not same_weights(storage.owner, expected) and not self.is_a_cast(storage, group, args):
            raise ValueError(
                f"akvq: the packed cache of shape {list(packed.shape)} was made by other weights than the ones that "
                "continue it (another model or layer, or weights changed since); start with an empty cache, or pass "
                "cache.dequantize() to go on with these tokens as plain numbers"
            )
        storage.owner, storage.loaded = expected, False

    def is_a_cast(self, storage: Storage, group: tuple[int, ...], args) -> bool:
        """The weights are those of the cache, cast to a wider dtype, which holds the same numbers."""
        narrow, weights = storage.layout.dtype, [args[i] for i in group]
        if all(weight.dtype == narrow or not weight.is_floating_point() for weight in weights):
            return False
        return same_weights(storage.owner, " ".join(compute([weight.detach().to(narrow) for weight in weights])))

    def wrap_outputs(self, args, storages, results, owners) -> tuple:
        out, views, slots, i = [], {}, {}, 0
        for spec in self.program.outputs:
            if spec is None:
                out.append(results[i])
                i += 1
            elif type(spec) is Appended:
                storage = storages[spec.arg]
                view = args[spec.arg] if storage.end is None else views.get((spec.arg, spec.kept))
                if view is None:
                    view = views[spec.arg, spec.kept] = longer(args[spec.arg], storage, spec.kept, args)
                out.append(view)
            else:
                if id(spec) not in views:
                    count = len(spec.layout.fields)
                    views[id(spec)] = wrap(spec, results[i : i + count], args, owners[spec.owner], slots)
                    i += count
                out.append(views[id(spec)])
        return tuple(out)

    def device(self, args):
        return next(a.device for a in args if isinstance(a, torch.Tensor))


def longer(packed: PackedKV, storage: Storage, kept, args) -> PackedKV:
    """All tokens of a packed cache and those appended to it, or the last `kept` of them."""
    if kept is None:
        return PackedKV.view_of(storage, storage.end - packed.first, packed.first)
    length = kept.constant if kept.constant is not None else kept(args)
    storage.slides = True  # its prompt may have been kept whole
    return sliding.move_to_front(PackedKV.view_of(storage, length, storage.end - length))


def wrap(spec: Packed, buffers: list, args, owner, slots: dict[str, tuple]) -> PackedKV:
    """slots: text slots of this call by Packed.classes; they wait for the device, so are found once for all layers."""
    length, prompt = spec.length(args), spec.prompt(args)
    end = None if spec.static else length
    storage = Storage(spec.layout, [b.detach() for b in buffers], end, prompt, owner, spec.axes)
    # a static cache may be written again from its start: its slots stay positions
    if spec.slides:
        storage.slides, storage.prompt = True, 0  # the text slots of a sliding window stay positions too
    elif spec.layout.text_bits and not spec.static:
        if spec.classes not in slots:
            slots[spec.classes] = text_slots(storage["text_at"], prompt)
        storage.compact_text(prompt, slots[spec.classes])
    storage.mark_dynamic()
    return PackedKV.view_of(storage, length)


def same_weights(one: str, other: str) -> bool:
    """Digests of the same weights; a graph that shows fewer (no norm, no adapter) may continue one with more."""
    one, other = set(one.split()), set(other.split())
    return one <= other or other <= one


class NoBackward(torch.autograd.Function):
    """Identity on tensors; their backward pass is refused, since codes have no gradient."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, *tensors: torch.Tensor):
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "akvq: no gradient goes through a packed cache; accepted: inference. To train, call the model with "
            "use_cache=False (nothing is packed then), or call it uncompiled"
        )


def refuse_backward(results: list, inputs) -> list:
    """Have results require a gradient where the uncompiled graph's would, so that backward() raises."""
    anchor = next((x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad), None)
    places = [i for i, x in enumerate(results) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if anchor is None or not places:
        return results
    results = list(results)
    for i, x in zip(places, NoBackward.apply(anchor, *(results[i] for i in places)), strict=True):
        results[i] = x
    return results
