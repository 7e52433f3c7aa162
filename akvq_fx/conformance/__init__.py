"""Does it work with ...? python -m akvq_fx.conformance answers for families of transformers and hand-written caches."""
