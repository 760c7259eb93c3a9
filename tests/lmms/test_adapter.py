"""The adapter alone: every form of question that a task can have, and nothing that breaks goes by."""

import pytest

pytest.importorskip("lmms_eval")

import torch
from lmms_eval.api.instance import Instance
from PIL import Image

import vlmzip
from vlmzip import spec
from vlmzip.errors import UserError
from vlmzip.lab.lmms.adapter import CompressedForLmms
from vlmzip.lab.lmms.requests import AnswerFailed
from vlmzip.methods import FastV, VisionZip

IMAGE = "examples/flat.png"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def mini():
    return vlmzip.mini.load()


@pytest.fixture
def compressed(mini):
    with vlmzip.attach(mini[0], VisionZip(keep=36)) as compressed:
        yield compressed


@pytest.fixture
def adapter(compressed, mini):
    return CompressedForLmms(compressed, mini[1], batch_size=4)


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else _image(part) for part in parts]
    return {"role": "user", "content": content}


def _image(image):
    return {"type": "image", "url": image}


@pytest.fixture(scope="module")
def images():
    return [Image.open(f"examples/{name}.png").convert("RGB") for name in ("flat", "cluttered")]


def requests(adapter, *conversations, settings=GREEDY, kind="generate_until"):
    """What lmms-eval hands over for these conversations; each is what the task's `doc_to_messages` returns."""
    adapter.task_dict["t"] = {"test": list(range(len(conversations)))}
    arguments = [
        ("", lambda doc, **rounds: _messages(conversations[doc], rounds), dict(settings), place, "t", "test")
        for place in range(len(conversations))
    ]
    metadata = {"task": "t", "repeats": 1}
    return [
        Instance(kind, one, place, {**metadata, "doc_id": place}, task_name="t", doc_id=place)
        for place, one in enumerate(arguments)
    ]


def _messages(conversation, rounds):
    return conversation(**rounds) if callable(conversation) else conversation


def asked_directly(compressed, processor, prompt, images, **settings):
    inputs = processor(images=images or None, text=prompt, return_tensors="pt")
    out = compressed.generate(**inputs, **(GREEDY | settings))
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def conversations(images):
    flat, cluttered = images
    star = "where is the red star ?"
    said = {"role": "assistant", "content": [{"type": "text", "text": "orange"}]}
    return {
        "one image": [user(flat, "what color is the ring ?")],
        "two images": [user(flat, cluttered, star)],
        "text alone": [user("what color is the sky ?")],
        "another image": [user(cluttered, star)],
        "two turns": [user(flat, "what color is the ring ?"), said, user("is there a star ?")],
        "an image later": [user(flat, "what color is the ring ?"), said, user(cluttered, star)],
        "content as text": [{"role": "user", "content": "what color is the sky ?"}],
        "a path": [{"role": "user", "content": [_image(IMAGE), {"type": "text", "text": star}]}],
    }


PROMPTS = {
    "one image": "USER: <image>\nwhat color is the ring ? ASSISTANT:",
    "two images": "USER: <image>\n<image>\nwhere is the red star ? ASSISTANT:",
    "text alone": "USER: what color is the sky ? ASSISTANT:",
    "another image": "USER: <image>\nwhere is the red star ? ASSISTANT:",
    "two turns": "USER: <image>\nwhat color is the ring ? ASSISTANT: orange</s>USER: is there a star ? ASSISTANT:",
    "an image later": "USER: <image>\nwhat color is the ring ? ASSISTANT: orange</s>"
    "USER: <image>\nwhere is the red star ? ASSISTANT:",
    "content as text": "USER: what color is the sky ? ASSISTANT:",
    "a path": "USER: <image>\nwhere is the red star ? ASSISTANT:",
}
SEEN = {
    "one image": [0], "two images": [0, 1], "text alone": [], "another image": [1], "two turns": [0],
    "an image later": [0, 1], "content as text": [], "a path": [0],
}  # fmt: skip


def test_every_form_of_question_is_answered_as_alone(adapter, compressed, mini, conversations, images):
    results = adapter.generate_until(requests(adapter, *conversations.values()))
    end = mini[1].tokenizer.eos_token
    for name, result in zip(conversations, results, strict=True):
        shown = [images[number] for number in SEEN[name]]
        prompt = PROMPTS[name].replace("</s>", end)
        assert result.text == asked_directly(compressed, mini[1], prompt, shown), name
        assert result.token_counts.visual_tokens == 144 * len(shown), name
        assert result.token_counts.retention == (0.25 if shown else 1.0), name
    assert results[0].text == "orange"
    assert len({result.text for result in results}) > 3  # answers that are all alike would prove no order


def test_costs_are_those_of_the_compressed_prompt(adapter, mini, images):
    (result,) = adapter.generate_until(requests(adapter, [user(images[0], "what color is the ring ?")]))
    text = mini[1].tokenizer("USER: \nwhat color is the ring ? ASSISTANT:", return_tensors="pt")["input_ids"].shape[1]
    costs = result.token_counts.to_dict()
    assert costs == {
        "input_tokens": text + 36,
        "output_tokens": 2,  # orange, and the end
        "visual_tokens": 144,
        "visual_tokens_by_layer": "36",
        "retention": 0.25,
    }


def test_methods_inside_the_llm_tell_their_layers(mini, images):
    with vlmzip.attach(mini[0], FastV(layer=3, keep=36)) as compressed:
        adapter = CompressedForLmms(compressed, mini[1])
        (result,) = adapter.generate_until(requests(adapter, [user(images[0], "what color is the ring ?")]))
    assert result.token_counts.visual_tokens_by_layer.startswith("144×3 → ")
    assert 0.25 < result.token_counts.retention < 1


def test_settings_of_generation_reach_the_model(adapter, compressed, mini, images, monkeypatch):
    seen = []
    generate = compressed.generate
    monkeypatch.setattr(type(compressed), "generate", lambda self, **given: seen.append(given) or generate(**given))
    question = [user(images[0], "what color is the ring ?")]
    for settings in (
        {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]},
        {"num_beams": 3, "max_new_tokens": 4},
        {"temperature": 0.7, "top_p": 0.9, "do_sample": True},
        {"temperature": 0.2, "do_sample": False},
        {"temperature": 0.5},
    ):
        adapter.generate_until(requests(adapter, question, settings=settings))
    kept = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")
    assert [{name: one[name] for name in kept if name in one} for one in seen] == [
        {"max_new_tokens": 3, "do_sample": False, "num_beams": 1},
        {"max_new_tokens": 4, "do_sample": False, "num_beams": 3},
        {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"max_new_tokens": 1024, "do_sample": False},
        {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.5},
    ]


def test_beams_answer_as_the_model_does(adapter, compressed, mini, images):
    question = [user(images[1], "where is the red star ?")]
    (result,) = adapter.generate_until(requests(adapter, question, settings=GREEDY | {"num_beams": 3}))
    prompt = PROMPTS["another image"]
    assert result.text == asked_directly(compressed, mini[1], prompt, [images[1]], num_beams=3)


def test_questions_with_other_settings_share_no_batch(adapter, images):
    question = [user(images[1], "where is the red star ?")]
    both = requests(adapter, question, question)
    both[1].arguments[2]["max_new_tokens"] = 1
    long, short = adapter.generate_until(both)
    assert (short.token_counts.output_tokens, long.token_counts.output_tokens > 1) == (1, True)
    assert long.text.startswith(short.text)


def test_an_answer_ends_before_what_it_ends_with(adapter, images):
    question = [user(images[0], "what color is the ring ?")]
    (result,) = adapter.generate_until(requests(adapter, question, settings=GREEDY | {"until": ["ange", "?"]}))
    assert result.text == "or"


def test_rounds_continue_until_the_task_says_stop(adapter, images):
    asked = []

    def conversation(round_idx=0, previous_output=(), previous_round_info=None):
        asked.append((round_idx, list(previous_output), previous_round_info))
        messages = [user(images[round_idx % 2], "what color is the ring ?")]
        return (messages, round_idx == 2, previous_output, round_idx * 10) if round_idx else messages

    rounds = requests(adapter, conversation, kind="generate_until_multi_round")
    (said,) = adapter.generate_until_multi_round(rounds)
    assert (len(said), said[0]) == (2, "orange")
    assert asked == [(0, [], None), (1, said[:1], None), (2, said, 10)]


def test_a_task_without_rounds_is_asked_once(adapter, images):
    rounds = requests(adapter, [user(images[0], "what color is the ring ?")], kind="generate_until_multi_round")
    assert adapter.generate_until_multi_round(rounds) == [["orange"]]


def test_what_breaks_is_raised_with_the_place(adapter, compressed, images, monkeypatch):
    question = [user(images[0], "what color is the ring ?")]
    monkeypatch.setattr(type(compressed), "generate", lambda self, **given: 1 / 0)
    with pytest.raises(AnswerFailed, match=r"t, document 0 to t, document 1: failed with ZeroDivisionError") as told:
        adapter.generate_until(requests(adapter, question, question))
    assert isinstance(told.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "video", "url": "a.mp4"}], "supports no video yet"),
        ([{"type": "audio", "url": "a.wav"}], "supports no audio yet"),
        ([{"type": "image", "url": b"bytes"}], "bytes is not an image"),
        ([{"type": "text", "text": "look: <image>"}], "stands for an image"),
        ([{"type": "image", "url": "nowhere.png"}], "there is no file 'nowhere.png'"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(adapter, content, said):
    with pytest.raises(AnswerFailed, match=said):
        adapter.generate_until(requests(adapter, [{"role": "user", "content": content}]))


def test_likelihoods_are_refused_with_the_name_of_the_task(adapter):
    arguments = ("", " yes", None, 0, "seedbench_ppl", "test")
    request = Instance("loglikelihood", arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(UserError, match=r"^seedbench_ppl compares log-likelihoods"):
        adapter.loglikelihood([request])


@pytest.mark.parametrize(
    "method",
    ["visionzip(dominant=10,contextual=6)", "dfmr(tau=0.3)+fastv(layer=3)", "visionzip(keep=25%)", "no_compression"],
)
def test_settings_with_commas_and_brackets_get_through(method):
    from lmms_eval.models import get_model

    made = get_model("vlmzip").create_from_arg_string(f"pretrained=mini,method={method}", {"batch_size": 3})
    assert made.compressed.compressor == spec.read(method).placed(made.answerer.family.profile())
    assert (made.batch_size, made.rank, made.device) == (3, 0, torch.device("cpu"))


def test_a_saved_compressor_is_a_setting_too(compressed, tmp_path):
    compressed.save_pretrained(tmp_path)
    vlmzip.mini.load()[1].save_pretrained(tmp_path)
    for text in (f"pretrained={tmp_path}", f"pretrained=mini,method={tmp_path}/compressor.json"):
        assert CompressedForLmms.create_from_arg_string(text).compressed.compressor == VisionZip(keep=36)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pretrained=mini", "--model_args needs method="),
        ("pretrained=mini,method=visionzap", "did you mean 'visionzip'"),
        ("pretrained=nowhere,method=pool2d", "there is no folder 'nowhere'"),
        ("pretrained=mini,method=pool2d,batch_size=auto", "batch_size must be a number, got 'auto'"),
        ("pretrained=mini,method=pool2d,batch_size=0", "give at least 1"),
        ("pretrain=mini", "did you mean 'pretrained'"),
    ],
)
def test_wrong_settings_end_the_process_in_a_line(text, said, capsys):
    with pytest.raises(SystemExit) as ended:
        CompressedForLmms.create_from_arg_string(text)
    out = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in out
    assert out.count("\n") == 1


def test_prompts_beyond_the_llms_positions_are_noted_once(conversations, capsys):
    model, processor = vlmzip.mini.load()
    model.config.text_config.max_position_embeddings = 20
    with vlmzip.attach(model, VisionZip(keep=36)) as compressed:
        adapter = CompressedForLmms(compressed, processor, batch_size=1)
        adapter.generate_until(requests(adapter, *conversations.values()))
    notes = [line for line in capsys.readouterr().err.splitlines() if "positions" in line]
    assert ["note: with visionzip the prompt takes" in note for note in notes] == [True]
