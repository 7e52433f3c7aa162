"""Runtime: the callable that dynamo gets. Unwraps PackedKV arguments into buffers, calls the compiled graph, wraps what comes back.

Host work only, a few microseconds a layer; nothing here reads the device in a decode step.
"""

from __future__ import annotations

import weakref

import torch

from akvq_fx import vision_carry
from akvq_fx.folding import HISTORY, Folded, version_of
from akvq_fx.packed_kv import PackedKV, Storage
from akvq_fx.passes.state import Appended, Packed, Program
from akvq_fx.storage import text_slots


class Runtime:
    """One rewritten graph, ready to be called with the arguments of the original one."""

    def __init__(self, program: Program, inner, step: int, starts_call: bool):
        self.program, self.inner, self.step, self.starts_call = program, inner, step, starts_call
        self.growth = dict(program.appends)
        self.pairs = {*program.owners.values(), *(o.owner for o in program.outputs if isinstance(o, Packed))}
        self.watched = sorted(
            {i for pair in self.pairs for i in pair if i is not None} | {f.value_weight for f in program.folds}
        )
        self.seen: list = []
        self.owner: dict = {}
        # placeholders stand in this order: own arguments, the carried vision mask, the buffers of each packed tensor
        self.plain = [i for i in program.inputs if type(i) is int]
        self.bound = list(dict.fromkeys(i[0] for i in program.inputs if type(i) is not int))
        fields = [
            (i, n) for i in self.bound for n in range(sum(type(j) is not int and j[0] == i for j in program.inputs))
        ]
        assert program.inputs == [*self.plain, *fields], "akvq: buffers of a packed tensor are not in order"

    def __call__(self, *args):
        program = self.program
        self.know_weights(args)
        for cache in program.plain:
            refuse_misread(args[cache.weight], args[cache.past], cache.label)
        if self.starts_call and program.vision is None or program.packed:
            vision_carry.put(None)
        storages = self.open(args)
        if program.unpacked:
            args = list(args)
            for i in program.unpacked:
                args[i] = args[i].unpack()
        inputs = [args[i] for i in self.plain]
        if program.vision == "take":
            batch, tokens = (size(args) for size in program.vision_size)
            inputs.append(vision_carry.take(batch, tokens, self.device(args)))
        for position in self.bound:
            inputs += storages[position].buffers
        if program.packed:
            with torch.no_grad():
                results = list(self.inner(*inputs))
        else:
            results = list(self.inner(*inputs))
        if program.vision == "make":
            vision_carry.put(results.pop().detach())
        out = self.close(args, storages, results)
        for cache in program.plain:
            if HISTORY.is_folded(args[cache.weight]):
                for i in cache.results:
                    HISTORY.caches[out[i]] = True
        return out

    def know_weights(self, args) -> None:
        """Fold what a prompt's graph needs folded, and know whose tokens are whose; skipped while the weights are the same."""
        for i, known, version in self.seen:
            if known() is not args[i] or version != version_of(args[i]):
                break
        else:
            if self.seen or not self.watched:
                return
        for fold in self.program.folds:
            bias = None if fold.value_bias is None else args[fold.value_bias]
            HISTORY.fold(args[fold.value_weight], Folded(bias, args[fold.output_weight], fold.rows, fold.columns))
        self.seen = [(i, weakref.ref(args[i]), version_of(args[i])) for i in self.watched]
        self.owner = {
            pair: None if None in pair else hash(tuple(HISTORY.fingerprint(args[i]) for i in pair))
            for pair in self.pairs
        }
        if self.on_weights is not None:
            self.on_weights(args)

    on_weights = None  # called with the arguments whenever other weights run this graph; the report listens

    def open(self, args) -> dict[int, Storage]:
        """Storages of the PackedKV arguments, fit to be written."""
        storages, owners, growth = {}, self.program.owners, self.growth
        for position in self.program.packed:
            packed = args[position]
            storage = packed.storage or packed._storage()
            expected = self.owner.get(owners.get(position))
            if storage.owner != expected and None not in (storage.owner, expected):
                raise ValueError(
                    f"akvq: the packed cache of shape {list(packed.shape)} was made by other weights than the ones that "
                    "continue it (another model or layer, or weights changed, folded or unfolded since); "
                    "start with an empty cache"
                )
            tokens = growth.get(position)
            if tokens is not None:
                count = tokens.constant if tokens.constant is not None else tokens(args)
                storage = packed.writable(count, self.step)
                storage.end = packed.length + count
            storages[position] = storage
        return storages

    def close(self, args, storages, results) -> tuple:
        out, views, slots, i = [], {}, {}, 0
        for spec in self.program.outputs:
            if spec is None:
                out.append(results[i])
                i += 1
            elif type(spec) is Appended:
                storage = storages[spec.arg]
                view = args[spec.arg] if storage.end is None else views.get(spec.arg)
                if view is None:
                    view = views[spec.arg] = PackedKV.view_of(storage, storage.end)
                out.append(view)
            else:
                if id(spec) not in views:
                    count = len(spec.layout.fields)
                    views[id(spec)] = wrap(spec, results[i : i + count], args, self.owner.get(spec.owner), slots)
                    i += count
                out.append(views[id(spec)])
        return tuple(out)

    def device(self, args):
        return next(a.device for a in args if isinstance(a, torch.Tensor))


def wrap(spec: Packed, buffers: list, args, owner, slots: dict[str, tuple]) -> PackedKV:
    """slots: of this call's text tokens by Packed.classes, so that the device is asked once for all layers."""
    length, prompt = spec.length(args), spec.prompt(args)
    storage = Storage(spec.layout, [b.detach() for b in buffers], None if spec.static else length, prompt, owner)
    # a static cache may be written again from its start: its slots stay positions
    if spec.layout.text_bits and not spec.static:
        if spec.classes not in slots:
            slots[spec.classes] = text_slots(storage["text_at"], prompt)
        storage.compact_text(prompt, slots[spec.classes])
    storage.mark_dynamic()
    return PackedKV.view_of(storage, length)


def refuse_misread(weight: torch.Tensor, past: torch.Tensor, label: str) -> None:
    """Raises ValueError for a plain cache whose tokens were made before the weight's fold was put in, or taken out."""
    folded = HISTORY.is_folded(weight)
    if not past.numel() or isinstance(past, PackedKV) or folded == (past in HISTORY.caches):
        return
    if not folded:
        raise ValueError(
            f"akvq: {label} got a plain 16-bit cache of values that were rotated by its weights, which are unfolded since; "
            "start with an empty cache"
        )
    raise ValueError(
        f"akvq: {label} got a plain 16-bit cache, but the value rotation is folded into "
        f"its weights since; values cached before "
        "the fold would be misread. Start with an empty cache, or call akvq_fx.unfold(model) and compile with "
        "options={'value_rotation': 'online'}"
    )
