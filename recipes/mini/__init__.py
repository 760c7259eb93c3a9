"""The training of mini, in the order of the data's path.

`sources` reads photos. `targets`, `tokenizer` and `packing` turn drawn scenes into training data. `recipe` has all
numbers and `model` the initial weights. `encoder` and `instruct` are the training stages; `loop` and `processes` run
them. `train` is the command, `export` writes the shipped folder, and `evaluate` measures the model.

`conversations` and `base` make the data and the model that `vlmzip train configs/mini.yaml` starts from. `examples`
draws the images of the documents.
"""
