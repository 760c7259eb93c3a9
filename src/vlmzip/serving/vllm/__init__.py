"""A plugin for vLLM: images and videos are compressed before the LLM.

`plugin` is the entry point. `start` reads the compressor and refuses what cannot run, `setting` is a compressor on its
way through the engine, `processor` counts placeholders, `model` encodes and compresses. `engine` lets a family find the
engine's tensors. One file per model follows.
"""
