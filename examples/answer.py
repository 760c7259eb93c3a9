"""Ask a model about an image, with all visual tokens and with few.

python examples/answer.py
python examples/answer.py photo.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --keep 64
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmzip
from vlmzip.runtime.images import load_image

IMAGE, QUESTION = "examples/flat.png", "what color is the ring ?"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default=IMAGE, help="default: %(default)s")
    parser.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--model", default="mini", help="mini, a folder or a hub id; default: %(default)s")
    parser.add_argument("--keep", default="25%", help="visual tokens for VisionZip to keep: 64 or 25%%")
    args = parser.parse_args(arguments)

    model, processor = load(args.model)
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=load_image(args.image), text=prompt, return_tensors="pt").to(model.device, model.dtype)

    print(f"all visual tokens: {answer(model, processor, inputs)}")
    with vlmzip.attach(model, f"visionzip(keep={args.keep})") as compressed:
        text, report = answer(compressed, processor, inputs), compressed.report
    print(f"{report.after} of {report.before}: {text}")


def load(name):
    """Return a model and its processor, on a GPU if there is one."""
    folder = vlmzip.mini.weights_folder() if name == "mini" else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto" if device == "cuda" else "float32")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def answer(model, processor, inputs):
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
