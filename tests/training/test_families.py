"""Training on families with tiles, grids of any size and videos: rows, labels, losses and gradients."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.clips import write_clip
from tests.families import FAMILIES
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN
from tests.training.runs import write_config
from tests.training.test_records import film, record, said
from tests.training.videos import own_processor, processor_with_videos
from vlmzip import DFMR, EVS, Chain, FastV, LLaVolta, NoCompression, Pool2d, UserError, VisionZip, attach
from vlmzip.cli.main import main
from vlmzip.models import family_of
from vlmzip.runtime.prompt import pad_id
from vlmzip.training.batches import IGNORE, Collator, Preprocessor
from vlmzip.training.random_factor import RandomFactor
from vlmzip.training.records import BadRecord, read_record

TRAINED = ("llava_next", "qwen2_5_vl", "qwen3_vl", "video_llava", "llava_onevision", "mini_gemini", "mini_gemini_hd")
NAMES = [name for name in TRAINED if name in FAMILIES]
needs_video_llava = pytest.mark.skipif("video_llava" not in FAMILIES, reason="not in this version of transformers")
WITH_VIDEOS = [name for name in NAMES if FAMILIES[name].clips]
USER, MODEL, END = 4, 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    rng = torch.Generator().manual_seed(0)
    for name, size in {"a": (90, 40), "b": (120, 20), **dict.fromkeys("123", (60, 40))}.items():
        pixels = torch.randint(256, (size[1], size[0], 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / f"{name}.png")
    return path


#: Quick runs have the families whose rows differ most.
QUICK = ("llava_next", "qwen3_vl", "video_llava")


@pytest.fixture(
    scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def rows_of(request):
    """Return the name of a family and its function from records to rows."""
    made = Preprocessor(processor_with_videos(request.param), family_of(FAMILIES[request.param].build()), 900, frames=3)
    return request.param, made


def contents(name):
    """Return records of all kinds: several images, none, a video, images and a video."""
    frames = ["1.png", "2.png", "3.png"]
    some = [
        record("<image> w10 w11", "w20 w21"),
        {"conversations": said("w9", "w20 w30")},
        record("<image> w9 <image>", "w22", "w7", "w23 w24", image=["b.png", "a.png"]),
    ]
    films = [
        film("<video> w9", "w25", "w8", "w26", video=frames),
        film("w12 <image> w13", "w27", "<video> w14 <image>", "w28 w29", video=frames[:2], image=["a.png", "b.png"]),
    ]
    return some + (films if FAMILIES[name].clips else [])


def inputs_of(rows_of, folder):
    name, made = rows_of
    return [made(read_record(content), folder) for content in contents(name)]


def test_labels_are_the_answers_whatever_the_processor_writes_for_a_video(rows_of, folder):
    for row, content in zip(inputs_of(rows_of, folder), contents(rows_of[0]), strict=True):
        answers = [part["value"].split() for part in content["conversations"][1::2]]
        expected = [number for answer in answers for number in (*(int(word[1:]) for word in answer), END)]
        assert row["labels"][row["labels"] != IGNORE].tolist() == expected
        assert torch.equal(row["labels"][row["labels"] != IGNORE], row["input_ids"][row["labels"] != IGNORE])
        assert (row["input_ids"] == IMAGE_TOKEN).any() == ("image" in content)
        assert (row["input_ids"] == VIDEO_TOKEN).any() == ("video" in content)


def gradients(model):
    return [parameter.grad.clone() for parameter in family_of(model).projector.parameters()]


def test_without_compression_loss_and_gradients_are_the_plain_models(rows_of, folder):
    batch = Collator(0)(inputs_of(rows_of, folder))
    model = FAMILIES[rows_of[0]].build()
    plain = model(**batch).loss
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = attach(model, NoCompression())(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for gradient, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "compressor", [VisionZip(keep=8), DFMR(tau=0.9), LLaVolta(layer=2, stride=2)], ids=lambda made: made.name()
)
def test_a_compressed_batch_learns_what_its_rows_alone_do(rows_of, folder, compressor):
    """Images, videos and text alone in one batch: the mean loss over all labels, and gradients in the projector."""
    rows = inputs_of(rows_of, folder)
    model = attach(FAMILIES[rows_of[0]].build(), compressor)
    total = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
    for row in rows:
        alone = Collator(0)([row])
        (model(**alone).loss * int((alone["labels"] != IGNORE).sum()) / total).backward()
    expected = gradients(model.inner)
    assert all(gradient.abs().max() > 0 for gradient in expected if gradient.ndim > 1)
    model.zero_grad()
    together = model(**Collator(pad_id(family_of(model.inner)))(rows), pack_rows=True).loss
    together.backward()
    for gradient, other in zip(gradients(model.inner), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITH_VIDEOS]
)
def test_a_batch_without_images_or_videos_gets_blank_ones_without_gradients(name, folder):
    made = Preprocessor(processor_with_videos(name), family_of(FAMILIES[name].build()), 900, frames=3)
    text = made(read_record({"conversations": said("w9 w8", "w7")}), folder)
    seen = made(read_record(record("<image> w10", "w20")), folder)
    pad = Collator(0, made.blank(), made.blank_video())
    assert len(pad([seen])["input_ids"]) == 2
    batch = pad([text])
    assert len(batch["input_ids"]) == 3
    compressed = attach(FAMILIES[name].build(), VisionZip(keep=8))
    loss = compressed(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(compressed(**Collator(0)([text])).loss.item(), rel=1e-5)
    assert not any(gradient.any() for gradient in gradients(compressed.inner))


def test_records_of_several_image_sizes_are_joined_as_the_processor_joins_them(folder):
    """An image of LLaVA-NeXT with fewer tiles is filled up with zeros."""
    processor, family = processor_with_videos("llava_next"), family_of(FAMILIES["llava_next"].build())
    made = Preprocessor(processor, family, 900)
    records = [record("<image> w9", "w20", image=name) for name in ("a.png", "b.png")]
    batch = Collator(0)([made(read_record(content), folder) for content in records])
    images = [Image.open(folder / name) for name in ("a.png", "b.png")]
    together = processor(images=images, text=["<image>", "<image>"], padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], together["pixel_values"])
    assert torch.equal(batch["image_sizes"], together["image_sizes"])


def numbers_of(row):
    """Return the brightness of each frame that Video-LLaVA sees, as `write_clip` chose it: the frame's number."""
    means = row["pixel_values_videos"][0].mean((1, 2, 3))
    return (means - means.min()).div((means.max() - means.min()) / 10).round().int().tolist()


@needs_video_llava
@pytest.mark.parametrize(("frames", "expected"), [(3, [0, 5, 10]), (None, [0, 1, 3, 4, 6, 7, 9, 10])])
@pytest.mark.parametrize("kind", ["a folder", "a list", "a file"])
def test_frames_are_spread_evenly(tmp_path, kind, frames, expected):
    made = Preprocessor(processor_with_videos("video_llava"), family_of(FAMILIES["video_llava"].build()), 900, frames)
    clip = tmp_path / "clip"
    clip.mkdir()
    for n in range(11):
        Image.new("RGB", (8, 8), (n * 12,) * 3).save(clip / f"frame{n}.png")
    video = {"a folder": "clip", "a list": [f"clip/frame{n}.png" for n in range(11)], "a file": "clip.mp4"}[kind]
    if kind == "a file":
        pytest.importorskip("av")
        write_clip(tmp_path / "clip.mp4", frames=11)
    row = made(read_record(film("<video> w9", "w20", video=video)), tmp_path)
    assert numbers_of(row) == expected


def test_models_without_videos_see_the_frames_as_images(tmp_path):
    made = Preprocessor(processor_with_videos("llava_next"), family_of(FAMILIES["llava_next"].build()), 900)
    for n in range(3):
        Image.new("RGB", (40, 40), (n * 50,) * 3).save(tmp_path / f"{n}.png")
    content = film("<image> <video> <image> w9", "w20", video=["1.png", "2.png", "1.png"], image=["0.png", "2.png"])
    row = made(read_record(content), tmp_path)
    means = [image[0].mean().item() for image in row["pixel_values"]]
    black, grey, bright = sorted(set(means))
    assert means == [black, grey, bright, grey, bright]


@needs_video_llava
def test_a_short_video_repeats_frames_where_all_need_equally_many(folder):
    made = Preprocessor(processor_with_videos("video_llava"), family_of(FAMILIES["video_llava"].build()), 900, 4)
    row = made(read_record(film("<video> w9", "w20", video=["1.png", "2.png"])), folder)
    first, second, third, fourth = row["pixel_values_videos"][0]
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(second, third)


@needs_video_llava
def test_a_short_video_file_repeats_frames_too(tmp_path):
    pytest.importorskip("av")
    made = Preprocessor(processor_with_videos("video_llava"), family_of(FAMILIES["video_llava"].build()), 900, 4)
    write_clip(tmp_path / "clip.mp4", frames=2, step=120)
    row = made(read_record(film("<video> w9", "w20", video="clip.mp4")), tmp_path)
    dark, bright = sorted({frame.mean().round(decimals=2).item() for frame in row["pixel_values_videos"][0]})
    assert bright > dark


@needs_video_llava
def test_frames_that_take_too_much_memory(folder, monkeypatch):
    import vlmzip.runtime.videos as videos

    processor, family = processor_with_videos("video_llava"), family_of(FAMILIES["video_llava"].build())
    with pytest.raises(UserError, match=r"1,000,000,000 frames of a video, 336x336 pixels each, take .* or fewer"):
        Preprocessor(processor, family, 900, 10**9)
    made = Preprocessor(processor, family, 900, 2)
    monkeypatch.setattr(videos, "MOST_BYTES", 4)
    with pytest.raises(BadRecord, match="a video takes too much memory: take fewer frames"):
        made(read_record(film("<video> w9", "w20", video=["1.png", "2.png"])), folder)


@pytest.mark.parametrize(
    "compressor",
    [
        NoCompression(), VisionZip(keep=5), VisionZip(keep_per_view=2), DFMR(tau=99.0), RandomFactor(factors=(2,)),
        LLaVolta(layer=2, stride=2), Chain(compressors=(Pool2d(factor=2), FastV(keep=4, layer=2))), EVS(keep=0.5),
    ],
    ids=lambda made: made.name(),
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llava_next", marks=pytest.mark.slow),
        "qwen2_5_vl",
        pytest.param("video_llava", marks=pytest.mark.slow),
    ],
)
def test_a_record_fits_by_the_tokens_that_remain(name, folder, compressor):
    """At this threshold DFMR keeps as few tokens as it can."""
    if name not in NAMES:
        pytest.skip("not in this version of transformers")
    content = contents(name)[-1]
    model = attach(FAMILIES[name].build(), compressor)
    row = Preprocessor(processor_with_videos(name), family_of(model.inner), 900, 3)(read_record(content), folder)
    with torch.no_grad():
        model(**Collator(0)([row]))
    remaining = len(row["input_ids"]) - model.report.before + model.report.after
    family, processor, stages = family_of(model.inner), processor_with_videos(name), [model.compressor]
    Preprocessor(processor, family, remaining, 3, stages)(read_record(content), folder)
    with pytest.raises(BadRecord, match=f"^longer than {remaining - 1} tokens$"):
        Preprocessor(processor, family, remaining - 1, 3, stages)(read_record(content), folder)


def test_a_record_must_fit_in_every_stage(folder):
    content, family = contents("qwen3_vl")[-1], family_of(FAMILIES["qwen3_vl"].build())
    processor, stages = processor_with_videos("qwen3_vl"), [VisionZip(keep=5), NoCompression()]
    whole = len(Preprocessor(processor, family, 900, 3)(read_record(content), folder)["input_ids"])
    Preprocessor(processor, family, whole - 1, 3, stages[:1])(read_record(content), folder)
    with pytest.raises(BadRecord, match=f"longer than {whole - 1} tokens"):
        Preprocessor(processor, family, whole - 1, 3, stages)(read_record(content), folder)


def test_nothing_is_learned_from_a_row_that_its_images_make_too_long(folder):
    """Whether an image of DFMR has 36 or 4 tokens shows only behind the encoder."""
    processor = processor_with_videos("llava")
    made = Preprocessor(processor, family_of(FAMILIES["llava"].build()), 900)
    Image.new("RGB", (48, 48)).save(folder / "plain.png")
    Image.effect_noise((48, 48), 200).convert("RGB").save(folder / "noisy.png")
    rows = [made(read_record(record("<image> w9", "w20", image=f"{name}.png")), folder) for name in ("plain", "noisy")]
    model = attach(FAMILIES["llava"].build(), DFMR(tau=0.5))
    batch = Collator(0)(rows)
    model(**batch)
    short, long = [image.after for image in model.report.images]
    assert short < long
    text = len(rows[0]["input_ids"]) - model.report.images[0].before
    alone = model(**Collator(0)(rows[:1])).loss
    for pack_rows in (False, True):
        assert torch.allclose(model(**batch, longest=text + long - 1, pack_rows=pack_rows).loss, alone, rtol=1e-5)
        assert model.report.too_long == [1]
    model(**batch, longest=text + long)
    assert model.report.too_long == []


def run(folder, images, name, processor, content, **settings):
    """Train a tiny family on records from the command line; return its log and the names of weights that changed."""
    model = FAMILIES[name].build()
    for saved in (processor, model):
        saved.save_pretrained(folder / "model")
    (folder / "data.json").write_text(json.dumps(content))
    path = write_config(folder, images=str(images), steps=3, learn="projector", **settings)
    assert main(["train", str(path)]) == 0
    before, after = (load_file(folder / part / "model.safetensors") for part in ("model", "out/model"))
    assert before.keys() == after.keys()
    log = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    return log, {name for name in before if not torch.equal(before[name], after[name])}


def test_training_on_images_of_different_tiles(folder, tmp_path):
    """The longest record would fit if DFMR pooled its images, which it does not at this threshold."""
    content, processor = contents("llava_next"), processor_with_videos("llava_next")
    rows = [
        Preprocessor(processor, family_of(FAMILIES["llava_next"].build()), 900)(read_record(c), folder) for c in content
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    settings = {"schedule": "dfmr(tau=0.0)", "max_length": longest - 1, "batch": 9}
    log, learned = run(tmp_path, folder, "llava_next", processor, content * 3, **settings)
    assert learned
    assert all("multi_modal_projector" in name for name in learned)
    assert [0 < line["loss"] < 20 for line in log if "loss" in line] == [True] * 3
    assert sum(line.get("too_long", 0) for line in log) == pytest.approx(3 * 3 / 9, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("mini_gemini", "mini_gemini_hd") if name in FAMILIES])
def test_training_mini_gemini_from_a_config(folder, tmp_path, name):
    """Images and text, through stages before and inside the LLM; only the projector learns."""
    stages = [{"compressor": text} for text in ("visionzip(keep=8)", "llavolta(layer=2,stride=2)", "none")]
    settings = {"schedule": {"stages": stages}, "max_length": 900, "batch": 3}
    log, learned = run(tmp_path, folder, name, processor_with_videos(name), contents(name) * 3, **settings)
    assert learned
    assert all("multi_modal_projector" in weight for weight in learned)
    assert [line["stage"] for line in log if "loss" in line] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("qwen2_5_vl", "qwen3_vl", "video_llava") if name in FAMILIES])
def test_training_on_videos_with_the_processor_of_transformers(folder, tmp_path, name):
    """A video file, a folder of frames, images and text, through stages before and inside the LLM."""
    pytest.importorskip("torchvision")
    pytest.importorskip("av")
    write_clip(folder / "clip.mp4", frames=23)
    (folder / "frames").mkdir(exist_ok=True)
    for n in range(11):
        Image.effect_noise((60, 40), 40).save(folder / "frames" / f"{n}.png")
    content = [*contents(name), film("<video> w9", "w20", video="clip.mp4"), film("<video>", "w21", video="frames")]
    stages = [{"compressor": text} for text in ("visionzip(keep=8)", "llavolta(layer=2,stride=2)", "random_factor")]
    settings = {"schedule": {"stages": stages}, "max_length": 900, "batch": 7}
    log, learned = run(tmp_path, folder, name, own_processor(name), content, **settings)
    assert learned
    assert all("multi_modal_projector" in weight or "visual.merger" in weight for weight in learned)
    assert [line["stage"] for line in log if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    "spec",
    [
        "visionzip(keep=8)+llavolta(layer=2,stride=2)",
        "evs(keep=50%)+fastv(layer=2,keep=50%)",
        "random_tokens(keep=12)+kmeans(keep=6,site=post_projector)",
    ],
)
def test_max_length_counts_what_a_chain_leaves_before_the_llm(spec, folder):
    """It is the smallest with which the record is accepted."""
    model, processor = FAMILIES["qwen3_vl"].build(), processor_with_videos("qwen3_vl")
    family = family_of(model)
    content = film("<image> w13", "w27", "<video> w14", "w28", video=["1.png", "2.png", "3.png"], image=["a.png"])
    row = Preprocessor(processor, family, 900, frames=3)(read_record(content), folder)
    with torch.no_grad(), attach(model, spec) as small:
        small(**Collator(0)([row]))
        visual = sum(image.before for image in small.report.images)
        kept = len(row["input_ids"]) - visual + sum(image.by_layer[0] for image in small.report.images)
        chain = small.compressor
    Preprocessor(processor, family, kept, frames=3, compressors=[chain])(read_record(content), folder)
    with pytest.raises(BadRecord, match=f"longer than {kept - 1} tokens"):
        Preprocessor(processor, family, kept - 1, frames=3, compressors=[chain])(read_record(content), folder)
