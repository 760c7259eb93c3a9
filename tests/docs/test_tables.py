"""The pages' tables agree with committed results, and `--check` notices where they do not."""

import csv

import pytest

import vlmzip
from vlmzip.lab.conformance.results import Checked, committed, models_of

COLUMNS = ("task", "method", "budget", "score", "low", "high", "reached", "note")
STUDY = [
    ("mini", "no_compression", "100%", "88.00", "86.90", "89.10", "1.0000", ""),
    ("mini", "pool2d", "50%", "", "", "", "", "the nearest to 50.0% that it has is 25.0%"),
    ("mini", "pool2d", "25%", "76.25", "75.00", "77.50", "0.2500", ""),
    ("mini", "dfmr", "50%", "80.00", "79.00", "81.20", "0.5556", ""),
    ("mini", "dfmr", "25%", "70.00", "69.00", "71.00", "0.2500", ""),
    ("mini", "qformer", "50%", "", "", "", "", "left out"),
    ("mini", "qformer", "25%", "", "", "", "", "left out"),
    ("easy-vqa:transfer", "dfmr", "25%", "50.00", "49.00", "51.00", "0.2500", ""),
]
#: Of `vlmzip bench`, a row for each scope; all files begin with the plain model.
BENCH = {"preset": "llava-1.5-7b", "attention": "sdpa", "layers": "32", "visual_tokens_before": "576", "batch": "8"}
BENCH |= {"kv_bytes": 2**28, "peak_bytes": 2**29, "tokens_per_second": "48.04", "flops_limit": "5.104"}
PLAIN = BENCH | {"method": "no_compression", "speed_up": "1.000", "share_of_limit": "1.000"}
SMALL = BENCH | {"speed_up": "4.683", "share_of_limit": "0.918"}
COST = {"dtype": "bfloat16", "batch": "1", "median_ms": "7.0", "time_ratio": "1.2329", "time_ratio_q1": "1.2084"}
COST |= {"time_ratio_q3": "1.2569", "selection_over_encoder": "0.20557", "memory_ratio": "1.166", "peak_mib": "21.7"}
README = ("published", "measured", "models", "methods")
VIDEO = {"time_ratio": "1.0500", "time_ratio_q1": "1.0100", "time_ratio_q3": "1.1000", "memory_ratio": "1.081"}
VIDEO |= {"model": "qwen3_vl", "peak_mib": "30.2", "median_ms": "100.4", "tokens_after": "512"}
BLOCKS = ("selection on a GPU", "prefill on a GPU", "first token on a GPU", "memory on a GPU")
ON_VIDEOS = "selection on videos"
ON_A_CPU = "full width on a CPU"
OF_EACH = "selection of each method"
ON_MINI = "every method on mini"
#: Of methods_on_mini.py: which of 16 questions each method answers rightly at 25 %.
RIGHT = {
    ("no_compression", "contiguous"): "1" * 16,
    ("kmeans", "contiguous"): "1" * 12 + "0" * 4,
    ("kmeans", "original"): "1" * 14 + "0" * 2,
    ("random_tokens", "original"): "1" * 6 + "0" * 10,
    ("scope", "contiguous"): "1" * 13 + "0" * 3,
}
#: Of selection_by_method.py, a row for each method, setting, budget and size.
SELECTION = {"method": "evs", "setting": "", "keep": "a ninth", "note": ""}
UNMEASURED = {"milliseconds": "", "peak_mib": "", "time_over_encoder_of_input": ""}


@pytest.fixture
def tables(maker):
    return maker("tables")


@pytest.fixture
def root(tmp_path):
    """A repository with two pages, a full study, and two runs and one selection on a GPU."""
    (tmp_path / "README.md").write_text("".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in README))
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    with (results / "mini-study.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *STUDY])
    (tmp_path / "docs").mkdir()
    blocks = (f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in (*BLOCKS, ON_VIDEOS, ON_A_CPU, OF_EACH, ON_MINI))
    study = "above\n\n<!-- results -->\nold\n<!-- end of results -->\n\nbelow\n"
    (tmp_path / "docs" / "results.md").write_text(study + "".join(blocks))
    for name, changed in {"batch8": {}, "batch32": {"batch": "32"}, "eager": {"attention": "eager"}}.items():
        rows = [
            row | {"scope": scope, "ms": ms} | changed
            for row in (PLAIN, *(SMALL | {"method": method} for method in ("visionzip", "fastv", "sparsevlm")))
            for scope, ms in (("LLM prefill", "142.31"), ("TTFT", "154.67"))
        ]
        write(results / f"bench-{name}-NVIDIA-H200-x-scale1-x.csv", rows)
    write(results / "bench-a-AMD-1-thread-x-scale0.125-x.csv", [PLAIN])
    quartiles = {"speed_up_q1": "4.6", "speed_up_q3": "4.7", "visual_tokens": "64", "repeats": "3"}
    rows = [
        row | quartiles | {"scope": scope, "ms": ms}
        for row in (PLAIN, SMALL | {"method": "pool2d"})
        for scope, ms in (("LLM prefill", "44690.26"), ("TTFT", "47965.85"))
    ]
    write(results / "bench-a-AMD-1-thread-x-scale1-x.csv", rows)
    write(results / "selection-cost-NVIDIA-H200-x.csv", [COST] * 3)
    of_methods = {"plain": "0.00000", "evs(keep=25%)": "0.03711"}
    for_videos = [
        VIDEO | {"frames": frames, "method": method, "selection_over_encoder": share}
        for frames in (64, 8)
        for method, share in of_methods.items()
    ]
    write(results / "video-cost-AMD-x.csv", for_videos)
    of_each = [
        SELECTION | {"tokens": str(size), "milliseconds": ms, "peak_mib": mib, "time_over_encoder_of_input": share}
        for size, ms, mib, share in ((100, "10", "2.0", "0.01234"), (1000, "1000", "20.4", "0.15"))
    ]
    slow = {"setting": "k=2 n=3", "tokens": "1000", "note": "more than 60 s"}
    write(results / "selection-by-method.csv", [*of_each, SELECTION | UNMEASURED | slow])
    on_mini = [
        {
            "budget": "100%" if method == "no_compression" else "25%", "method": method, "setting": "",
            "positions": positions, "reached": "1.0" if method == "no_compression" else "0.2500",
            "accuracy": f"{100 * right.count('1') / 16:.2f}", "standard_error": "10.00", "right": right,
        }
        for (method, positions), right in RIGHT.items()
    ]  # fmt: skip
    missed = [on_mini[4] | {"budget": "50%", "reached": "0.4000", "setting": "site=in_llm layer=1"}]
    cannot = [on_mini[3] | {"budget": "50%", "accuracy": "", "standard_error": "", "reached": "", "right": ""}]
    write(results / "methods-on-mini.csv", [*on_mini, *missed, *cannot])
    return tmp_path


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_pages_agree_with_the_committed_results(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_has_methods_models_and_two_tables_of_numbers(tables, root):
    assert tables.main([], root) == 0
    lines = (root / "README.md").read_text().splitlines()
    pool2d, fastv, evs = (f"[`{name}`](docs/methods.md#{name})" for name in ("pool2d", "fastv", "evs"))
    groups = [line.split(" | ") for line in lines[lines.index("<!-- methods -->") + 3 :]]
    place_of = {
        name: tuple(group[:2]) for group in groups if len(group) == 3 for name in group[2].strip(" |").split(", ")
    }
    assert place_of[pool2d] == ("| before the LLM", "the visual tokens")
    assert place_of[fastv] == ("| inside the LLM", "the question")
    assert place_of[evs] == ("| on videos", "the visual tokens")
    assert len(place_of) == len(vlmzip.available())
    assert lines[lines.index("<!-- published -->") + 5] == "| `visionzip` | 98.5 | 97.6 | 94.0 |"  # the paper's Table 1
    measured = lines.index("<!-- measured -->")
    assert lines[measured + 3 : measured + 5] == [
        "| LLaVA-1.5-7B, 576 | 8 | 142 ms | 4.7x (5.1x) | 4.7x (5.1x) | 256 MiB | 256 MiB |",
        "<!-- end of measured -->",
    ]


def test_every_method_on_mini_with_the_simplest_that_it_beats(tables, root):
    assert tables.main([], root) == 0
    lines = (root / "docs" / "results.md").read_text().splitlines()
    start = lines.index(f"<!-- {ON_MINI} -->")
    assert lines[start + 1 : lines.index(f"<!-- end of {ON_MINI} -->")] == [
        "| method | positions | 25% | 50% |",
        "| --- | --- | --- | --- |",
        "| `no_compression`, all tokens | | 100.0 ± 19.6 | |",
        "| `kmeans` | contiguous | 75.0 ± 19.6 r | — |",
        "| `kmeans` | original | 87.5 ± 19.6 r | — |",
        "| `random_tokens` | original | 37.5 ± 19.6 | — |",
        "| `scope` | contiguous | 81.2 ± 19.6 r | — |",
        "| `scope(site=in_llm, layer=1)` | contiguous | — | 81.2 ± 19.6 (40.0%) |",
    ]


def test_speed_in_vllm_by_concurrency(tables):
    row = {"method": "stock", "concurrency": "1", "ratio": "1.0", "share_of_limit": "1.0", "ttft_ratio": "1.0"}
    zipped = row | {"method": "visionzip(keep=64)", "ratio": "5.683", "share_of_limit": "0.8346", "ttft_ratio": "5.71"}
    busy = {"concurrency": "16", "ratio": "6.1", "share_of_limit": "0.9", "ttft_ratio": "4.6"}
    assert tables.vllm_table([row, zipped, row | busy, zipped | busy]) == [
        "| method | requests/s at 1 | requests/s at 16 | first token at 1 | first token at 16 |",
        "| --- | --- | --- | --- | --- |",
        "| `visionzip(keep=64)` | 5.7x (83%) | 6.1x (90%) | 5.7x sooner | 4.6x sooner |",
    ]


def test_the_kv_cache_at_its_peak_in_vllm_by_concurrency_and_length_of_answers(tables):
    row = {"method": "stock", "new_tokens": "1", "concurrency": "1", "peak_kv_tokens": "640"}
    stock = [row, row | {"concurrency": "32", "peak_kv_tokens": "5632"}]
    longer = [stock[0] | {"new_tokens": "32"}, stock[1] | {"new_tokens": "32", "peak_kv_tokens": "20480"}]
    zipped = {("1", "1"): "128", ("1", "32"): "3456", ("32", "1"): "128", ("32", "32"): "4096"}
    rows = [*stock, *longer]
    rows += [
        {"method": "visionzip(keep=64)", "new_tokens": length, "concurrency": level, "peak_kv_tokens": peak}
        for (length, level), peak in zipped.items()
    ]
    assert tables.vllm_kv_table(rows) == [
        "| method | tokens of an answer | KV cache at 1 | KV cache at 32 |",
        "| --- | --- | --- | --- |",
        "| `visionzip(keep=64)` | 1 | 0.20x | 0.61x |",
        "| `visionzip(keep=64)` | 32 | 0.20x | 0.20x |",
    ]


def test_parts_of_a_request_to_vllm_at_the_lowest_and_highest_concurrency(tables):
    parts = {"pixels_ms": "1.9", "encoder_ms": "48.5", "compression_ms": "0.0", "projector_ms": "15.0"}
    row = {"method": "stock", "concurrency": "1", **parts, "llm_ms": "1285.0", "rest_ms": "5.8"}
    pooled = row | {"method": "pool2d(factor=3)", "llm_ms": "174.0"}
    rows = [both | {"concurrency": level} for level in ("1", "4", "16") for both in (row, pooled)]
    assert tables.vllm_parts_table(rows) == [
        "| method | concurrency | image to pixels | vision encoder | compression | projector | LLM | rest | together |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| no compressor | 1 | 1.9 | 48.5 | 0.0 | 15.0 | 1285.0 | 5.8 | 1356 |",
        "| `pool2d(factor=3)` | 1 | 1.9 | 48.5 | 0.0 | 15.0 | 174.0 | 5.8 | 245 |",
        "| no compressor | 16 | 1.9 | 48.5 | 0.0 | 15.0 | 1285.0 | 5.8 | 1356 |",
        "| `pool2d(factor=3)` | 16 | 1.9 | 48.5 | 0.0 | 15.0 | 174.0 | 5.8 | 245 |",
    ]


def test_models_are_grouped_by_the_methods_that_work(tables):
    def checked(folder, **statuses):
        cells = {method: {"image": [statuses.get(method, "works"), ""]} for method in ("kmeans", "visionzip", "fastv")}
        return Checked(folder, "", "", "", "", {"no_compression": {"image": ["works", ""]}} | cells)

    refused = checked("c", no_compression="refused", kmeans="refused", visionzip="refused", fastv="refused")
    untried = Checked("d", "", "", "refused", "why", {})
    models = [checked("a"), checked("qwen3_vl"), refused, untried, checked("llava"), checked("gemma3", fastv="refused")]
    assert tables.models_table(models)[2:] == [
        "| LLaVA-1.5, Qwen3-VL, 1 more | ✓ | ✓ | ✓ |",
        "| Gemma 3 | ✓ | ✓ | – |",
    ]


def test_every_well_known_model_is_in_the_table(tables):
    assert tables.KNOWN.keys() <= {model.folder for model in models_of(committed()) if model.status == "works"}


def test_a_study_becomes_a_table(tables, root):
    assert tables.main([], root) == 0
    text = (root / "docs" / "results.md").read_text().partition("<!-- selection")[0]
    assert text == (
        "above\n\n<!-- results -->\n"
        "| method | 50% | 25% |\n"
        "| --- | --- | --- |\n"
        "| `no_compression`, all tokens | 88.0 ± 1.1 | |\n"
        "| `pool2d` | — | 76.2 ± 1.2 |\n"
        "| `dfmr` | 80.0 ± 1.1 (55.6%) | 70.0 ± 1.0 |\n"
        "<!-- end of results -->\n\nbelow\n"
    )
    assert tables.main(["--check"], root) == 0


def test_runs_on_a_gpu_become_tables(tables, root):
    tables.main([], root)
    lines = (root / "docs" / "results.md").read_text().splitlines()
    prefill, first, memory = (lines.index(f"<!-- {name} -->") for name in BLOCKS[1:])
    selection = lines.index(f"<!-- {BLOCKS[0]} -->")
    assert lines[selection : selection + 5] == [
        "<!-- selection on a GPU -->",
        "| dtype | images | plain ms | visionzip, time (quartiles) | selection | peak | eager, time | peak |",
        "| --- " * 8 + "|",
        "| bfloat16 | 1 | 7.0 | 1.23x (1.21 to 1.26) | 20.6% | 1.17x (22 MiB) | 1.23x | 1.17x (22 MiB) |",
        "<!-- end of selection on a GPU -->",
    ]
    assert lines[prefill + 1] == "| preset | batch | plain ms | limit | `visionzip` | `fastv` | `sparsevlm` |"
    assert lines[prefill + 3 : prefill + 6] == [
        "| `llava-1.5-7b` | 8 | 142.3 | 5.10x | 4.68x, 92% | 4.68x, 92% | 4.68x, 92% |",
        "| `llava-1.5-7b` | 32 | 142.3 | 5.10x | 4.68x, 92% | 4.68x, 92% | 4.68x, 92% |",
        "| `llava-1.5-7b`, eager | 8 | 142.3 | 5.10x | 4.68x, 92% | 4.68x, 92% | 4.68x, 92% |",
    ]
    assert lines[first + 3] == "| `llava-1.5-7b` | 8 | 154.7 | 5.10x | 4.68x, 92% | 4.68x, 92% | 4.68x, 92% |"
    assert lines[memory + 3] == "| `llava-1.5-7b` | 8 | 256 | 256 | 256 | 512 | 512 | 512 | 48.0 | 48.0 | 48.0 |"


def test_runs_of_full_width_on_a_cpu_become_a_table(tables, root):
    tables.main([], root)
    lines = (root / "docs" / "results.md").read_text().splitlines()
    table = lines.index(f"<!-- {ON_A_CPU} -->")
    faster = "4.68x (4.60 to 4.70) | 5.10x | 92%"
    assert lines[table + 3 : table + 6] == [
        "| `llava-1.5-7b` | `no_compression` | 64 | 44.7 |  |  |  | 48.0 |  |  |  | 256 | 3 |",
        f"| `llava-1.5-7b` | `pool2d` | 64 | 44.7 | {faster} | 48.0 | {faster} | 256 | 3 |",
        f"<!-- end of {ON_A_CPU} -->",
    ]


def test_costs_on_videos_become_a_table(tables, root):
    tables.main([], root)
    lines = (root / "docs" / "results.md").read_text().splitlines()
    table = lines.index(f"<!-- {ON_VIDEOS} -->")
    columns = "tokens of 64 frames | time (quartiles) | peak memory | selection, 8 frames | selection, 64 frames"
    assert lines[table + 1 : table + 6] == [
        f"| model | method | {columns} |",
        "| --- " * 7 + "|",
        "| `qwen3_vl` | plain encoder | 512 | 1.05x (1.01 to 1.10) | 1.08x (30 MiB) | 100 ms | 100 ms |",
        "| `qwen3_vl` | `evs(keep=25%)` | 512 | 1.05x (1.01 to 1.10) | 1.08x (30 MiB) | 3.7% | 3.7% |",
        f"<!-- end of {ON_VIDEOS} -->",
    ]


def test_check_notices_a_difference_and_writes_nothing(tables, root, capsys):
    tables.main([], root)
    text = (root / "docs" / "results.md").read_text().replace("76.2", "79.2")
    (root / "docs" / "results.md").write_text(text)
    assert tables.main(["--check"], root) == 1
    out, err = capsys.readouterr()
    assert "-| `pool2d` | — | 79.2 ± 1.2 |" in out
    assert "docs/results.md differs from the committed results" in err
    assert (root / "docs" / "results.md").read_text() == text


@pytest.mark.parametrize("text", ["nothing", "<!-- models -->\n<!-- models -->\n<!-- end of models -->"])
def test_a_readme_without_its_comments_is_an_error(tables, root, text):
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match="there should be one"):
        tables.main(["--check"], root)


def test_costs_of_each_method_become_a_table(tables, root):
    tables.main([], root)
    lines = (root / "docs" / "results.md").read_text().splitlines()
    start = lines.index(f"<!-- {OF_EACH} -->")
    assert lines[start + 1 : start + 6] == [
        "| method | keep | 100 | 1,000 | grows with tokens to the power |",
        "| --- " * 5 + "|",
        "| `evs` | a ninth | 1.23% / 2 MiB | 15.00% / 20 MiB | 2.0 / 1.0 |",
        "| `evs(k=2, n=3)` | a ninth |  | more than 60 s |  |",
        f"<!-- end of {OF_EACH} -->",
    ]
