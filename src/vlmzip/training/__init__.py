"""Training with compression, files along the data's path.

`config` what a run is · `schedule` which compressor when · `records` and `batches` from JSON to tensors · `trainer`
steps, evaluation, checkpoints · `explain` what a schedule costs, before a step is taken.
"""

from vlmzip.noise import silence_bitsandbytes

silence_bitsandbytes()
