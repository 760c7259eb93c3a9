"""`vlmzip ask IMAGE|VIDEO… QUESTION`: answer a question about images and videos, and show what compression saves."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from vlmzip.cli._options.common import check_counts
from vlmzip.cli._shared.console import spinner
from vlmzip.cli._shared.images import check_target, check_visuals, save_image
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import check_method, make_method
from vlmzip.cli._shared.words import split_images_and_question
from vlmzip.lab.asking import (
    account_of,
    answer,
    attach_and_note,
    build_inputs,
    by_visual,
    draw,
    plain_account,
    read_visuals,
    refuse_methods_for_clips,
    warn_about_detail,
)
from vlmzip.lab.table import Console, print_json, show_bytes, show_count, show_flops
from vlmzip.methods import NoCompression


def run(args: Namespace) -> None:
    paths, question = split_images_and_question(args.words, "ask")
    check_counts(args, "max_new_tokens", "frames")
    check_method(args, draws=bool(args.overlay))
    if args.overlay:
        check_target(args.overlay, paths)
    check_visuals(paths, args.frames)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    compressed = attach_and_note(loaded, make_method(args, loaded.family.profile()))
    visuals = read_visuals(loaded, paths, args.frames)
    inputs = build_inputs(loaded, visuals, question)
    refuse_methods_for_clips(loaded, compressed.compressor, visuals, inputs)
    with spinner("answering"):
        plain = None
        if args.baseline:
            whole = attach_and_note(loaded, NoCompression())
            answer(loaded, whole, inputs, 1)  # the warm-up: one-time set-up must not count for either side
            plain = answer(loaded, whole, inputs, args.max_new_tokens)
        result = answer(loaded, compressed, inputs, args.max_new_tokens)
    out: dict[str, object] = {
        "model": args.model,
        "compressor": compressed.compressor.to_dict(),
        "question": question,
        "answer": result.text,
        "images": list(map(account_of, visuals, by_visual(visuals, result.report))),
        "compressed": asdict(result.account),
        "plain": plain_account(loaded, inputs, result.report),
    }
    if plain:
        out["plain"] = asdict(plain.account)
        out["plain_answer"] = plain.text
    if args.overlay:
        out["overlay"] = str(args.overlay)
    print_json(out) if args.json else _print_account(out)
    warn_about_detail(result.report, visuals)
    if args.overlay:
        save_image(draw(loaded, inputs, result.report, visuals), args.overlay, paths)
        if not args.json:
            print(f"tokens drawn in {args.overlay}")
    if plain and not args.json:
        print(_gain(out))


def _print_account(out: dict[str, Any]) -> None:
    plain, compressed, method = out["plain"], out["compressed"], out["compressor"]["method"]
    console = Console(highlight=False, soft_wrap=True)
    if "plain_answer" in out:
        console.print(f"{'plain':<{len(method)}}  {escape(out['plain_answer'])}")
        console.print(f"{method:<5}  [bold]{escape(out['answer'])}[/bold]\n")
    else:
        console.print(f"[bold]{escape(out['answer'])}[/bold]\n")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, key, show in (
        ("visual tokens", "visual_tokens", show_count),
        ("prompt tokens", "prompt_tokens", show_count),
        ("prefill FLOPs", "prefill_flops", show_flops),
        ("KV cache", "kv_cache_bytes", show_bytes),
    ):
        table.add_row(name, f"{show(plain[key])} → {show(compressed[key])}", f"{plain[key] / compressed[key]:.1f}x")
    last = sum(image["by_layer"][-1] for image in out["images"])
    if last < compressed["visual_tokens"]:
        table.add_row(
            "at the last layer", f"{plain['visual_tokens']} → {last}", f"{plain['visual_tokens'] / last:.1f}x"
        )
    for part, spent in compressed["milliseconds"].items():
        before = plain.get("milliseconds", {}).get(part)
        table.add_row(f"{part} ms", ("" if before is None else f"{before:.1f} → ") + f"{spent:.1f}")
    console.print(table)


def _gain(out: dict[str, Any]) -> str:
    """Return a sentence that says what the compressor saved, and whether the answer is the plain model's."""
    plain, compressed = out["plain"], out["compressed"]
    last = sum(image["by_layer"][-1] for image in out["images"])
    where = " at the last layer" if last < compressed["visual_tokens"] else ""
    flops, cache = (plain[key] / compressed[key] for key in ("prefill_flops", "kv_cache_bytes"))
    answer = "The same answer" if out["answer"] == out["plain_answer"] else "Another answer"
    tokens = f"{last} of {plain['visual_tokens']} visual tokens{where}"
    return f"{answer} with {tokens}: prefill FLOPs {flops:.1f}x fewer, KV cache {cache:.1f}x smaller"
