"""Compression inside the LLM: compressors act before their layers, and all later layers see only the result.

Before layer K, merged hidden states are written at their group's anchor, and those of dropped tokens are removed.
From layer K on, hidden states, position tables, mask and KV cache are shorter; tokens keep their positions. The rest
keeps its full length: the prompt, its mask, and the cache of the layers before K, from which transformers counts
positions.

A compressor that restores tokens (VCC) acts on single layers instead: each layer from K on sees only its result, and
all tokens come back after the layer.

The files, in the order of the data's path: `prompt` (the input), `state` (one call), `step` (one forward of the LLM),
`images` and `question` (the input of a compressor), `cut` and `masks` (the input of later layers), `restore` (their
output, if tokens come back), `outcome` (report and loss). `plan` lists the compressors and their layers, `hooks`
connects all this to the layers, and `indices` has the table of index spaces.
"""
