"""`compare` as a user runs it: every method a row, no row lost to another, pages that need nothing else."""

import dataclasses
import json
import re
import sys
import types
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmzip import QFormer, TokenMap
from vlmzip.cli.main import main
from vlmzip.compressor import BudgetError, Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.lab.asking import answer
from vlmzip.lab.compare.compare import MethodRow, configure, image_profile
from vlmzip.lab.compare.output import printable
from vlmzip.models.layout import Layout
from vlmzip.runtime.report import compact
from vlmzip.spec import Candidate
from vlmzip.visual_tokens import Grid, Site

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
IMAGE = str(EXAMPLES / "cluttered.png")
QUESTION = (EXAMPLES / "cluttered.txt").read_text().strip()
QUICK = ("--repeats", "1", "--max-new-tokens", "4")


@dataclass(frozen=True, kw_only=True)
class Broken(Compressor):
    keep: float = 0.1

    def token_count(self, grid):
        return 4

    def assign(self, tokens):
        raise RuntimeError("[red]boom")


@dataclass(frozen=True, kw_only=True)
class Unreachable(Compressor):
    def token_count(self, grid):
        return grid.size // 2

    def at_budget(self, keep, profile):
        raise BudgetError("half of them at least")

    def assign(self, tokens):
        raise AssertionError("never asked")


@dataclass(frozen=True, kw_only=True)
class ByImage(Compressor):
    """Keeps 29 of mini's 144 tokens, and does not know it before it has seen them."""

    def assign(self, tokens):
        batch, count, _ = tokens.features.shape
        place = torch.arange(count) - tokens.prefix
        return TokenMap.keep(((place >= 0) & (place % 5 == 0)).expand(batch, count))


@dataclass(frozen=True, kw_only=True)
class Untrained(ByImage):
    trained_weights = True


@dataclass(frozen=True, kw_only=True)
class Small(QFormer):
    depth: int = 1
    width: int = 8
    heads: int = 2


@dataclass(frozen=True, kw_only=True)
class Elsewhere(ByImage):
    sites = (Site.POST_PROJECTOR,)

    site: Site = Site.POST_PROJECTOR


@pytest.fixture
def odd(monkeypatch):
    """Methods that cannot do what is asked, in a module of the user's."""
    module = types.ModuleType("odd_methods")
    for cls in (Broken, Unreachable, ByImage, Untrained, Small, Elsewhere):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "odd_methods", module)
    return lambda *names: ",".join(f"odd_methods:{name}" for name in names)


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(out):
    return {row["method"]: row for row in json.loads(out)["rows"]}


class TestTables:
    def test_every_method_has_a_row_and_the_plain_model_the_first(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        code, out, _ = run(capsys, IMAGE, QUESTION, "--average-keep", "25%", *QUICK)
        assert code == 0
        lines = out.splitlines()
        names = [line.split()[0] for line in lines if re.match(r"\w+ .*\dx ", line)]
        assert names[0] == "no_compression"
        assert {"pool2d", "random_tokens", "visionzip"} < set(names)
        plain, pooled = (next(line for line in lines if line.startswith(name)) for name in ("no_comp", "pool2d"))
        assert re.search(r"bottom left +144 +100\.0% +1\.0x +1\.2\d+ G +1\.8\d+ MiB +\d+\.\d +\d+\.\d +\d+\.\d$", plain)
        assert re.search(r" 36 +25\.0% +4\.0x ", pooled)
        assert "ms, median of 1, " in out
        assert "LLM: projector, prefill and decoding" in out
        assert "float32" in out

    @pytest.mark.parametrize("columns", [80, 100, 120])
    def test_it_fits_and_numbers_are_whole(self, capsys, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        _, out, _ = run(capsys, IMAGE, QUESTION, "--methods", "random_tokens", *QUICK)
        assert max(map(len, out.splitlines())) <= columns
        for whole in ("random_tokens", "11.1%", "9.0x", "MiB", "KiB"):
            assert whole in out
        assert "…" not in out

    def test_another_answer_is_marked(self, capsys):
        # VisionZip takes the star's corner for another at this budget; the demo of the README shows it too.
        _, out, _ = run(capsys, IMAGE, QUESTION, "--methods", "visionzip,pool2d", *QUICK)
        assert "≠ bottom right" in out
        assert "≠ bottom left" not in out
        assert "another answer than no_compression's" in out

    def test_markup_in_a_question_is_printed_not_obeyed(self, capsys):
        _, out, _ = run(capsys, IMAGE, "where is [bold]it[/bold] [/] ?\x1b[31m", "--methods", "pool2d", *QUICK)
        assert "where is [bold]it[/bold] [/] ?" in out
        assert "\x1b" not in out

    def test_markup_in_an_answer_is_printed_not_obeyed(self, capsys, monkeypatch):
        monkeypatch.setattr(
            "vlmzip.lab.compare.compare.answer", lambda *args: dataclasses.replace(answer(*args), text="[red]a[/red]")
        )
        assert run(capsys, IMAGE, QUESTION, "--methods", "pool2d", *QUICK)[1].count("[red]a[/red]") == 2


class TestRowsThatCannotBe:
    def test_a_failing_method_costs_the_others_nothing(self, capsys, odd, tmp_path):
        sheet, page = tmp_path / "sheet.png", tmp_path / "page.html"
        methods = odd("Broken", "Unreachable") + ",pool2d"
        with pytest.raises(SystemExit) as ended:
            run(capsys, IMAGE, QUESTION, "--methods", methods, "--sheet", sheet, "--html", page, *QUICK)
        assert ended.value.code == 1  # a defect, though the table is there
        out, err = capsys.readouterr()
        assert "odd_methods:Broken failed; the notes below the table say why" in err
        assert re.search(r"^odd_methods:Broken \(1\) +\(see the note\) +— ", out, re.M)
        assert re.search(r"^odd_methods:Unreachable \(2\) +\(see the note\) +— ", out, re.M)
        assert "(1) odd_methods:Broken: failed with RuntimeError: [red]boom" in out
        assert "(2) odd_methods:Unreachable: half of them at least" in out
        assert re.search(r"^pool2d .*9\.0x", out, re.M)
        assert sheet.exists()
        assert "half of them at least" in page.read_text()

    def test_a_method_that_breaks_later_gives_its_row_up(self, capsys, odd, monkeypatch):
        calls = []

        def assign(self, tokens):
            calls.append(1)
            if len(calls) > 1:
                raise UserError("only once")
            return ByImage().assign(tokens)

        monkeypatch.setattr(Broken, "assign", assign)
        _, out, _ = run(capsys, IMAGE, QUESTION, "--methods", odd("Broken") + ",pool2d", "--json", *QUICK)
        rows = rows_of(out)
        assert (rows["odd_methods:Broken"]["answer"], rows["odd_methods:Broken"]["note"]) == (None, "only once")
        assert rows["pool2d"]["note"] is None

    def test_counts_that_depend_on_the_image_are_shown_when_asked_for(self, capsys, odd):
        _, out, _ = run(capsys, IMAGE, QUESTION, "--methods", odd("ByImage"), "--json", *QUICK)
        row = rows_of(out)["odd_methods:ByImage"]
        assert row["retention"] == pytest.approx(29 / 144)
        assert row["note"].startswith("runs with its own settings, not at this budget: ")

    @pytest.mark.parametrize(
        ("cls", "reason"), [(ByImage, "no budget"), (Untrained, "to be trained"), (QFormer, "to be trained")]
    )
    def test_and_not_when_all_methods_are_compared(self, cls, reason):
        profile = Profile(Grid(1, 12, 12), 6)
        with pytest.raises(UserError, match=reason):
            configure(Candidate("it", cls(), named=False), "25%", profile)
        assert isinstance(configure(Candidate("it", cls(), named=True), "25%", profile)[0], cls)

    def test_an_untrained_method_says_so_in_a_footnote(self, capsys, odd, tmp_path):
        sheet, page = tmp_path / "sheet.png", tmp_path / "page.html"
        files = ("--sheet", sheet, "--html", page)
        code, out, err = run(capsys, IMAGE, QUESTION, "--methods", odd("Small"), "--json", *files, *QUICK)
        row = rows_of(out)["odd_methods:Small"]
        assert (code, err, set(row["visual_tokens_by_layer"])) == (0, "", {16})
        assert re.match(r"test_compare is untrained: its [\d,]+ weights are random", row["note"])
        assert sheet.exists()
        assert "is untrained" in page.read_text()

    def test_what_attaching_warns_of_is_a_footnote(self, capsys):
        _, out, err = run(capsys, IMAGE, QUESTION, "--methods", "pool2d", "--average-keep", "100%", "--json", *QUICK)
        assert (err, rows_of(out)["pool2d"]["note"]) == (
            "", "pool2d keeps all of an image's 144 visual tokens: it changes nothing"
        )  # fmt: skip

    def test_a_model_without_a_site_says_so_in_a_footnote(self, capsys, odd, monkeypatch):
        monkeypatch.setattr("vlmzip.models.llava.Llava.sites", (Site.PRE_PROJECTOR,))
        code, out, _ = run(capsys, IMAGE, QUESTION, "--methods", odd("Elsewhere"), "--json", *QUICK)
        assert code == 0
        assert "cannot be compressed at site 'post_projector'" in rows_of(out)["odd_methods:Elsewhere"]["note"]


def test_rows_without_an_answer_say_what_to_do(capsys):
    methods = ("--methods", "evs,fastv,llavolta,sparsevlm", "--average-keep", "12%")
    _, out, _ = run(capsys, IMAGE, QUESTION, *methods, *QUICK)
    remedies = dict(re.findall(r"^(\w+) \(\d\) +\((.+?)\) +—", out, re.M))
    assert remedies == {
        "evs": "for videos",
        "fastv": "needs 26%",
        "llavolta": "needs 26%",
        "sparsevlm": "needs 15%",
    }


def test_json_has_what_the_table_has_and_more(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    methods = ("--methods", "pool2d, visionzip,pool2d,no_compression", "--average-keep", "9")
    code, out, _ = run(capsys, IMAGE, IMAGE, QUESTION, *methods, "--json", "--sheet", sheet, *QUICK)
    assert code == 0
    found = json.loads(out)
    assert (found["model"], found["question"], found["average_keep"]) == ("mini", QUESTION, 9)
    assert found["sheet"] == str(sheet)
    assert [image["visual_tokens"] for image in found["images"]] == [144, 144]
    assert [row["method"] for row in found["rows"]] == ["no_compression", "pool2d", "visionzip"]
    row = found["rows"][1]
    assert set(row) == {
        "method", "note", "answer", "differs", "compressor", "visual_tokens_by_layer", "images", "retention",
        "compression_ratio", "prefill_flops", "kv_cache_bytes", "milliseconds",
    }  # fmt: skip
    assert set(row["visual_tokens_by_layer"]) == {18}
    assert row["retention"] == pytest.approx(1 / 16)
    assert row["compression_ratio"] == pytest.approx(16)
    assert row["compressor"]["factor"] == 4
    assert [image["after"] for image in row["images"]] == [9, 9]
    assert set(row["milliseconds"]) == {"vision encoder", "selection", "LLM"}
    assert row["prefill_flops"] < found["rows"][0]["prefill_flops"]
    assert found["timing"] == {
        "repeats": 1, "statistic": "median", "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(),
    }  # fmt: skip


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


class TestPage:
    @pytest.fixture
    def text(self, capsys, tmp_path):
        strange = tmp_path / "<i>&.png"
        Image.open(IMAGE).save(strange)
        path = tmp_path / "page.html"
        question = 'is <script>alert("1")</script> & <b>that</b> red ?'
        assert run(capsys, strange, question, "--methods", "pool2d", "--html", path, *QUICK)[0] == 0
        assert [p.name for p in tmp_path.iterdir() if p.name != strange.name] == ["page.html"]
        return path.read_text(encoding="utf-8")

    def test_nothing_comes_from_outside(self, text):
        assert "://" not in text
        assert "@import" not in text
        for tag, attributes in Elements(text).found:
            assert tag not in ("script", "link", "iframe", "object")
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert "href" not in attributes

    def test_what_the_user_gave_is_escaped(self, text):
        assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &lt;b&gt;" in text
        assert "&lt;i&gt;&amp;.png" in text
        assert not {"script", "b"} & {tag for tag, _ in Elements(text).found}

    def test_it_has_every_method_and_both_lights(self, text):
        tags = [tag for tag, _ in Elements(text).found]
        assert tags.count("article") == tags.count("img") == 2
        assert tags.count("tr") == 3
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport"' in text


class TestSheet:
    def test_one_panel_for_each_method_and_image(self, capsys, tmp_path):
        one, two = tmp_path / "new" / "one.png", tmp_path / "two.png"
        run(capsys, IMAGE, QUESTION, "--methods", "pool2d", "--sheet", one, *QUICK)
        run(capsys, IMAGE, IMAGE, QUESTION, "--methods", "pool2d,visionzip", "--sheet", two, *QUICK)
        assert Image.open(two).width > 1.8 * Image.open(one).width
        assert Image.open(two).height > 1.5 * Image.open(one).height

    def test_a_reader_that_stops_early_does_not_cost_the_files(self, capsys, tmp_path, monkeypatch):
        def stop(*_):
            raise UserError("nobody reads on")

        monkeypatch.setattr("vlmzip.cli.compare._print_tables", stop)
        files = [tmp_path / "sheet.png", tmp_path / "page.html"]
        run(capsys, IMAGE, QUESTION, "--methods", "pool2d", "--sheet", files[0], "--html", files[1], *QUICK)
        assert all(file.stat().st_size for file in files)

    def test_a_failed_write_leaves_nothing(self, capsys, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", fail)
        arguments = ("--methods", "pool2d", "--sheet", tmp_path / "sheet.png")
        code, out, err = run(capsys, IMAGE, QUESTION, *arguments, *QUICK)
        assert (code, err.count("\n")) == (2, 1)
        assert "No space left" in err
        assert "pool2d" in out
        assert list(tmp_path.iterdir()) == []


def test_counts_by_layer_in_few_words():
    assert compact([64, 64, 64]) == "64"
    assert compact([576, 576, *[64] * 30]) == "576×2 → 64×30"


def test_only_printable_text_reaches_the_terminal():
    assert printable(" a\n b\x1b[2J\x07é中 ") == "a b�[2J�é中"


MISTAKES = [
    ([], "required"),
    (["{image}"], "try: vlmzip compare"),
    (["{image}", "w", "--methods", "visionsip"], "did you mean 'visionzip'"),
    (["{image}", "w", "--methods", " ,"], "names no method"),
    (["{image}", "w", "--average-keep", "0"], "--average-keep 0 keeps nothing"),
    (["{image}", "w", "--average-keep", "as-is"], "--average-keep must be a number, got 'as-is'"),
    (["{image}", "w", "--repeats", "0"], "at least 1"),
    (["{image}", "w", "--max-new-tokens", "0"], "at least 1"),
    (["{image}", "w", "--sheet", "{image}"], "choose another name"),
    (["{image}", "w", "--html", "{image}"], "choose another name"),
    (["{image}", "w", "--html", "page.png"], "try page.html"),
    (["{image}", "w", "--html", "."], "is a folder"),
    (["{image}", "w", "--method", "visionzip"], "did you mean '--methods'"),
    (["missing.png", "w"], "no file 'missing.png'"),
    (["{image}", "what is <image> ?"], "must not contain <image>"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(image)
    before = image.read_bytes()
    if not (arguments and "<image>" in arguments[-1]):  # only the model's own placeholder can be known no sooner
        monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    code, out, err = run(capsys, *[a.format(image=image) for a in arguments])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("vlmzip: ")
    assert message in err
    assert image.read_bytes() == before
    assert list(tmp_path.iterdir()) == [image]


def test_times_are_medians_of_the_runs():
    row = MethodRow("it", spent=[{"LLM": 1.0}, {"LLM": 9.0}, {"LLM": 2.0}])
    assert row.milliseconds == {"LLM": 2.0}


def test_budgets_are_set_for_the_largest_image():
    grids = [Grid(1, 4, 4), Grid(1, 6, 6), Grid(1, 5, 5)]
    images = [types.SimpleNamespace(layout=Layout.of_one_view(grid)) for grid in grids]
    tiled = types.SimpleNamespace(layout=Layout((Grid(1, 4, 4), Grid(1, 3, 8)), torch.arange(40)))
    plain = types.SimpleNamespace(report=types.SimpleNamespace(images=images))
    loaded = types.SimpleNamespace(family=types.SimpleNamespace(profile=lambda: Profile(Grid(1, 9, 9), 4)))
    assert image_profile(loaded, plain) == Profile(Grid(1, 6, 6), 4)
    images.append(tiled)
    assert image_profile(loaded, plain) == Profile(Grid(1, 4, 4), 4, tiles=(Grid(1, 3, 8),))


def test_a_layer_that_the_llm_has_not_is_said_in_a_footnote(capsys):
    _, out, _ = run(
        capsys, IMAGE, QUESTION, "--methods", "kmeans(site=in_llm,layer=8),fastv(layer=40)", "--json", *QUICK
    )
    for row in rows_of(out).values():
        assert "layer must be from 1 to 7 in this LLM of 8 layers" in (row["note"] or "plain") or row["note"] is None
    assert sum(bool(row["note"]) for row in rows_of(out).values()) == 2
