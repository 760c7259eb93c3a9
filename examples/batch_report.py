"""Ask one question about several images in one batch, and print what became of each image's visual tokens.

    python examples/batch_report.py
    python examples/batch_report.py a.jpg b.jpg --question "What is this?" --model llava-hf/llava-1.5-7b-hf

`kept` counts the visual tokens that enter the LLM. `detail lost` is the share of the image that they do not explain:
above 0.3 reading suffers.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmzip
from vlmzip.runtime.images import load_image

IMAGES = ["examples/flat.png", "examples/first.png", "examples/cluttered.png"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=IMAGES, help=f"default: {' '.join(IMAGES)}")
    parser.add_argument("--question", default="what item is there ?", help="default: %(default)s")
    parser.add_argument("--model", default="mini", help="mini, a folder or a hub id; default: %(default)s")
    parser.add_argument("--method", default="visionzip(keep=25%)", help="default: %(default)s")
    args = parser.parse_args(arguments)

    model, processor = load(args.model)
    inputs = batch_inputs(processor, args.images, args.question).to(model.device, model.dtype)
    compressed = vlmzip.attach(model, args.method)
    out = compressed.generate(**inputs, max_new_tokens=64, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print(f"{'image':30}{'of':>6}{'kept':>6}{'detail lost':>13}  answer")
    for path, image in zip(args.images, compressed.report.images, strict=True):
        lost = "unknown" if image.detail_lost is None else f"{image.detail_lost:.2f}"
        print(f"{path:30}{image.before:6}{image.after:6}{lost:>13}  {texts[image.row].strip()}")
    print(f"\nall visual tokens: {compressed.report.before}, kept: {compressed.report.after}")


def batch_inputs(processor, paths, question):
    """Return the inputs of one prompt for each image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    processor.tokenizer.padding_side = "left"  # answers go on at the ends of their prompts
    images = [load_image(path) for path in paths]
    return processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")


def load(name):
    """Return a model and its processor, on a GPU if there is one."""
    folder = vlmzip.mini.weights_folder() if name == "mini" else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto" if device == "cuda" else "float32")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


if __name__ == "__main__":
    main()
