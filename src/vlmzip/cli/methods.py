"""`vlmzip methods [NAME]`: list the compression methods, or the fields of one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict

from vlmzip import outline
from vlmzip.errors import UserError
from vlmzip.lab.table import print_json, print_table
from vlmzip.outline import Outline


def run(args: Namespace) -> None:
    if args.name:
        _print_one(args.name, as_json=args.json)
    else:
        _print_all(args)


def _print_all(args: Namespace) -> None:
    rows = [_facts(method) for method in outline.methods() if _is_chosen(method, args)]
    if args.json:
        print_json(rows)
        return
    if not rows:
        raise UserError("no method has all these properties; leave out one of the filters")
    print_table(
        ["method", "kind", "acts at", "reads", "cost", "192 / 128 / 64", "what it does"],
        [
            [
                row["name"],
                row["kind"],
                ", ".join(row["sites"]),
                ", ".join(["features", *row["needs"]]),
                row["cost"],
                _scores(row["published"]),
                f"{row['summary']} [{row['paper']}]" if row["paper"] else row["summary"],
            ]
            for row in rows
        ],
    )
    print(
        "cost: growth with N visual tokens and k kept ones. 192 / 128 / 64: published percent of LLaVA-1.5-7B's score;"
    )
    print("sources differ, see `vlmzip methods NAME`.")


def _facts(method: Outline) -> dict[str, object]:
    """Return what the catalogue says of a method, as JSON values."""
    values = method.values
    return {
        "name": method.name,
        "kind": values["kind"],
        "sites": [str(site) for site in values["sites"]],
        "needs": sorted(map(str, values["needs"])),
        "text_aware": method.text_aware,
        "cost": values["cost"],
        "trained_weights": values["trained_weights"],
        "videos_only": values["videos_only"],
        "paper": values["paper"],
        "published": {str(kept): score for kept, score in values["published"].items()},
        "published_in": values["published_in"],
        "summary": method.summary,
    }


def _is_chosen(method: Outline, args: Namespace) -> bool:
    values = method.values
    return (
        args.kind in (None, values["kind"])
        and (args.site is None or args.site in values["sites"])
        and args.text_aware in (None, method.text_aware)
        and not set(values["needs"]) & set(args.without)
    )


def _scores(published: Mapping[str, float]) -> str:
    """Return the published scores at 192, 128 and 64 tokens, "-" for an unknown one; "" if there are none."""
    return " / ".join(str(published.get(kept, "-")) for kept in ("192", "128", "64")) if published else ""


def _print_one(name: str, *, as_json: bool) -> None:
    from vlmzip import blueprint  # needs pydantic, which the list of all methods does not

    method, fields = blueprint.method(name)
    examples = [f"{method.name}({settings})" for settings in method.values["examples"]]
    if as_json:
        print_json(
            {
                "doc": method.doc,
                **_facts(method),
                "examples": examples,
                "fields": [asdict(field) for field in fields],
            }
        )
        return
    print(f"{method.name}\n\n{method.doc}\n")
    facts = _facts(method)
    print(f"kind: {facts['kind']}; cost: {facts['cost']}; reads: {', '.join(['features', *facts['needs']])}")
    if facts["published"]:
        print(f"published on LLaVA-1.5-7B at 192 / 128 / 64 tokens: {_scores(facts['published'])} % of the score")
        print(f"source: {facts['published_in']}")
    print()
    print_table(
        ["field", "value", "default", "meaning"],
        [[f"--{field.name}", field.type, str(field.default), field.doc] for field in fields],
    )
    if examples:
        print("\nfor example:")
        print("\n".join(f'  --method "{example}"' for example in examples))
