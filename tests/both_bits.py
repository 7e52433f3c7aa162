"""A dynamo backend for tests: each traced graph is compiled at 16 bits and at 2, so a model is traced once for both."""

from akvq_fx import PackedKV
from akvq_fx.backend import akvq


class BothBits:
    """`model.compile(backend=BothBits(options))`. `runs` says at which of `bits` the model runs; it may change between
    calls.

    A graph that takes packed caches is compiled only at the bits at which those were packed: dynamo traces it for each.
    """

    def __init__(self, options: dict, bits: tuple[int, ...] = (16, 2)):
        self.options, self.bits, self.runs = options, bits, bits[0]

    def __call__(self, gm, example_inputs):
        continues = any(isinstance(example, PackedKV) for example in example_inputs)
        programs = {
            bits: akvq(gm, example_inputs, options={**self.options, "body_bits": bits})
            for bits in ((self.runs,) if continues else self.bits)
        }
        return lambda *args: programs[self.runs](*args)
