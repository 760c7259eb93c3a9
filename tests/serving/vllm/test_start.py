"""What vLLM refuses when it starts, and what a request may not ask for."""

from types import SimpleNamespace

import pytest

from vlmzip import Grid, UserError, VisionZip, spec
from vlmzip.compressor import Profile
from vlmzip.compressor_file import write_compressor
from vlmzip.models.layout import Layout
from vlmzip.serving.vllm import setting, start
from vlmzip.serving.vllm.trial import for_trial, try_out


class StandIn:
    """A stand-in for a model class of the plugin, whose modules need vLLM."""

    @staticmethod
    def family_class(config):
        return SimpleNamespace(profile=lambda: Profile(Grid(1, 24, 24), 4))


ARCHITECTURES = {"LlavaForConditionalGeneration": f"{__name__}:StandIn"}


def model_config(model="mini", architecture="LlavaForConditionalGeneration", overrides=None, **hf):
    """A stand-in for vLLM's `ModelConfig`; vLLM puts overrides into the checkpoint's config."""
    hf_config = SimpleNamespace(architectures=[architecture], vision_config=object(), **hf, **(overrides or {}))
    return SimpleNamespace(
        model=str(model), revision=None, model_impl="auto", hf_overrides=overrides or {}, hf_config=hf_config
    )


def resolved(config, version="0.32.0"):
    start.resolve(config, ARCHITECTURES, version)
    return getattr(config.hf_config, "vlmzip", None)


def test_without_a_compressor_nothing_changes(tmp_path):
    config = model_config(tmp_path)
    before = dict(vars(config.hf_config))
    assert resolved(config, version="9.9") is None
    assert vars(config.hf_config) == before


def test_a_compressor_comes_from_the_overrides_the_config_or_the_file(tmp_path):
    assert resolved(model_config(overrides={"vlmzip": "visionzip(keep=0064)"})) == "visionzip(keep=64)"
    assert resolved(model_config(vlmzip="visionzip( keep = 32 )")) == "visionzip(keep=32)"
    write_compressor(VisionZip(keep=16), tmp_path)
    assert resolved(model_config(tmp_path)) == "visionzip(keep=16)"
    assert resolved(model_config(overrides={"vlmzip": str(tmp_path)})) == "visionzip(keep=16)"
    assert resolved(model_config(tmp_path, overrides={"vlmzip": "pool2d"})) == "pool2d"  # the overrides come first


def test_a_checkpoint_cannot_name_code(tmp_path):
    with pytest.raises(UserError, match=r"unknown method 'os\.path:Class'"):
        resolved(model_config(vlmzip="os.path:Class"))


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_another_version_is_refused(version):
    with pytest.raises(UserError, match=rf"works with vLLM 0\.32 and 0\.33, and this is {version}"):
        resolved(model_config(overrides={"vlmzip": "visionzip"}), version)


def test_a_model_that_the_plugin_lacks_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not have InternVLChatModel; it has LlavaForConditionalGeneration"):
        resolved(model_config(architecture="InternVLChatModel", overrides={"vlmzip": "visionzip"}))
    write_compressor(VisionZip(), tmp_path)
    with pytest.raises(UserError, match=r"Start without vlmzip and without compressor\.json"):
        resolved(model_config(tmp_path, architecture="InternVLChatModel"))


@pytest.mark.parametrize("model", ["org/name:Q4_0", "s3://bucket/model", "/no/such.gguf", "nobody/has-this-model"])
def test_a_model_that_the_hub_does_not_know_starts_without_a_compressor(model, caplog, monkeypatch):
    monkeypatch.setattr(start, "cached_file", unknown_to_the_hub)
    assert resolved(model_config(model)) is None
    assert "does not find a compressor.json" in caplog.text
    assert "this is no model" in caplog.text


def unknown_to_the_hub(*args, **kwargs):
    raise OSError("this is no model\nof the Hub")


def test_the_hub_is_not_asked_about_a_model_that_the_plugin_lacks(monkeypatch):
    asked = []
    monkeypatch.setattr(start, "cached_file", lambda *args, **kwargs: asked.append(args))
    assert resolved(model_config("org/name", architecture="InternVLChatModel")) is None
    assert not asked
    assert resolved(model_config("org/name")) is None
    assert len(asked) == 1


def test_transformers_classes_are_refused():
    config = model_config(overrides={"vlmzip": "visionzip"})
    config.model_impl = "transformers"
    with pytest.raises(UserError, match="needs vLLM's own model class, got model_impl='transformers'"):
        resolved(config)


@pytest.mark.parametrize(
    ("compressor", "reason"),
    [
        ("fastv(keep=64)", "acts at site 'in_llm': all layers"),
        ("visionzip(keep=64)+fastv(keep=9)", "fastv acts at site 'in_llm'"),
        ("downsample(keep=25%)", "acts at site 'pixels': vLLM's vision encoders take images of one size"),
        ("tome(keep=64)", "acts at site 'encoder'"),
        ("cdpruner(keep=64)", "reads the question"),
        ("mmtok(keep=64)", "reads the question"),
        ("qformer(queries=64)", "has trained weights"),
        ("visionzip(keep=64,positions=original)", 'positions="original" leaves gaps'),
        ("visionzip(keep=64)+pool2d(site=post_projector)", "pool2d needs tokens that lie on a grid"),
        ("divprune(keep=64,site=pre_projector)+evs(keep=50%)", "evs needs tokens that lie on a grid"),
    ],
)
def test_what_vllm_cannot_run_is_refused_with_the_reason(compressor, reason):
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        resolved(model_config(overrides={"vlmzip": compressor}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "unknown method 'nonsense'"),
        ("visionzip(keep=-1)", "keep"),
        ("visionzip(keep=", "cannot be read as a method"),
        ("/etc/passwd", "unknown method '/etc/passwd'"),
        ("runs/compressor.json", "unknown method"),
        ("os.path:join", "unknown method 'os.path:join'"),
        ("visionzip+os.path:join", "unknown method 'os.path:join'"),
        ("kmeans(keep=9,iterations=1000000000)", "of kmeans, not iterations, which is set when the server starts"),
        ("fastv(keep=9)", "acts at site 'in_llm'"),
        ("scope(keep=9)", "cannot choose scope, whose time grows with k·N² for N tokens, unless the server was"),
        ("vispruner(keep=9)", "cannot choose vispruner, whose time grows with N³"),
        ("visionzip" * 1000, "must have at most 1000 characters"),
    ],
)
def test_a_request_names_methods_and_budgets_only(text, reason):
    with pytest.raises(UserError, match=reason):
        setting.read_request(text)


def test_a_request_can_set_a_budget():
    assert setting.read_request("visionzip(keep=32)") == VisionZip(keep=32)
    assert setting.read_request("pool2d(factor=3,site=post_projector)").name() == "pool2d"


def test_a_request_can_set_the_budget_of_a_slow_method_that_the_server_was_started_with():
    assert setting.read_request("vispruner(keep=9)", allowed_methods=frozenset({"vispruner"})).name() == "vispruner"


@pytest.mark.parametrize("compressor", ["no_compression+pool2d(site=post_projector)", "visionzip(keep=64)+divprune"])
def test_a_later_stage_may_act_on_tokens_with_or_without_a_grid(compressor):
    setting.check(spec.read(compressor))


def test_large_images_are_tried_with_fewer_tokens():
    large = Layout.of_one_view(Grid(1, 128, 40), 1)
    assert for_trial(large).views == (Grid(1, 32, 32),)
    assert for_trial(Layout.of_frames(Grid(1, 64, 8), 3)).views == (Grid(1, 32, 8),) * 3
    small = Layout.of_one_view(Grid(1, 24, 24))
    assert for_trial(small) is small
    try_out(VisionZip(keep=5), for_trial(large))


def test_a_text_survives_as_a_tensor():
    assert setting.from_tensor(setting.to_tensor("visionzip(keep=11%)")) == "visionzip(keep=11%)"


QWEN = "Qwen3VLForConditionalGeneration"


def resolved_for_qwen(compressor):
    config = model_config(architecture=QWEN, overrides={"vlmzip": compressor})
    start.resolve(config, {QWEN: f"{__name__}:StandIn"}, "0.32.0")
    return config


@pytest.mark.parametrize("compressor", ["visionzip(keep=64,positions=original)", "adaptive_visionzip"])
def test_positions_can_be_original_in_qwen(compressor):
    assert spec.read(resolved_for_qwen(compressor).hf_config.vlmzip) == spec.read(compressor)


@pytest.mark.parametrize(
    ("compressor", "reason"),
    [
        ("downsample(keep=25%)", "acts at site 'pixels': vLLM's own processor makes images smaller, with max_pixels"),
        (
            "zoo_prune(keep=9)",
            "zoo_prune cannot run here: the projector of this model does not map each token by itself",
        ),
        ("fastv(keep=64)", "acts at site 'in_llm'"),
    ],
)
def test_what_qwen_cannot_run_is_refused_with_the_reason(compressor, reason):
    with pytest.raises(UserError, match=reason):
        resolved_for_qwen(compressor)


def test_the_copy_of_a_checked_config_for_the_llm_is_not_checked_again():
    config = resolved_for_qwen("visionzip(keep=64)")
    config.hf_config.architectures = ["Qwen3ForCausalLM"]
    start.resolve(config, {QWEN: f"{__name__}:StandIn"}, "0.32.0")
    assert config.hf_config.vlmzip == "visionzip(keep=64)"
    unchecked = model_config(architecture="Qwen3ForCausalLM", vlmzip="visionzip(keep=64)", vlmzip_is_checked=True)
    with pytest.raises(UserError, match="does not have Qwen3ForCausalLM"):
        start.resolve(unchecked, {QWEN: f"{__name__}:StandIn"}, "0.32.0")


@pytest.mark.parametrize(
    ("compressor", "of_images", "of_patches"),
    [("adaptive_visionzip", True, True), ("prunesid(keep=9)", False, False), ("prumerge(keep=9)", True, False)],
)
def test_the_encoder_runs_in_the_processor_for_counts_by_content_and_signals_that_the_engine_lacks(
    compressor, of_images, of_patches
):
    profile = Profile(Grid(1, 8, 8), 4)
    for traits, expected in ((setting.DEFAULT, of_images), (setting.PATCHES, of_patches)):
        assert setting.needs_processor(spec.read(compressor), profile, traits) == expected
