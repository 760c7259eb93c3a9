"""`vlmzip methods [NAME]`: list the compression methods, or the fields of one."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from vlmzip import outline
from vlmzip.lab.table import print_json, print_table


def run(args: Namespace) -> None:
    if args.name:
        _print_one(args.name, as_json=args.json)
    else:
        _print_all(as_json=args.json)


def _print_all(*, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "sites": [str(site) for site in method.values["sites"]],
            "needs": sorted(map(str, method.values["needs"])),
            "paper": method.values["paper"],
            "summary": method.summary,
        }
        for method in outline.methods()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["method", "acts at", "looks at", "what it does", "from"],
        [
            [row["name"], ", ".join(row["sites"]), ", ".join(["features", *row["needs"]]), row["summary"], row["paper"]]
            for row in rows
        ],
    )


def _print_one(name: str, *, as_json: bool) -> None:
    from vlmzip import catalogue  # needs torch, which the list of all methods does not

    cls = catalogue.find(name)
    fields = catalogue.describe(cls)
    if as_json:
        print_json(
            {
                "name": cls.name(),
                "doc": inspect.getdoc(cls),
                "paper": cls.paper,
                "examples": [f"{cls.name()}({settings})" for settings in cls.examples],
                "fields": [asdict(f) for f in fields],
            }
        )
        return
    print(f"{cls.name()}\n\n{inspect.getdoc(cls)}\n")
    print_table(
        ["field", "value", "default", "meaning"], [[f"--{f.name}", f.type, str(f.default), f.doc] for f in fields]
    )
    if cls.examples:
        print("\nfor example:")
        print("\n".join(f'  --method "{cls.name()}({settings})"' for settings in cls.examples))
