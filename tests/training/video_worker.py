"""One process of `test_video_processes.py`: it trains a tiny Video-LLaVA from a configuration.

Its processor takes videos without torchvision. The processes of a run that takes longer than `PATIENCE` seconds are
waiting for each other; they end with their tracebacks.
"""

import faulthandler
import sys

from torch import distributed

from tests.training.videos import processor_with_videos
from vlmzip.cli.main import main
from vlmzip.runtime import pretrained

PATIENCE = 120

if __name__ == "__main__":
    processor = processor_with_videos("video_llava")
    processor.save_pretrained = lambda folder: processor.tokenizer.save_pretrained(folder)
    pretrained.load_processor = lambda *_: processor
    for config in sys.argv[1:]:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if main(["train", config]) != 0:
            sys.exit(1)
    if distributed.is_initialized():
        distributed.destroy_process_group()  # threads of gloo that run at the exit may end the process with an error
