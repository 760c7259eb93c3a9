"""Tune mini's projector for VisionZip with 16 of 144 visual tokens, in two minutes on a CPU.

    python examples/train.py
    python examples/train.py --method "pool2d(factor=3)" --steps 300 --out runs/tuned

A compressed model is a module like any other: it takes labels and returns a loss. This script prints the share of test
questions that the model answers correctly before and after. `vlmzip train` is the whole trainer, with records,
schedules, several processes and exact resumes.
"""

import argparse
import time

import torch

import vlmzip
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.splits import TRAIN_LANGUAGE, samples, test_split

FIRST_SEED = TRAIN_LANGUAGE.start + 1_000_000  # of training images; those of the test split have other seeds and photos


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="visionzip(keep=16)", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="questions in a step; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=600, help="test questions; default: %(default)s")
    parser.add_argument("--out", help="a folder for the tuned model")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, processor = vlmzip.mini.load()
    compressed = vlmzip.attach(model, args.method)
    test = test_split(args.questions)
    before = score(compressed, processor, test)
    print(f"before: {before:.1%} of {len(test)} test questions")
    tune(compressed, processor, args)
    after = score(compressed, processor, test)
    tokens = compressed.report.images[0].after
    print(f"after: {after:.1%}, {100 * (after - before):+.1f} points, with {tokens} of 144 visual tokens")
    if args.out:
        compressed.save_pretrained(args.out)
        processor.save_pretrained(args.out)
        print(f"saved: vlmzip ask examples/first.png '…' --model {args.out}")


def tune(compressed, processor, args):
    """Train the projector, and only it, with the compressor attached."""
    compressed.requires_grad_(False)
    projector = compressed.inner.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    start = time.perf_counter()
    for step, batch in enumerate(batches(args.batch, args.steps), 1):
        loss = compressed(**training_inputs(processor, batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {args.steps}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")


def batches(size, steps):
    """Draw new images with the photos in the package, and ask each up to six questions."""
    assets, seed, questions = shipped_assets("validation"), FIRST_SEED, []
    for _ in range(steps):
        while len(questions) < size:
            questions += samples(range(seed, seed + 1), assets)
            seed += 1
        yield questions[:size]
        questions = questions[size:]


def training_inputs(processor, batch):
    """Return the inputs of questions with their answers. Labels are the tokens of the answers."""
    processor.tokenizer.padding_side = "right"
    images, prompts = [sample.image for sample in batch], [prompt_of(processor, sample.question) for sample in batch]
    answers = [f" {sample.answer}{processor.tokenizer.eos_token}" for sample in batch]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, answer in enumerate(answers):
        length = int(inputs["attention_mask"][row].sum())
        labels[row, : length - len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])] = -100
    return {**inputs, "labels": labels}


def score(compressed, processor, questions, batch=60):
    """Return the share of questions that are answered correctly."""
    processor.tokenizer.padding_side = "left"
    correct = 0
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        prompts = [prompt_of(processor, sample.question) for sample in part]
        inputs = processor(images=[sample.image for sample in part], text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = compressed.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(text.strip() == sample.answer for text, sample in zip(texts, part, strict=True))
    return correct / len(questions)


def prompt_of(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


if __name__ == "__main__":
    main()
