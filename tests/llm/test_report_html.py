"""report.html: of one run, as it ends and anew, and of several."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt.errors import RunFolderError
from discopt_llm import report
from discopt_llm.bank_search import CompressRequest, QuantizeRequest
from discopt_llm.drop_search import DropRequest
from discopt_llm.report_html import run_page
from discopt_llm.report_maps import start_of
from discopt_llm.report_record import RunRecord
from discopt_llm.report_several import Comparison
from tests.documents import change, lines, read_document, rewrite, rewrite_lines
from tests.llm.commands import call, refusal
from tests.llm.searches import run

HOSTILE = "<script>alert('x')</script>&\"' \x01"
KINDS = ("quantize", "learning", "drop", "mixed", "interrupted")


class Page(HTMLParser):
    """A page's tags, which must be balanced, its words, and what it points at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(small: dict[str, Any], banks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of several kinds, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    compared = {**small, "start": None, "baselines": None}
    requests = {
        "quantize": QuantizeRequest(**compared, bits="3", banks=(banks["quantization"],)),
        "learning": QuantizeRequest(**{**compared, "algorithm": "learning"}, bits="3", banks=(banks["quantization"],)),
        "drop": DropRequest(**compared, sparsity=0.25, unit="block"),
        "mixed": CompressRequest(**compared, size="0.4x", banks=tuple(banks.values())),
        "interrupted": DropRequest(**small, sparsity=0.25),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_draw", lambda *_: [])
        for name, request in requests.items():
            if name == "interrupted":
                patch.setattr("discopt.run._Run._record", _interrupt)
            run(request, folder / name)
    return {name: folder / name for name in requests}


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Runs of one's own."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in runs.items()}


def page_of(path: Path) -> Page:
    return Page(run_page(RunRecord.read(path)))


def as_older(path: Path) -> Path:
    """The run as it was left before it kept what reports need."""
    for name in ("heldout.json", "units.json", "report.html"):
        (path / name).unlink()
    results = read_document(path / "results.json")
    rewrite(path / "results.json", {k: v for k, v in results.items() if k not in ("settings", "command_line")})
    trace = path / "trace.jsonl"
    rewrite_lines(trace, [{k: v for k, v in line.items() if k != "moved"} for line in lines(trace)])
    return path


# -- one run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_one_file_that_needs_no_other(runs: dict[str, Path], kind: str) -> None:
    text = (runs[kind] / "report.html").read_text()
    page = Page(text)
    tags = {name for name, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    for link in page.all("a"):
        assert link["href"] is not None
        assert (runs[kind] / link["href"]).is_file()
    assert all(picture.get("aria-label") or picture.get("aria-hidden") for picture in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    headings = [name for name, _ in page.tags if re.fullmatch(r"h\d", name)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in pairwise(headings))


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_makes_the_page_that_the_run_left(copied: dict[str, Path], kind: str) -> None:
    target = copied[kind] / "report.html"
    before = target.read_text()
    change(copied[kind] / "results.json", seed=123456)
    assert call("report", copied[kind]).stdout == f"report: {target}\n"
    assert target.read_text() == before.replace("<dt>Seed</dt><dd>0</dd>", "<dt>Seed</dt><dd>123456</dd>")
    assert json.loads(call("report", copied[kind], "--json").stdout) == {"report": str(target)}


def test_the_report_has_the_question_the_answer_and_the_way_back(runs: dict[str, Path]) -> None:
    results = read_document(runs["quantize"] / "results.json")
    page = page_of(runs["quantize"])
    assert "Asked: an average of 3 bits." in page.text
    assert results["command_line"] in page.text
    assert "Algorithm evopress" in page.text
    learning = page_of(runs["learning"]).text
    assert "Algorithm learning" in learning
    assert re.search(r"[\d,]+ tokens to search on; [\d,]+ for the final choice", learning)
    assert "The final choice, on " in learning
    for row in results["rows"]:
        assert f"{row['tokens']:,}" in page.text
        assert page.words.count(row["method"]) >= 1
    for measure, shown in (("bits", "{:.3f}"), ("bpw", "{:.3f}"), ("size", "{:.4f}"), ("bytes", "{:,}")):
        assert shown.format(results["met"][measure]) in page.text
    for name, version in read_document(runs["quantize"] / "run.json")["versions"].items():
        assert f"{name} {version}" in page.text


def test_the_intervals_are_those_of_the_sequences(copied: dict[str, Path]) -> None:
    path = copied["quantize"] / "heldout.json"
    data = read_document(path)
    rows = read_document(copied["quantize"] / "results.json")["rows"]
    assert data["methods"] == [row["method"] for row in rows]
    assert [np.mean(kl) for kl in data["kl"]] == pytest.approx([row["kl"] for row in rows])
    assert [np.exp(np.mean(nll)) for nll in data["nll"]] == pytest.approx([row["perplexity"] for row in rows])
    found, uniform = data["methods"].index("evolved"), data["methods"].index("uniform")
    data["kl"][uniform] = [value + 0.5 for value in data["kl"][found]]
    rewrite(path, data)
    assert "better −0.5 [−0.5, −0.5]" in page_of(copied["quantize"]).text
    data["kl"][uniform] = [value - 0.25 for value in data["kl"][found]]
    rewrite(path, data)
    text = page_of(copied["quantize"]).text
    assert "worse +0.25 [+0.25, +0.25]" in text
    assert re.search(r"the profile found is [^.]*worse than uniform", text)


def test_the_map_shows_every_unit_with_its_level(runs: dict[str, Path]) -> None:
    record = RunRecord.read(runs["quantize"])
    text = run_page(record)
    for unit, name in enumerate(record.units.names):
        words = f"{name}: {record.profile.labels[unit]} bits, "
        assert words in text
    dropped = page_of(runs["drop"])
    assert dropped.words.count("×") == 2 * 2  # two blocks, at both of their places
    assert page_of(runs["mixed"]).words.count("×") == sum(
        label == "drop" for label in RunRecord.read(runs["mixed"]).profile.labels
    )


def test_the_moves_begin_at_the_start_and_end_at_the_answer(runs: dict[str, Path]) -> None:
    record = RunRecord.read(runs["quantize"])
    assert record.moves is not None
    start = start_of(record.moves, record.profile.levels)
    moved = int(np.count_nonzero(start != record.profile.levels))
    assert record.units.n > moved > 0
    text = page_of(runs["quantize"]).text
    assert f"ended with {moved} of {record.units.n} units on another level" in text
    for move in record.moves:
        for unit, *_ in move.changes:
            assert move.generation == 0 or record.units.names[unit] in text


def test_moves_that_do_not_end_at_the_answer_are_not_shown(copied: dict[str, Path]) -> None:
    path = copied["quantize"] / "trace.jsonl"
    *before, last = lines(path)
    rewrite_lines(path, [*before, {**last, "moved": [[0, 1, 99]]}])
    assert RunRecord.read(copied["quantize"]).moves is None


@pytest.mark.parametrize("kind", ["quantize", "drop", "mixed"])
def test_an_older_run_has_a_report_that_says_what_is_missing(copied: dict[str, Path], kind: str) -> None:
    before = read_document(copied[kind] / "units.json")
    record = RunRecord.read(as_older(copied[kind]))
    assert [[list(place) for place in places] for places in record.units.places] == before["places"]
    page = page_of(copied[kind])
    for words in (
        "has not kept its losses on each sequence",
        "has not written down what its levels cost",
        "has not kept how its best profile changed",
        "The command is in report.md",
        "as the preset demo has it",
    ):
        assert words in page.text
    assert "better than" not in page.text


def test_a_run_that_was_stopped_says_so(runs: dict[str, Path]) -> None:
    text = page_of(runs["interrupted"]).text
    assert "The run is not finished (interrupted; resume to go on)" in text
    assert "so there is no picture of it" in text


def test_losses_of_an_earlier_table_are_left_out(copied: dict[str, Path]) -> None:
    path = copied["quantize"] / "heldout.json"
    change(path, methods=["another", *read_document(path)["methods"][1:]])
    assert RunRecord.read(copied["quantize"]).samples is None


def test_names_cannot_put_anything_into_the_page(copied: dict[str, Path]) -> None:
    path = copied["quantize"]
    request = read_document(path / "run.json")
    change(path / "run.json", options={**request["options"], "model": HOSTILE, "calibration": HOSTILE})
    results = read_document(path / "results.json")
    results["rows"][1]["method"] = HOSTILE
    change(path / "results.json", rows=results["rows"], command_line=HOSTILE)
    change(path / "heldout.json", methods=[row["method"] for row in results["rows"]])
    units, profile = read_document(path / "units.json"), read_document(path / "profile.json")
    units["names"][0] = profile["units"][0]["name"] = units["places"][0][0][1] = HOSTILE
    change(path / "units.json", **units)
    change(path / "profile.json", **profile)
    page = page_of(path)
    assert not page.all("script")
    assert " ".join(HOSTILE.split()) in page.text
    several = Page(Comparison.of([path, copied["drop"]]).page(path))
    assert not several.all("script")


def test_what_is_not_finite_does_not_break_the_report(copied: dict[str, Path]) -> None:
    path = copied["quantize"]
    data = read_document(path / "heldout.json")
    rows = read_document(path / "results.json")["rows"]
    for table in (data["kl"], data["nll"]):
        table[1] = [None] * len(table[1])
    rows[1] |= {"kl": None, "kl_error": None, "perplexity": None, "agreement": None}
    change(path / "heldout.json", **data)
    change(path / "results.json", rows=rows, loss=None)
    text = page_of(path).text
    assert f"not finite: {rows[1]['method']}" in text


@pytest.mark.parametrize("name", ["units.json", "heldout.json"])
def test_damaged_files_are_refused_in_one_line(copied: dict[str, Path], name: str) -> None:
    (copied["drop"] / name).write_text("[1]")
    assert f"{name} is damaged: " in refusal(call("report", copied["drop"]))
    before = (copied["drop"] / "report.html").read_text()
    assert (copied["drop"] / "report.html").read_text() == before


def test_what_is_no_run_of_a_search_is_refused(copied: dict[str, Path], tmp_path: Path) -> None:
    assert "nothing does not exist" in refusal(call("report", tmp_path / "nothing"))
    (copied["drop"] / "results.json").unlink()
    assert "has no results yet; finish it with: discopt resume" in refusal(call("report", copied["drop"]))
    results = read_document(copied["mixed"] / "results.json")
    del results["heldout"], results["stop"]
    rewrite(copied["mixed"] / "results.json", results)
    assert "results.json is damaged: it has no heldout, stop" in refusal(call("report", copied["mixed"]))
    (copied["mixed"] / "profile.json").unlink()
    assert "is no run of a search over a language model" in refusal(call("report", copied["mixed"]))
    change(copied["quantize"] / "units.json", names=["x"] * len(RunRecord.read(copied["quantize"]).units.names))
    assert "are of different units" in refusal(call("report", copied["quantize"]))


def test_a_report_needs_no_torch(runs: dict[str, Path]) -> None:
    script = (
        "import sys; from pathlib import Path; from discopt_llm.report_several import Comparison;"
        f"Comparison.of([Path({str(runs['drop'])!r})] * 2).page(Path('.')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- several -------------------------------------------------------------------------------------------------------


def test_several_runs_are_a_table_and_a_picture(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "sizes.html"
    result = call("report", runs["quantize"], runs["drop"], runs["mixed"], "--out", out)
    lines = result.stdout.splitlines()
    rows = {name: read_document(runs[name] / "results.json")["rows"] for name in ("quantize", "drop")}
    assert f"{rows['quantize'][-1]['bytes']:,}" in lines[1]
    assert "25.0% of the blocks dropped" in lines[2]
    assert lines[-1] == f"report: {out}"
    page = Page(out.read_text())
    assert any((picture.get("aria-label") or "").startswith("Size against loss: A ") for picture in page.all("svg"))
    for link in page.all("a"):
        assert (out.parent / str(link["href"])).is_file()


def test_the_sizes_are_shares_of_each_runs_own_dense_model(runs: dict[str, Path]) -> None:
    found = Comparison.of([runs["quantize"], runs["drop"]]).to_dict()["rows"]
    for row, name in zip(found, ("quantize", "drop"), strict=True):
        table = read_document(runs[name] / "results.json")["rows"]
        assert row["size"] == table[-1]["bytes"] / table[0]["bytes"] < 1
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]


def test_the_front_has_what_no_other_beats(copied: dict[str, Path]) -> None:
    def with_row(name: str, **changes: Any) -> Path:
        path = copied["drop"].parent / name
        shutil.copytree(copied["drop"], path)
        (path / "heldout.json").unlink()
        rows: list[Mapping[str, Any]] = read_document(path / "results.json")["rows"]
        dense = rows[0]["bytes"]
        change(
            path / "results.json",
            rows=[*rows[:-1], {**rows[-1], "kl": changes["kl"], "bytes": changes["size"] * dense}],
        )
        return path

    places = {"a": (0.5, 0.3), "b": (0.4, 0.4), "c": (0.5, 0.4), "d": (0.5, 0.3), "e": (0.9, 0.1), "f": (0.95, None)}
    paths = [with_row(name, size=size, kl=kl) for name, (size, kl) in places.items()]
    found = Comparison.of(paths)
    assert [row["front"] for row in found.to_dict()["rows"]] == [True, True, False, False, True, False]
    assert "not finite" in Page(found.page(Path())).text


def test_runs_that_do_not_compare_are_told_apart(copied: dict[str, Path]) -> None:
    paths = [copied["quantize"], copied["drop"], copied["interrupted"]]
    (missing,) = Comparison.of(paths).warnings()
    assert missing == f"Not measured on held-out text, since not finished: {copied['interrupted']}."
    request = read_document(copied["drop"] / "run.json")
    change(copied["drop"] / "run.json", model={**request["model"], "fingerprint": "another"})
    change(copied["drop"] / "results.json", heldout={"source": "other", "tokens": 7})
    said = Comparison.of(paths).warnings()
    assert "different models" in said[0]
    assert "different held-out texts" in said[1]
    result = call("report", *paths, "--out", copied["drop"].parent / "x.html")
    assert result.stderr.count("warning: ") == 3
    document = json.loads(call("report", *paths, "--out", copied["drop"].parent / "x.html", "--json").stdout)
    assert document["warnings"] == said
    assert [row["kl"] is None for row in document["rows"]] == [False, False, True]


def test_only_reports_are_replaced(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two = runs["quantize"], runs["drop"]
    assert call("report", *two).stdout.endswith("report: report.html\n")
    assert call("report", *two).exit_code == 0  # our own
    (tmp_path / "report.html").write_text("<p>mine</p>")
    line = refusal(call("report", *two))
    assert "report.html is not a report of ours; choose another --out, or pass --force" in line
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"
    assert call("report", *two, "--force").exit_code == 0
    assert "is a folder" in refusal(call("report", *two, "--out", tmp_path))
    page = tmp_path / "elsewhere" / "one.html"
    assert call("report", runs["drop"], "--out", page).exit_code == 0
    assert all((page.parent / str(link["href"])).is_file() for link in Page(page.read_text()).all("a"))
    with pytest.raises(RunFolderError, match="cannot make the folder"):
        report.write_page(tmp_path / "report.html" / "x.html", run_page(RunRecord.read(runs["drop"])))


def test_a_resumed_run_has_the_report_of_an_undisturbed_one(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discopt import RunFolder
    from discopt_llm.drop_search import resume_drop

    monkeypatch.setattr(report, "_draw", lambda *_: [])
    request = DropRequest(**{**small, "start": None}, sparsity=0.25)
    run(request, tmp_path / "whole")
    run(replace(request, max_seconds=1e-6), tmp_path / "cut")
    resume_drop(RunFolder.open(tmp_path / "cut"), quiet=True)
    whole, cut = (RunRecord.read(tmp_path / name) for name in ("whole", "cut"))
    assert [vars(move) for move in whole.moves or ()] == [vars(move) for move in cut.moves or ()]
    assert whole.samples is not None
    assert cut.samples is not None
    assert np.array_equal(whole.samples.kl, cut.samples.kl)
