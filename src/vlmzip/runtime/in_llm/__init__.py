"""Inside the LLM: what compressors decide at their layers, and what every later layer sees of it.

At layer K the hidden states of dropped tokens go, and merged states are written at their group's anchor. From there on
hidden states, position tables, mask and KV cache are shorter; tokens keep their positions. Outside the LLM everything
keeps its full length: prompt, mask, and the cache of the layers before K, from which transformers counts positions.

The files along the data's path: `prompt` (what goes in), `state` (a call), `step` (one forward of the LLM), `images`
and `question` (what a compressor looks at), `cut` and `masks` (what later layers get), `outcome` (report and loss).
`hooks` bring all this to the layers; `indices` has the table of index spaces.
"""
