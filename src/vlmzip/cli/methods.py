"""`vlmzip methods [NAME]`: list the compression methods, or the fields of one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from vlmzip import outline
from vlmzip.lab.table import print_json, print_table


def run(args: Namespace) -> None:
    if args.name:
        _print_one(args.name, as_json=args.json)
    else:
        _print_all(as_json=args.json)


def _print_all(*, as_json: bool) -> None:
    rows = [
        (
            method.name,
            [str(site) for site in method.values["sites"]],
            sorted(map(str, method.values["needs"])),
            method.summary,
            method.values["paper"],
        )
        for method in outline.methods()
    ]
    if as_json:
        print_json(
            [
                {"name": name, "sites": sites, "needs": needs, "paper": paper, "summary": summary}
                for name, sites, needs, summary, paper in rows
            ]
        )
        return
    print_table(
        ["method", "acts at", "looks at", "what it does", "from"],
        [
            [name, ", ".join(sites), ", ".join(["features", *needs]), summary, paper]
            for name, sites, needs, summary, paper in rows
        ],
    )


def _print_one(name: str, *, as_json: bool) -> None:
    from vlmzip import blueprint  # needs pydantic, which the list of all methods does not

    method, fields = blueprint.method(name)
    examples = [f"{method.name}({settings})" for settings in method.values["examples"]]
    if as_json:
        print_json(
            {
                "name": method.name,
                "doc": method.doc,
                "paper": method.values["paper"],
                "examples": examples,
                "fields": [asdict(field) for field in fields],
            }
        )
        return
    print(f"{method.name}\n\n{method.doc}\n")
    print_table(
        ["field", "value", "default", "meaning"],
        [[f"--{field.name}", field.type, str(field.default), field.doc] for field in fields],
    )
    if examples:
        print("\nfor example:")
        print("\n".join(f'  --method "{example}"' for example in examples))
