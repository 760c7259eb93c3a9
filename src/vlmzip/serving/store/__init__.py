"""Encode images once, and ask about them often: their compressed tokens in files. Needs the extra `store`."""

from vlmzip.serving.store.reading import Store as Store
