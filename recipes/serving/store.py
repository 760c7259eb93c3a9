"""Measure answers from a store beside answers from image files, the bytes of both, and the speed of encoding.

    OMP_NUM_THREADS=1 python -m recipes.serving.store                              # mini
    OMP_NUM_THREADS=1 python -m recipes.serving.store --shape llava-1.5-7b --scale 0.125 --keep 64 --images 4

Each image gets ten questions, one at a time: the file is read, encoded, compressed and answered about, or its tokens
are read from the store and answered about. Both take turns. With `--shape`, the model has random weights, its LLM's and
its encoder's width times `--scale`, and the images are mini's, enlarged. `--clock cpu` counts CPU time, for a machine
that other work shares: with one thread it is what an idle machine takes, without the wait for a disk.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from recipes.benchmarks import RESULTS
from vlmzip import mini, spec
from vlmzip.files import write_csv
from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.bench.timing import cpu_seconds, in_turns, now, quartiles, ratios
from vlmzip.lab.machine import about, file_name
from vlmzip.mini.splits import validation_split
from vlmzip.models import family_of
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.images import load_image
from vlmzip.runtime.loading import Loaded, load
from vlmzip.runtime.prompt_text import chat_prompt
from vlmzip.serving.store.encoding import Encoder
from vlmzip.serving.store.parts import Part, write_part
from vlmzip.serving.store.reading import Store
from vlmzip.serving.store.writing import write_store

#: Questions about each image.
QUESTIONS = 10
#: Images that are encoded together.
BATCH = 8
#: The quality of the JPEG files.
QUALITY = 90


def shaped(name: str, scale: float, device: str, dtype: str) -> Loaded:
    """Return a LLaVA of published dimensions, narrower by `scale`, with random weights and mini's tokenizer."""
    preset, folder = PRESETS[name].scaled(scale), mini.weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = preset.config()
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    side = preset.grid.rows * config.vision_config.patch_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images, tokenizer, config.vision_config.patch_size, "default", num_additional_image_tokens=1,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )  # fmt: skip
    model = make_model(config, device, getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # random weights: all answers have the same length
    return Loaded(f"{name} x {scale:g}", model, processor, family_of(model))


def write_jpegs(folder: Path, count: int, side: int) -> dict[str, list[str]]:
    """Write images as JPEG files; return ten questions for each."""
    asked = validation_split(count * QUESTIONS)
    by_name = {}
    for number in range(count):
        of_image = asked[number * QUESTIONS : (number + 1) * QUESTIONS]
        image = of_image[0].image
        image.resize((side, side * image.height // image.width)).save(folder / f"{number}.jpg", quality=QUALITY)
        by_name[f"{number}.jpg"] = [each.question for each in of_image]
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in PRESETS if name.startswith("llava-1.5")])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=640, help="width of the JPEG files in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", default="16")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    parser.add_argument("--results", type=Path, metavar="CSV")
    args = parser.parse_args()

    loaded = (
        load("mini", args.device, args.dtype)
        if args.shape is None
        else shaped(args.shape, args.scale, args.device, args.dtype)
    )
    clock = {"wall": now, "cpu": cpu_seconds}[args.clock]
    method = spec.read(f"visionzip(keep={args.keep})")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        folder.mkdir()
        asked = write_jpegs(folder, args.images, args.side)
        written = write_store(folder, Path(place, "store"), loaded, method)
        plain = write_store(folder, Path(place, "plain"), loaded, spec.read("no_compression"))
        store = Store(Path(place, "store"))
        compressed, answerer = store.attach(loaded), Answerer(loaded.family, loaded.processor)
        family, processor = loaded.family, loaded.processor

        def answer(from_store: bool) -> tuple[float, torch.Tensor]:
            """Answer all questions; return the seconds and the last answer's tokens."""
            begin = clock(args.device)
            for name, of_image in asked.items():
                for question in of_image:
                    if from_store:
                        inputs = store.inputs(loaded, [chat_prompt(family, processor, question, 1)], [[name]])
                    else:
                        inputs = answerer.inputs([load_image(folder / name)], [question])
                    with torch.inference_mode():
                        out = compressed.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
            return clock(args.device) - begin, out

        def encode() -> tuple[float, None]:
            """Encode all images, and write a shard; return the seconds."""
            begin = clock(args.device)
            write_part(Path(place, "again"), folder, Part(0, tuple(asked)), Encoder(loaded, compressed), BATCH)
            return clock(args.device) - begin, None

        encoding = [spent for spent, _ in in_turns({"encode": encode}, args.repeats)["encode"]]
        results = in_turns({"file": partial(answer, False), "store": partial(answer, True)}, args.repeats)
    assert torch.equal(results["file"][0][1], results["store"][0][1])
    seconds = {way: [spent for spent, _ in runs] for way, runs in results.items()}
    ratio, count = ratios(seconds["store"], seconds["file"]), args.images * QUESTIONS
    row = {
        "model": loaded.name,
        "compressor": spec.write(method),
        "visual tokens": loaded.family.profile().size,
        "dtype": args.dtype,
        "images": args.images,
        "questions per image": QUESTIONS,
        "new tokens": args.new_tokens,
        "answers/s, files": f"{count / quartiles(seconds['file']).median:.2f}",
        "answers/s, store": f"{count / quartiles(seconds['store']).median:.2f}",
        "speed-up": f"{ratio.median:.2f}",
        "first quartile": f"{ratio.first:.2f}",
        "third quartile": f"{ratio.third:.2f}",
        "images/s, encoding": f"{args.images / quartiles(encoding).median:.2f}",
        "bytes per image, JPEG": written.file_bytes // args.images,
        "bytes per image, store": written.token_bytes // args.images,
        "bytes per image, all tokens": plain.token_bytes // args.images,
        "clock": args.clock,
        **about(args.device),
    }
    for name, value in row.items():
        print(f"{name:<28} {value}")
    write_csv(args.results or RESULTS / file_name("store", args.device, loaded.name.replace(" ", "")), [row])


if __name__ == "__main__":
    main()
