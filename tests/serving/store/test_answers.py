"""Answers about stored images are those about the images themselves."""

import pytest
import torch

import vlmzip
from tests.serving.store.stores import loaded_of, noise_image, number_of, write, write_images
from vlmzip import UserError, VisionZip
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.prompt_text import chat_prompt
from vlmzip.serving.store import Store, encoding

#: Methods that leave tokens at different places, in different orders and of different numbers; with separators; twice.
METHODS = (
    "visionzip(keep=8)",
    "kmeans(keep=5)",
    "no_compression",
    "visionzip(keep=16)+kmeans(keep=6,site=post_projector)",
)
#: Families whose images cannot be stored, and why.
REFUSED = {"ovis2": "reads more than visual tokens", "paligemma": "writes images into prompts in a way"}
QUESTION = "w4 w5 w6"


@pytest.fixture(autouse=True)
def _known_words(monkeypatch):
    """Encode with a question whose words the tiny tokenizer knows."""
    monkeypatch.setattr(encoding, "QUESTION", "w7")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@torch.no_grad()
def run(compressed, inputs):
    """Return all that a prompt leads to: logits, the answer, and the report of where tokens went."""
    logits = compressed(**inputs).logits
    answer = compressed.generate(**inputs, max_new_tokens=6, do_sample=False)
    report = compressed.report
    return logits, answer, report.source, [(image.before, image.by_layer, image.row) for image in report.images]


def check_equal(loaded, store, rows, question=QUESTION, inside=(), method=None):
    """Compare answers to prompts about images with answers from the store, for which the encoder cannot run."""
    compressed = vlmzip.attach(loaded.model, method or store.compressor)
    answerer = Answerer(loaded.family, loaded.processor)
    flat = [noise_image(number_of(name)) for row in rows for name in row]
    expected = run(compressed, answerer.inputs(flat, [question] * len(rows)))
    prompts = [chat_prompt(loaded.family, loaded.processor, question, len(row)) for row in rows]
    from_store = store.attach(loaded, inside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded.family.vision_encoder, "forward", None)  # a call would raise an error
        result = run(from_store, store.inputs(loaded, prompts, rows))
    for ours, theirs in zip(result[:3], expected[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert result[3] == expected[3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.crossed(method=[METHODS[0]])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_equal(family, images, tmp_path, method):
    loaded = loaded_of(family)
    if family.name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family.name]):
            write(images, tmp_path, loaded, method)
        return
    write(images, tmp_path, loaded, method, batch=1)
    store = Store(tmp_path)
    check_equal(loaded, store, [["0.png"]])
    if store.manifest.takes_several:
        check_equal(loaded, store, [["more/2.png", "1.png"]])
    else:
        assert family.name == "llava_onevision"  # it cuts an image into tiles if the prompt has no other
        with pytest.raises(UserError, match="ask about one stored image"):
            check_equal(loaded, store, [["more/2.png", "1.png"]])


def test_several_prompts_are_padded_as_by_the_processor(family, images, tmp_path):
    if family.name in REFUSED:
        pytest.skip("cannot be stored")
    loaded = loaded_of(family)
    write(images, tmp_path, loaded, batch=3, shard=3)
    check_equal(loaded, Store(tmp_path), [["0.png"], ["1.png"], ["more/2.png"]])


def test_smaller_images_can_be_stored(tmp_path, images):
    from tests.families import FAMILIES

    loaded = loaded_of(FAMILIES["qwen3_vl"]())
    for method in ("downsample(keep=25%)", "downsample(keep=25%,positions=contiguous)", "pixelprune"):
        write(images, tmp_path / method, loaded, method, batch=1)
        check_equal(loaded, Store(tmp_path / method), [["0.png", "1.png"]])


def test_a_method_inside_the_llm_acts_on_stored_images(family, images, tmp_path):
    if family.name in REFUSED:
        pytest.skip("cannot be stored")
    loaded, inside = loaded_of(family), vlmzip.FastV(keep=3, layer=2)
    write(images, tmp_path, loaded, batch=1)
    method = vlmzip.Chain(compressors=(VisionZip(keep=8), inside))
    check_equal(loaded, Store(tmp_path), [["0.png"]], inside=[inside], method=method)


def test_methods_that_need_the_question_are_refused(llava, images, tmp_path):
    from tests.families import FAMILIES

    loaded = loaded_of(FAMILIES["llava"]())
    for method, reason in {
        "cdpruner(keep=4)": "cdpruner reads the question",
        "fastv": "fastv acts inside the LLM, .* store a method that acts before it",
        "visionzip(keep=8)+fastv": "store visionzip alone, and give --method fastv to vlmzip ask --store",
        "llavolta": "for training only|acts inside the LLM",
    }.items():
        with pytest.raises(UserError, match=reason):
            write(images, tmp_path, loaded, method)


def test_stored_images_go_only_to_the_compressor_that_made_them(images, tmp_path):
    from tests.families import FAMILIES

    loaded = loaded_of(FAMILIES["llava"]())
    write(images, tmp_path, loaded)
    store = Store(tmp_path)
    prompt = chat_prompt(loaded.family, loaded.processor, QUESTION, 1)
    inputs = store.inputs(loaded, [prompt], [["0.png"]])
    with pytest.raises(UserError, match=r"compressed by VisionZip.*keep=8.*, and the model has VisionZip.*keep=9"):
        vlmzip.attach(loaded.model, VisionZip(keep=9)).generate(**inputs)
    with pytest.raises(UserError, match="compressed by"):
        vlmzip.attach(loaded.model, VisionZip(keep=8, positions="original")).generate(**inputs)
    compressed = store.attach(loaded)
    with pytest.raises(UserError, match="not both"):
        compressed.generate(**inputs, pixel_values=torch.zeros(1, 3, 48, 48))
    with pytest.raises(UserError, match="leave out position_ids"):
        compressed(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
    with pytest.raises(UserError, match="2 image placeholders, but there are 1 stored"):
        store.inputs(loaded, [prompt + " <image>"], [["0.png"]])
    out = compressed.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    cache = out.past_key_values if "past_key_values" in out else out.cache
    with pytest.raises(UserError, match="a filled KV cache does not take compressed_images"):
        compressed.generate(**inputs, past_key_values=cache)
