"""Registration, versions, and attention heads that several processes share."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlavaConfig, PixtralVisionConfig

vllm = pytest.importorskip("vllm")

from vllm.config import ModelConfig  # noqa: E402

from tests.serving.vllm import qwen as qwen_models  # noqa: E402
from vlmzip import UserError, spec  # noqa: E402
from vlmzip.models.recording import Recording  # noqa: E402
from vlmzip.models.towers.tower import Attention  # noqa: E402
from vlmzip.serving.server import vllm_command  # noqa: E402
from vlmzip.serving.vllm import engine, llava, plugin, qwen, start  # noqa: E402
from vlmzip.visual_tokens import Grid, Signal  # noqa: E402


def test_registering_twice_is_registering_once():
    plugin.register()
    checked = ModelConfig.get_model_arch_config
    plugin.register()
    assert ModelConfig.get_model_arch_config is checked
    for architecture, path in plugin.ARCHITECTURES.items():
        registered = vllm.ModelRegistry.models[architecture]
        assert f"{registered.module_name}:{registered.class_name}" == path


PIXTRAL = LlavaConfig(vision_config=PixtralVisionConfig(), architectures=["LlavaForConditionalGeneration"])
QWEN = qwen_models.qwen2_5_vl()[1]
QWEN.architectures = ["Qwen2_5_VLForConditionalGeneration"]
LLAVA = LlavaConfig(architectures=["LlavaForConditionalGeneration"])


@pytest.mark.parametrize(
    ("config", "compressor", "reason"),
    [
        (LLAVA, "dfmr", None),
        (LLAVA, "visionzip(keep=10,positions=original)", "leaves gaps between positions"),
        (QWEN, "visionzip(keep=10,positions=original)", None),
        (QWEN, "dfmr", None),
        (QWEN, "zoo_prune(keep=9)", "does not map each token by itself"),
        (PIXTRAL, "visionzip(keep=10)", "vision encoders of type pixtral are not supported yet"),
    ],
)
def test_serve_and_vllm_refuse_the_same(monkeypatch, tmp_path, config, compressor, reason):
    monkeypatch.setattr(vllm_command, "version", lambda name: vllm.__version__)
    config.save_pretrained(tmp_path)
    against = vllm_command.reason_against_vllm(str(tmp_path), spec.read(compressor))
    model_config = SimpleNamespace(
        model=str(tmp_path), revision=None, model_impl="auto", hf_overrides={"vlmzip": compressor},
        hf_config=AutoConfig.from_pretrained(tmp_path),
    )  # fmt: skip
    if reason is None:
        assert against is None
        start.resolve(model_config, plugin.ARCHITECTURES, vllm.__version__)
        return
    assert reason in against
    with pytest.raises(UserError) as refused:
        start.resolve(model_config, plugin.ARCHITECTURES, vllm.__version__)
    assert str(refused.value) == against


def test_in_another_version_no_class_is_replaced(monkeypatch):
    registered = []
    monkeypatch.setattr(plugin.ModelRegistry, "register_model", lambda *names: registered.append(names))
    plugin.register()
    assert len(registered) == len(plugin.ARCHITECTURES)
    monkeypatch.setattr(plugin.vllm, "__version__", "0.40.1")
    plugin.register()
    assert len(registered) == len(plugin.ARCHITECTURES)
    monkeypatch.setattr(plugin, "CHECKED_AT", "a_method_that_is_gone")
    with pytest.raises(UserError, match=r"works with vLLM 0\.32 and 0\.33, and this is 0\.40\.1"):
        plugin.register()


@pytest.mark.parametrize("signal", [Signal.CLS_ATTENTION, Signal.KEYS, Signal.ATTENTION_RECEIVED])
def test_processes_that_share_the_heads_get_the_signal_of_all(monkeypatch, signal):
    """Two processes with half of the heads each. The sum over processes is the other's signal added to one's own."""
    heads, width, grid = 4, 8, Grid(1, 3, 3)
    parts = [torch.randn(2, 1 + grid.size, heads, width) for _ in range(3)]

    def of(chosen, processes):
        states = torch.cat([part[:, :, chosen].flatten(2) for part in parts], -1)
        tower = engine.EngineTower(torch.nn.Identity(), 1)
        module = torch.nn.Identity()
        module.tp_size = processes
        tower.attentions = [Attention(module, module, (module,), states.shape[-1] // 3 // width, width, 0.5)]
        recording = Recording({"0.0": states}, {}, {"0": {}})
        return tower.signal(signal, recording, 0, [grid, grid], 1)

    halves = [slice(0, 2), slice(2, 4)]
    monkeypatch.setattr(engine, "tensor_model_parallel_all_reduce", lambda values: values)
    other = 2 * of(halves[1], 2)  # not divided by the number of processes
    monkeypatch.setattr(engine, "tensor_model_parallel_all_reduce", lambda values: values + other)
    assert torch.allclose(of(halves[0], 2), of(slice(0, 4), 1), atol=1e-6)


def test_a_projector_with_packed_weights_gets_the_dtype_of_the_model():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 4, dtype=torch.int32), requires_grad=False)

        def forward(self, features):
            return features @ self.weight.to(features.dtype).T if features.dtype is torch.bfloat16 else None

    parts = torch.nn.Module()
    parts.multi_modal_projector, parts.compute_dtype = Packed(), torch.bfloat16
    projected = llava.family_of(LlavaConfig(), parts)._projector_of_tokens()(torch.ones(1, 3, 4))
    assert torch.equal(projected, torch.full((1, 3, 2), 4.0))


SIGNALS = [Signal.CLS_ATTENTION, Signal.KEYS, Signal.ATTENTION_RECEIVED, Signal.LAST_CLS_ATTENTION, Signal.LAST_KEYS]


@pytest.mark.parametrize("signal", SIGNALS)
def test_qwen_gets_the_heads_of_all_processes(monkeypatch, signal):
    heads, width, length = 4, 8, 24
    parts = [torch.randn(length, 1, heads, width) for _ in range(3)]
    tables = {f"rotary_pos_emb_{name}": torch.randn(length, width // 2) for name in ("cos", "sin")}
    arguments = {"0": tables | {"cu_seqlens": torch.tensor([0, 8, length])}}

    def of(chosen, processes):
        states = torch.cat([part[:, :, chosen].flatten(2) for part in parts], -1)
        module, block = torch.nn.Module(), torch.nn.Module()
        module.num_attention_heads_per_partition, module.tp_size = heads // processes, processes
        module.hidden_size_per_attention_head, module.qkv, block.attn = width, torch.nn.Identity(), module
        encoder = torch.nn.Module()
        encoder.blocks = torch.nn.ModuleList([block])
        tower = qwen.EngineQwenTower(encoder)
        return tower.signal(signal, Recording({"0.0": states}, {}, arguments), 0, [Grid(1, 1, 2), Grid(1, 2, 2)], 0)

    second = itertools.cycle(part[:, :, 2:].flatten(2).transpose(0, 1) for part in parts[:2])  # queries, then keys
    monkeypatch.setattr(qwen, "tensor_model_parallel_all_gather", lambda part: torch.cat([part, next(second)], -1))
    assert torch.allclose(of(slice(0, 2), 2), of(slice(0, 4), 1), atol=1e-6)
