"""The field's benchmarks, by way of lmms-eval: an adapter around any model with a compressor, and the papers' suites.

lmms-eval is imported in `adapter`, `registration` and `run` alone; the rest does not need it.
"""
