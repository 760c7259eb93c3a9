"""`vlmzip ask IMAGE|VIDEO… QUESTION`: answer a question about images and videos, and show what compression saves."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from vlmzip import spec
from vlmzip.cli._options.common import check_counts
from vlmzip.cli._shared.console import spinner
from vlmzip.cli._shared.images import check_target, check_visuals, save_image
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import check_method, make_method, settings, without_budget
from vlmzip.cli._shared.words import split_images_and_question
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, collecting_warnings
from vlmzip.lab.asking import (
    account_of,
    answer,
    attach_and_note,
    build_inputs,
    by_visual,
    check_question,
    draw,
    plain_account,
    read_visuals,
    refuse_methods_for_clips,
    warn_about_detail,
)
from vlmzip.lab.table import Console, print_json, show_bytes, show_count, show_flops
from vlmzip.methods import NoCompression
from vlmzip.runtime.fitting import before_the_llm
from vlmzip.runtime.prompt_text import chat_prompt

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    if args.store is not None:
        _ask_store(args)
        return
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


def _ask_store(args: Namespace) -> None:
    """Answer about images of a store, without the vision encoder."""
    from vlmzip.serving.store.reading import Store  # needs pyarrow, an extra

    names, question = args.words[:-1], args.words[-1]
    if not names or not question.strip():
        raise UserError('give images of the store and a question: vlmzip ask --store STORE cat.jpg "What is there?"')
    check_counts(args, "max_new_tokens")
    for option in ("baseline", "overlay", "frames"):
        if getattr(args, option):
            raise UserError(f"--{option} needs the image itself; leave it out, or leave out --store")
    store = Store(args.store)
    for name in names:
        store.row(name)
    acts_inside = _acts_inside(args, store.compressor)
    loaded = load(
        args.model or store.manifest.model, args.device, args.dtype or store.manifest.dtype,
        allow_pickle=args.allow_pickle,
    )  # fmt: skip
    inside = [make_method(args, loaded.family.profile())] if acts_inside else []
    with collecting_warnings() as notes:
        compressed = store.attach(loaded, inside)
    for note in notes:
        log.warning(note)
    check_question(loaded, question)
    prompt = chat_prompt(loaded.family, loaded.processor, question, len(names))
    inputs = store.inputs(loaded, [prompt], [names])
    with spinner("answering"):
        result = answer(loaded, compressed, inputs, args.max_new_tokens)
    out: dict[str, object] = {
        "model": loaded.name,
        "store": str(args.store),
        "compressor": compressed.compressor.to_dict(),
        "question": question,
        "answer": result.text,
        "images": list(map(account_of, names, by_visual(names, result.report))),
        "compressed": asdict(result.account),
        "plain": plain_account(loaded, inputs, result.report),
    }
    if args.json:
        print_json(out)
    else:
        _print_account(out)
        print(f"from {args.store}: the vision encoder did not run")


def _acts_inside(args: Namespace, stored: Compressor) -> bool:
    """Return whether a method was given. Raise `UserError` if it acts before the LLM, where stored images are done."""
    if not args.method_is_given:
        given = ["keep"] * (args.keep is not None) + [name.replace("_", "-") for name in settings(args)]
        if given:
            raise UserError(
                f"the images of the store were compressed by {spec.write(stored)}; leave out --{given[0]}, or add a"
                " method that acts inside the LLM with --method"
            )
        return False
    check_method(args)
    if before := before_the_llm(without_budget(args)):
        raise UserError(
            f"the images of the store were compressed by {spec.write(stored)}, and {before[0].name()} acts before the"
            " LLM, too; give a method that acts inside it, or leave out --method"
        )
    return True


def _print_account(out: dict[str, Any]) -> None:
    plain, compressed, method = out["plain"], out["compressed"], out["compressor"]["method"]
    console = Console(highlight=False, soft_wrap=True)
    if "plain_answer" in out:
        console.print(f"{'plain':<{len(method)}}  {escape(out['plain_answer'])}")
        console.print(f"{method:<5}  [bold]{escape(out['answer'])}[/bold]\n")
    else:
        console.print(f"[bold]{escape(out['answer'])}[/bold]\n")
    table = Table(box=None, pad_edge=False, show_header=False)
    last = sum(image["by_layer"][-1] for image in out["images"])
    inside = last < compressed["visual_tokens"]
    for name, key, show in (
        ("visual tokens, first layer" if inside else "visual tokens", "visual_tokens", show_count),
        ("prompt tokens", "prompt_tokens", show_count),
        ("prefill FLOPs", "prefill_flops", show_flops),
        ("KV cache", "kv_cache_bytes", show_bytes),
    ):
        table.add_row(name, f"{show(plain[key])} → {show(compressed[key])}", f"{plain[key] / compressed[key]:.1f}x")
        if inside and key == "visual_tokens":
            before = plain[key]
            table.add_row("visual tokens, last layer", f"{before} → {last}", f"{before / last:.1f}x")
    for part, spent in compressed["milliseconds"].items():
        # The plain model selects nothing.
        before = None if part == "selection" else plain.get("milliseconds", {}).get(part)
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
