"""Training with compression, files along the data's path.

`config` what a run is · `schedule` which compressor when · `records` and `batches` from JSON to tensors · `trainer`
steps, evaluation, checkpoints · `explain` what a schedule costs, before a step is taken.
"""

import logging


def _is_not_about_quantised_weights(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm")


# transformers' trainer imports peft, and peft imports bitsandbytes where it is installed, which then says what it lacks
# for 4-bit weights on a CPU. Nothing here has such weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_quantised_weights)
