"""One engine for all tests: starting vLLM takes longer than the tests."""

import os

import pytest

# vLLM reads these when it is imported. One process, so that a failing test shows its traceback.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="session")
def start():
    """Return a function that starts mini in vLLM with a compressor."""
    vllm = pytest.importorskip("vllm")
    from vlmzip import mini

    def start(compressor=None, **settings):
        overrides = {} if compressor is None else {"vlmzip": compressor}
        usual = {
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "enforce_eager": True,
            "limit_mm_per_prompt": {"image": 4},
            "logprobs_mode": "raw_logits",  # tests compare the logits of all words
            "max_logprobs": -1,
        }
        model = settings.pop("model", mini.weights_folder())
        return vllm.LLM(str(model), **usual | settings, hf_overrides=overrides)

    return start


@pytest.fixture(scope="session")
def engine(start):
    """mini in vLLM; a request chooses its compressor."""
    return start("no_compression")
