"""`vlmzip models`: the families that can be compressed."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from vlmzip.cli.tables import print_table

HELP = "list the model families that vlmzip can compress"
EXAMPLES = """  vlmzip models
  vlmzip models --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> None:
    from vlmzip.models import FAMILIES

    rows: list[dict[str, Any]] = [
        {
            "family": family.__module__.rpartition(".")[2],
            "model_types": list(family.model_types),
            "sites": [str(s) for s in family.sites],
            "example": family.example,
        }
        for family in FAMILIES
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["family", "model types", "sites", "example"],
        [[row["family"], ", ".join(row["model_types"]), ", ".join(row["sites"]), row["example"]] for row in rows],
    )
    print("\nin_llm: not in LLMs with sliding-window layers, such as PaliGemma 2's.")
    print("mini, the small model that ships with vlmzip, is a llava; --model takes any checkpoint of these families.")
