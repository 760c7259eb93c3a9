"""mini's test questions as a task in lmms-eval's format, images as files: nothing has to be fetched.

    python -m tests.lmms.mini_as_task FOLDER --limit 300

writes the task `mini_exact`, for `vlmzip eval --suite mini_exact --include-path FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlmzip.lab.tasks.mini import mini_task

YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: {length}
  do_sample: false
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""

UTILS = '''\
"""How questions are asked and scored: as `vlmzip eval` does it."""

from PIL import Image

from vlmzip.lab.tasks.metrics import exact


def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def question(doc):
    return doc["question"]


def score(doc, results):
    return {"exact": exact(results[0], [doc["answer"]])}
'''


def write_task(folder: Path, limit: int, task: str = "mini_exact") -> None:
    """Write the first `limit` questions as a task of that name."""
    asked = mini_task(limit)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in asked.samples:
        image = (folder / f"{sample.image}.png").resolve()
        if not image.exists():
            sample.load().save(image)
        lines.append({"image": str(image), "question": sample.question, "answer": sample.answers[0]})
    data = (folder / f"{task}.jsonl").resolve()
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    yaml = YAML.format(task=task, data=json.dumps(str(data)), length=asked.max_new_tokens)
    (folder / f"{task}.yaml").write_text(yaml.replace("utils.", f"{task}_utils."))
    (folder / f"{task}_utils.py").write_text(UTILS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    write_task(args.folder, args.limit)
    print(f"written: the task mini_exact in {args.folder}")
