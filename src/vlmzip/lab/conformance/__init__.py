"""Conformance: what works with each vision-language model of transformers, tried on tiny models with random weights."""
