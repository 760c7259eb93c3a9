"""`vlmzip models`: list the model families that can be compressed."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from vlmzip import outline
from vlmzip.lab.table import print_json, print_table


def run(args: Namespace) -> None:
    rows: list[dict[str, Any]] = [
        {
            "family": family.name,
            "model_types": list(family.values["model_types"]),
            "sites": [str(site) for site in family.values["sites"]],
            "example": family.values["example"],
        }
        for family in outline.families()
    ]
    if args.json:
        print_json(rows)
        return
    print_table(
        ["family", "model types", "sites", "example"],
        [[row["family"], ", ".join(row["model_types"]), ", ".join(row["sites"]), row["example"]] for row in rows],
    )
    print("\nOther models that have get_image_features, such as InternVL and Gemma 3, go through a default family.")
    print("in_llm: not in LLMs with sliding windows (PaliGemma 2), linear attention or convolutions.")
    print("mini, the small model that ships with vlmzip, is a llava; --model takes any checkpoint of these families.")
