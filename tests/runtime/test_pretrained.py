"""Model folders that are broken in one place: a line that says where, from the commands and from the library."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlmzip
from tests.families import save_checkpoint, tiny_llava
from vlmzip import UserError, VisionZip
from vlmzip.cli.main import main
from vlmzip.errors import refusing
from vlmzip.runtime import pretrained
from vlmzip.runtime.loading import find_device, load

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A checkpoint to break."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


REMOVED = object()


def change(path, *keys, to=REMOVED):
    """Set a setting of a JSON file, or remove it."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner.pop(keys[-1], None) if to is REMOVED else inner.update({keys[-1]: to})
    path.write_text(json.dumps(content))


def change_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def refused_by_both(folder, message):
    """Both ways to load raise the same; returns what they say."""
    for way in (lambda: load(str(folder), "cpu"), lambda: vlmzip.from_pretrained(folder, VisionZip(keep=4))):
        with pytest.raises(UserError, match=message) as error:
            way()
        assert "\n" not in str(error.value)


class TestWeights:
    def test_more_layers_than_the_config_has(self, folder):
        change(folder / "config.json", "text_config", "num_hidden_layers", to=2)
        refused_by_both(
            folder, r"has 18 weights that the model .* lacks, such as model\.language_model\.layers\.2\.\S+;"
        )

    def test_fewer_layers_than_the_config_has(self, folder):
        change(folder / "config.json", "text_config", "num_hidden_layers", to=5)
        refused_by_both(folder, r"lacks 9 of its weights, such as model\.language_model\.layers\.4\.\S+;")

    @pytest.mark.parametrize(
        ("keys", "value"), [(("text_config", "vocab_size"), 120), (("vision_config", "intermediate_size"), 32)]
    )
    def test_another_shape(self, folder, keys, value):
        change(folder / "config.json", *keys, to=value)
        refused_by_both(
            folder, r"has \d weights of another shape than in the model of its config.json, such as \S+: \[\d+"
        )

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (("text_config", "num_hidden_layers"), 10**6, "98 weights, and its config.json says 1,000,000 layers"),
            (("vision_config", "num_hidden_layers"), 10**6, "98 weights, and its config.json says 1,000,000 layers"),
            (("vision_config", "num_channels"), 10**6, "the model of its config.json has 2,048,"),
        ],
    )
    def test_a_much_larger_config_takes_no_memory(self, folder, keys, value, message):
        change(folder / "config.json", *keys, to=value)
        refused_by_both(folder, message)

    def test_another_shape_can_be_asked_for_in_python(self, folder):
        change(folder / "config.json", "text_config", "vocab_size", to=120)
        compressed = vlmzip.from_pretrained(folder, VisionZip(keep=4), ignore_mismatched_sizes=True)
        assert len(compressed.get_input_embeddings().weight) == 120

    def test_what_old_checkpoints_hold_beside_their_weights_is_no_fault(self, folder):
        buffers = {
            "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.language_model.rotary_emb.inv_freq": torch.ones(4),
            "model.vision_tower.embeddings.position_ids": torch.arange(37),
        }
        change_weights(folder, lambda weights: weights.update(buffers))
        load(str(folder), "cpu")

    @pytest.mark.parametrize("both", [True, False])
    def test_tied_embeddings_may_be_there_once_or_twice(self, folder, both):
        model = tiny_llava(tie_word_embeddings=True)
        model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
        if both:
            embeddings = model.get_input_embeddings().weight.detach().clone()
            change_weights(folder, lambda weights: weights.update({"lm_head.weight": embeddings}))
        loaded = load(str(folder), "cpu").model
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight

    def test_pickled_weights_are_read_only_where_they_are_allowed(self, folder):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        load(str(folder), "cpu")  # the safe ones are taken
        (folder / WEIGHTS).unlink()
        refused_by_both(folder, r"only pickled weights \(pytorch_model.bin\).*--allow-pickle \(use_safetensors=False")
        load(str(folder), "cpu", allow_pickle=True)
        vlmzip.from_pretrained(folder, VisionZip(keep=4), use_safetensors=False)

    def test_files_that_are_cut_missing_or_something_else(self, folder):
        content = (folder / WEIGHTS).read_bytes()
        for broken in (b"", content[:5], content[:100], content[: len(content) // 2], b"x" * 1000):
            (folder / WEIGHTS).write_bytes(broken)
            refused_by_both(folder, "cannot load")
        (folder / WEIGHTS).unlink()
        refused_by_both(folder, "cannot load .*safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        refused_by_both(folder, "cannot load .*model-00001-of-00002.safetensors")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's call
class TestLoras:
    @pytest.fixture
    def lora(self, tmp_path):
        """A folder of LoRA weights alone, around the whole checkpoint."""
        peft = pytest.importorskip("peft")
        on_queries = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
        peft.get_peft_model(tiny_llava(), on_queries).save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    def test_one_alone_is_refused_by_its_name(self, lora):
        refused_by_both(lora, "has LoRA weights without a model")

    def test_one_beside_the_weights_that_it_changes(self, folder, lora):
        shutil.copytree(lora, folder, dirs_exist_ok=True)
        loaded = load(str(folder), "cpu").model
        assert any("lora" in name for name, _ in loaded.named_parameters())

    def test_one_beside_a_config_without_weights(self, folder, lora):
        (folder / WEIGHTS).unlink()
        shutil.copytree(lora, folder, dirs_exist_ok=True)
        refused_by_both(folder, "cannot load .*no file named model.safetensors")


class TestConfigs:
    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (("text_config", "hidden_act"), "unheard-of", "cannot load .*unheard-of"),
            (("text_config", "num_hidden_layers"), "four", "cannot load .*num_hidden_layers"),
            (("dtype",), "floaty", "cannot load .*floaty"),
            (("vision_config", "model_type"), "unheard-of", "cannot load .*unheard-of"),
            (("quantization_config",), {"quant_method": "gptq", "bits": 4}, "cannot load .*: failed with"),
            (("vision_feature_layer",), 9, r"vision_feature_layer=9: the encoder has 3 layers; give one of -3 to 3"),
        ],
    )
    def test_a_setting_that_cannot_be(self, folder, keys, value, message):
        change(folder / "config.json", *keys, to=value)
        refused_by_both(folder, message)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\0"])
    def test_no_settings_at_all(self, folder, text):
        (folder / "config.json").write_text(text)
        refused_by_both(folder, "cannot load")

    @pytest.mark.parametrize(
        ("setting", "value"), [("eos_token_id", "x"), ("eos_token_id", [2, 5000]), ("pad_token_id", 1.5)]
    )
    def test_tokens_that_there_cannot_be(self, folder, setting, value):
        change(folder / "generation_config.json", setting, to=value)
        refused_by_both(folder, f"{setting}=.* in its generation config; token ids are 0 to 99")

    def test_code_of_the_checkpoint_is_never_run(self, folder):
        (folder / "own.py").write_text("raise SystemExit('ran')")
        change(
            folder / "config.json", "auto_map", to={"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.M"}
        )
        load(str(folder), "cpu")
        change(folder / "config.json", "model_type", to="unheard-of")
        refused_by_both(folder, "does not support the model type 'unheard-of'")


class TestProcessors:
    def refused(self, folder, message):
        with pytest.raises(UserError, match=message) as error:
            load(str(folder), "cpu")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "template", ["{% if %}", "{{ raise_exception('no') }}", "{{ unheard_of.of }}", "{{ 1 / 0 }}"]
    )
    def test_a_broken_chat_template(self, folder, template):
        (folder / "chat_template.jinja").write_text(template)
        self.refused(folder, "cannot use .*: the chat template cannot be used")

    def test_a_chat_template_that_leaves_the_image_out(self, folder):
        (folder / "chat_template.jinja").write_text("USER:")
        self.refused(folder, "cannot use .*: its processor (refuses an image|writes 0 placeholders)")

    @pytest.mark.parametrize(
        ("file", "content"),
        [(file, text) for file in ("tokenizer.json", "processor_config.json") for text in (None, "", "[]", '{"a": 1}')]
        + [("tokenizer_config.json", text) for text in ("", "[]", "{")],
    )
    def test_files_that_are_missing_or_broken(self, folder, file, content):
        (folder / file).unlink() if content is None else (folder / file).write_text(content)
        self.refused(folder, f"'{folder}'")

    @pytest.mark.parametrize(
        ("keys", "value"),
        [
            (("patch_size",), 16),
            (("patch_size",), 0),
            (("num_additional_image_tokens",), "one"),
            (("image_processor", "image_mean"), [0.5]),
            (("image_processor", "size"), "large"),
        ],
    )
    def test_settings_that_do_not_fit_the_model(self, folder, keys, value):
        change(folder / "processor_config.json", *keys, to=value)
        self.refused(folder, "cannot")

    @pytest.mark.parametrize("setting", ["size", "crop_size"])
    @pytest.mark.parametrize("value", [10**6, {"height": 10**6, "width": 48}, {"shortest_edge": 10**6}])
    def test_images_that_would_fill_the_memory(self, folder, setting, value):
        change(folder / "processor_config.json", "image_processor", setting, to=value)
        self.refused(folder, f"its processor makes images of {setting}=.*, more than 8,192")

    def test_a_panic_of_the_tokenizers_library_is_a_line(self):
        class PanicException(BaseException):
            pass

        with (
            pytest.raises(UserError, match="cannot load: failed with PanicException: boom"),
            refusing("cannot load"),
        ):
            raise PanicException("boom")
        with pytest.raises(KeyboardInterrupt), refusing("cannot load"):
            raise KeyboardInterrupt


class TestPadTokens:
    def test_one_from_the_config(self, folder):
        change(folder / "tokenizer_config.json", "pad_token")
        assert load(str(folder), "cpu").processor.tokenizer.pad_token == "<pad>"

    def test_the_end_of_text(self, folder):
        change(folder / "tokenizer_config.json", "pad_token")
        change(folder / "config.json", "text_config", "pad_token_id")
        assert load(str(folder), "cpu").processor.tokenizer.pad_token == "</s>"

    @pytest.mark.parametrize("ends", [2, [2, 5]])
    def test_the_end_of_text_of_the_config(self, folder, ends):
        for token in ("pad_token", "eos_token"):
            change(folder / "tokenizer_config.json", token)
        change(folder / "config.json", "text_config", "pad_token_id", to=None)
        change(folder / "config.json", "text_config", "eos_token_id", to=ends)
        assert load(str(folder), "cpu").processor.tokenizer.pad_token == "</s>"

    def test_any_other_where_there_is_no_end_either(self, folder):
        for token in ("pad_token", "eos_token"):
            change(folder / "tokenizer_config.json", token)
        for token in ("pad_token_id", "eos_token_id"):
            change(folder / "config.json", "text_config", token, to=None)
        assert load(str(folder), "cpu").processor.tokenizer.pad_token == "<pad>"  # number 0

    def test_no_token_at_all(self, folder):
        change(folder / "config.json", "text_config", "vocab_size", to=0)
        with pytest.raises(UserError, match="the tokenizer has 100 tokens, and the config's vocab_size is 0"):
            load(str(folder), "cpu")

    def test_one_that_the_model_has_no_embedding_for(self, folder):
        change(folder / "tokenizer_config.json", "pad_token", to="[PAD]")  # a new token, number 100
        assert load(str(folder), "cpu").processor.tokenizer.pad_token == "<pad>"


class TestDiagnosis:
    """What only an answer brings to light: transformers alone fails, too."""

    @pytest.fixture
    def ask(self, folder, tmp_path):
        Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
        return ["ask", str(tmp_path / "image.png"), "w4", "--model", str(folder), "--device", "cpu"]

    def test_a_model_that_fails_without_vlmzip_is_a_line(self, folder, ask, capsys):
        """The encoder is for 48 x 48 pixels."""
        change(folder / "processor_config.json", "image_processor", "size", to={"height": 96, "width": 96})
        assert main(ask) == 2
        err = capsys.readouterr().err
        assert "cannot answer, not even without compression: failed with ValueError: Input image size" in err
        assert err.count("\n") == 1

    def test_quantised_weights_that_the_device_cannot_use_are_named(self, folder, ask, capfd):
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        change(folder / "config.json", "quantization_config", to=settings)
        assert main([*ask, "--dtype", "float32"]) == 2
        err = capfd.readouterr().err
        assert "not even without compression, with weights quantised by bitsandbytes on cpu: failed with" in err
        assert err.count("\n") == 1

    def test_a_defect_of_our_own_is_a_traceback(self, ask, monkeypatch):
        monkeypatch.setattr(VisionZip, "assign", lambda *_: {}["defect"])
        with pytest.raises(KeyError, match="defect"):
            main(ask)


@pytest.mark.parametrize("name", ["meta", "", "warp", "cuda:99", "mkldnn", "vulkan", "hpu", "cpu:x"])
def test_devices_that_nothing_can_run_on(name):
    with pytest.raises(UserError, match=r"--device .* cannot be used") as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_a_defect_of_our_own_is_not_taken_for_the_checkpoints(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "_refuse_wrong_weights", lambda *_, **__: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        load(str(folder), "cpu")
