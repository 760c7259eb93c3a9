"""How mini was made, in the order of the data's path.

`sources` reads photos, `targets`, `tokenizer` and `packing` make training data of drawn scenes, `recipe` has every
number, `model` the starting weights, `encoder` and `instruct` the stages, `loop` and `processes` run them, `train` is
the command, `export` writes the folder that ships, `evaluate` measures it. `conversations` and `base` make what
`vlmzip train configs/mini.yaml` starts from; `examples` draws the images of the documents.
"""
