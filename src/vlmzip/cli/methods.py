"""`vlmzip methods [NAME]`: list the compression methods, or the fields of one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from vlmzip import outline
from vlmzip.errors import UserError
from vlmzip.lab.table import print_json, print_table
from vlmzip.outline import Facts, source_letters
from vlmzip.sites import Filters


def run(args: Namespace) -> None:
    if args.name:
        _print_one(args.name, as_json=args.json)
    else:
        _print_all(args)


def _print_all(args: Namespace) -> None:
    filters = Filters(
        args.kind, args.site, args.text_aware, args.trained_weights, args.videos_only, without=args.without
    )
    methods = [facts for facts in map(Facts.of, outline.methods()) if filters.allow(facts)]
    if args.json:
        print_json([asdict(facts) for facts in methods])
        return
    if not methods:
        raise UserError("no method has all these properties; leave out one of the filters")
    letters = source_letters(methods)
    print_table(
        ["method", "kind", "acts at", "reads", "cost", "192 / 128 / 64", "what it does"],
        [
            [
                facts.name,
                facts.kind,
                ", ".join(facts.sites),
                ", ".join(["features", *facts.needs]),
                facts.cost,
                facts.scores_from(letters),
                f"{facts.summary} [{facts.paper}]" if facts.paper else facts.summary,
            ]
            for facts in methods
        ],
    )
    print(
        "acts at: on the pixels, inside the vision encoder, before the LLM (pre_projector, post_projector: before or"
        "\n  after the projector), or inside the LLM (in_llm)"
    )
    print("cost: how time grows with N visual tokens, of which k remain")
    print("192 / 128 / 64: published percent of LLaVA-1.5-7B's score. Compare only values with the same letter:")
    for source, letter in letters.items():
        print(f"  {letter}: {source}")


def _print_one(name: str, *, as_json: bool) -> None:
    from vlmzip import blueprint  # needs pydantic, which the list of all methods does not

    method, fields = blueprint.method(name)
    examples = [f"{method.name}({settings})" for settings in method.values["examples"]]
    if as_json:
        print_json(
            {
                "doc": method.doc,
                **asdict(Facts.of(method)),
                "examples": examples,
                "fields": [asdict(field) for field in fields],
            }
        )
        return
    print(f"{method.name}\n\n{method.doc}\n")
    facts = Facts.of(method)
    print(f"kind: {facts.kind}; cost: {facts.cost}; reads: {', '.join(['features', *facts.needs])}")
    if facts.published:
        print(f"published on LLaVA-1.5-7B at 192 / 128 / 64 tokens: {facts.scores} % of the score")
        print(f"source: {facts.published_in}")
    print()
    print_table(
        ["field", "value", "default", "meaning"],
        [[f"--{field.name}", field.type, str(field.default), field.doc] for field in fields],
    )
    if examples:
        print("\nfor example:")
        print("\n".join(f'  --method "{example}"' for example in examples))
