"""The entry point of the plugin, in the group `vllm.general_plugins`. Only vLLM imports this module."""

from __future__ import annotations

import functools
from typing import Any

import vllm
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.logger import init_logger

from vlmzip.serving.vllm.start import VERSIONS, check_version, is_known, resolve
from vlmzip.version import __version__

logger = init_logger(f"vllm.{__name__}")

#: The classes of the plugin by the architecture that they replace. Without a compressor they do what the stock class
#: does. vLLM imports a class when a checkpoint has its architecture.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "vlmzip.serving.vllm.llava:LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "vlmzip.serving.vllm.llava_next:LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": (
        "vlmzip.serving.vllm.llava_onevision:LlavaOnevisionForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": "vlmzip.serving.vllm.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "vlmzip.serving.vllm.qwen3_vl:Qwen3VLForConditionalGeneration",
}
#: The method of `ModelConfig` that vLLM calls as soon as the checkpoint's config and `--hf-overrides` are read.
CHECKED_AT = "get_model_arch_config"


def register() -> None:
    """Register the plugin's models. vLLM calls this in each of its processes, perhaps more than once.

    In a version of vLLM that the plugin was not checked on, replace no class, and refuse a compressor.
    """
    original = getattr(ModelConfig, CHECKED_AT, None)
    if original is None:
        check_version(vllm.__version__)
    elif not hasattr(original, "checks_compressor"):
        setattr(ModelConfig, CHECKED_AT, _with_check(original))
    if not is_known(vllm.__version__):
        logger.warning("vlmzip's plugin works with vLLM %s; this is %s", " and ".join(VERSIONS), vllm.__version__)
        return
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
    logger.info("vlmzip %s can compress images in %s", __version__, ", ".join(ARCHITECTURES))


def _with_check(original: Any) -> Any:
    """Return the method with a check of the compressor before it."""

    @functools.wraps(original)
    def get_model_arch_config(model_config: Any) -> Any:
        resolve(model_config, ARCHITECTURES, vllm.__version__)
        return original(model_config)

    get_model_arch_config.checks_compressor = True  # type: ignore[attr-defined]
    return get_model_arch_config
