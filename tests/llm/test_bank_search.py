from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import RunFolder
from discopt.errors import BudgetError
from discopt_llm import report
from discopt_llm.bank import Bank
from discopt_llm.bank_search import BankSearchRequest, CompressRequest, QuantizeRequest, SparsifyRequest
from discopt_llm.errors import DataError, ProfileError
from discopt_llm.models import load_model
from discopt_llm.report import plot_levels
from discopt_llm.students import read_student
from tests.documents import read_document
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.searches import RUN_FILES, compared, labels, run

BLOCKS = 8

pytestmark = pytest.mark.usefixtures("_no_pictures")


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["bits", "bpw", "size"])
@pytest.mark.parametrize("group", ["size", "none"])
def test_every_measure_is_stated_and_the_one_asked_for_is_met(
    quantize: QuantizeRequest, measure: str, group: str, tmp_path: Path
) -> None:
    asked = {"bits": "2.25", "bpw": "5.5", "size": "0.45x"}[measure]
    request = replace(quantize, **{"bits": None, measure: asked}, group=group, generations=2)
    results = run(request, tmp_path / "run")
    met = results["met"]
    assert met.keys() == {"bits", "bpw", "bytes", "size", "sparsity"}
    limit = float(asked.removesuffix("x"))
    assert 0.97 * limit < met[measure] <= limit
    assert results["asked"] == {measure: asked}
    model = load_model(request.model).model
    bank = Bank.open(request.banks[0])
    widths = labels(tmp_path / "run")
    stored = sum(int(layer.bytes[bank.labels.index(widths[layer.name])]) for layer in bank.layers)
    dense = sum(layer.dense for layer in bank.layers)
    parameters = sum(p.numel() for p in model.parameters())
    assert met["bytes"] == stored + 2 * (parameters - dense)
    assert met["size"] == met["bytes"] / (2 * parameters)
    assert met["bpw"] == pytest.approx(8 * stored / dense)
    assert met["bits"] == pytest.approx(sum(layer.dense * int(widths[layer.name]) for layer in bank.layers) / dense)
    assert met["sparsity"] == 0


def test_whole_bits_are_met_exactly(quantize: QuantizeRequest, tmp_path: Path) -> None:
    assert run(quantize, tmp_path / "run")["met"]["bits"] == 3


def test_a_size_in_bytes_is_that_of_the_whole_file(quantize: QuantizeRequest, tmp_path: Path) -> None:
    request = replace(quantize, bits=None, size="70KB", generations=1)
    assert 69_000 < run(request, tmp_path / "run")["met"]["bytes"] <= 70_000


@pytest.mark.parametrize("asked", ["60%", "0.525"])
def test_a_sparsity_is_met_with_no_fewer_zeros(sparsify: SparsifyRequest, asked: str, tmp_path: Path) -> None:
    met = run(replace(sparsify, sparsity=asked, generations=2), tmp_path / "run")["met"]
    share = Fraction(asked.removesuffix("%")) / (100 if "%" in asked else 1)
    assert share <= Fraction(met["sparsity"]) < share + Fraction(1, 100)
    assert met["bits"] == pytest.approx(16 * (1 - met["sparsity"]))
    assert met["bpw"] == pytest.approx(met["bits"] + 1)


def test_the_zeros_of_a_sparse_student_are_those_stated(sparsify: SparsifyRequest, tmp_path: Path) -> None:
    met = run(sparsify, tmp_path / "run")["met"]
    loaded = load_model(sparsify.model)
    _, profile = read_student(str(tmp_path / "run"), loaded)
    bank = Bank.open(sparsify.banks[0])
    weights = [bank.weights(i, int(x), loaded.device) for i, x in enumerate(profile)]
    zeros = sum(int((W == 0).sum()) for W in weights) / sum(W.numel() for W in weights)
    assert zeros == pytest.approx(met["sparsity"], abs=1e-4)  # a kept weight may round to zero in 16 bits


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (QuantizeRequest, {"bits": "1.9"}, "an average of 1.9 bits is out of reach: .* so the nearest is 2"),
        (QuantizeRequest, {"bits": "7"}, "the levels give 2 to 6, so the nearest is 6"),
        (QuantizeRequest, {"bpw": "2"}, "2 bits per weight is out of reach"),
        (QuantizeRequest, {"size": "1KB"}, "a size of 1KB is out of reach: .* so the nearest is 53.76KB"),
        (QuantizeRequest, {"size": "0.1x"}, "so the nearest is 0.342x"),
        (SparsifyRequest, {"size": "0.05x"}, "a size of 0.05x is out of reach"),
        (CompressRequest, {"size": "0.05x"}, "a size of 0.05x is out of reach: the levels give 0.219x"),
        (CompressRequest, {"bpw": "15"}, "15 bits per weight is out of reach"),
        (CompressRequest, {"size": "0.2x", "kinds": ("sparsity", "quantization")}, "so the nearest is"),
    ],
)
def test_what_is_out_of_reach_is_refused_before_a_bank_is_built(
    small: dict[str, Any], kind: type[BankSearchRequest], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=message):
        run(kind(**small, **changes), tmp_path / "run")
    assert not [*tmp_path.iterdir()]


def test_the_nearest_that_is_named_can_be_asked_for(small: dict[str, Any], tmp_path: Path) -> None:
    request = QuantizeRequest(**{**small, "generations": 0}, size="0.1x", bank_tokens=256)
    with pytest.raises(BudgetError) as refused:
        run(request, tmp_path / "run")
    nearest = str(refused.value).rpartition(" ")[2]
    results = run(replace(request, size=nearest), tmp_path / "run")
    assert set(labels(tmp_path / "run").values()) == {"2"}
    assert results["met"]["size"] == pytest.approx(float(nearest.removesuffix("x")), abs=1e-3)


def test_what_only_the_bank_can_tell_leaves_no_run(small: dict[str, Any], tmp_path: Path) -> None:
    request = CompressRequest(**small, bpw="10", levels=3, widths=(2, 6), bank_tokens=256)
    with pytest.raises(BudgetError, match="10 bits per weight is out of reach"):
        run(request, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="asked for 99,999,999"):
        run(replace(request, bpw="4", bank_tokens=99_999_999), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (QuantizeRequest, {}, "expected one budget, --bits or --bpw or --size, got none"),
        (QuantizeRequest, {"bits": "3", "size": "0.3x"}, "expected one budget, .* got bits, size"),
        (QuantizeRequest, {"sparsity": "0.5"}, "expected one budget, .* got sparsity"),
        (SparsifyRequest, {"bits": "3"}, "expected one budget, --sparsity or --size, got bits"),
        (QuantizeRequest, {"bits": "three"}, "such as 3 or 2.25, got 'three'"),
        (SparsifyRequest, {"sparsity": "1.5"}, "got '1.5'"),
        (QuantizeRequest, {"bits": "3", "group": "kind"}, "one of size, name, none, runtime, got 'kind'"),
        (QuantizeRequest, {"bits": "3", "widths": (1, 2)}, r"got \(1, 2\)"),
        (QuantizeRequest, {"bits": "3", "method": "wanda"}, "one of gptq, rtn, gguf, got 'wanda'"),
        (SparsifyRequest, {"sparsity": "0.5", "method": "gptq"}, "got 'gptq'"),
        (SparsifyRequest, {"sparsity": "0.5", "levels": 4}, "an odd number .* got 4"),
        (SparsifyRequest, {"sparsity": "0.5", "step": 0}, "at least 1 weight, got 0"),
        (SparsifyRequest, {"sparsity": "0"}, "target must be above 0 and below 1, got 0.0"),
        (QuantizeRequest, {"bits": "3", "baselines": ("owl",)}, "got owl"),
        (QuantizeRequest, {"bits": "3", "banks": ("b",), "group_size": 64}, "group_size is an option of a bank"),
        (CompressRequest, {"size": "0.3x", "kinds": ("drop",)}, "must hold quantization or sparsity, got drop"),
        (CompressRequest, {"size": "0.3x", "kinds": ("prune",)}, "got prune"),
        (CompressRequest, {"size": "0.3x", "group": "name"}, "group must be none or runtime, got name"),
        (
            CompressRequest,
            {"size": "0.3x", "kinds": ("drop", "quantization"), "levels": 9},
            "levels is an option of kind sparsity, got kind quantization",
        ),
    ],
)
def test_a_request_checks_itself(kind: type[BankSearchRequest], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(model="m", **changes)


def test_presets_are_those_of_table_8() -> None:
    def table(request: BankSearchRequest) -> tuple[int, int, str]:
        settings = request.settings()
        return settings.generations, settings.offspring, settings.describe_stages()

    paper: dict[str, Any] = {"model": "m", "preset": "paper"}
    assert table(QuantizeRequest(**paper, bits="3")) == (150, 128, "16@2048 4@16384 1@131072")
    assert table(SparsifyRequest(**paper, sparsity="0.7")) == (400, 64, "8@2048 2@16384 1@65536")
    for kind, budget in ((QuantizeRequest, {"bits": "3"}), (SparsifyRequest, {"sparsity": "0.7"})):
        assert table(kind(model="m", preset="fast", **budget)) == (400, 16, "1@512 1@8192")
        assert kind(**paper, **budget).chosen.bank_tokens == 2**23
        assert kind(**paper, **budget).chosen.start == "auto"


@pytest.mark.parametrize(
    ("preset", "group", "rule"),
    [
        ("paper", "none", "across"),
        ("paper", "size", "within"),
        ("fast", "none", "exchange"),
        ("demo", "name", "within"),
    ],
)
def test_budget_crosses_groups_as_the_preset_says(
    quantize: QuantizeRequest, preset: str, group: str, rule: str, tmp_path: Path
) -> None:
    request = replace(quantize, preset=preset, group=group)
    task = request.task(load_model(request.model), tmp_path, quiet=True, say=print)
    assert request.settings(**task.changes()).rule == rule


def test_only_an_exchange_drops_sub_blocks(compress: CompressRequest, tmp_path: Path) -> None:
    ways = [{"preset": "paper"}, {"group": "runtime"}, {"group": "runtime", "kinds": ("sparsity", "quantization")}]
    for changes in ways:
        request = replace(compress, **changes)
        task = request.task(load_model(request.model), tmp_path, quiet=True, say=print)
        assert request.settings(**task.changes()).rule == "exchange"


# -- groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "groups"), [("size", 3), ("name", 7), ("none", 1), ("runtime", 4)])
def test_units_trade_within_their_groups(quantize: QuantizeRequest, group: str, groups: int, tmp_path: Path) -> None:
    request = replace(quantize, group=group, bits="3.2", start="random")
    results = run(request, tmp_path / "run")
    assert results["met"]["bits"] <= 3.2
    found = labels(tmp_path / "run")
    assert len(found) == 7 * BLOCKS
    task = request.task(load_model(request.model), tmp_path, quiet=True, say=print)
    assert len(set(task.space.group.tolist())) == groups
    tied = [
        len({found[f"model.layers.{block}.{name}_proj"] for name in names})
        for block in range(BLOCKS)
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"))
    ]
    assert (set(tied) == {1}) == (group == "runtime")
    assert len(set(found.values())) > 1


# -- start profiles ------------------------------------------------------------------------------------------------


def test_a_run_or_its_files_start_another_search(quantize: QuantizeRequest, tmp_path: Path) -> None:
    first = run(quantize, tmp_path / "first")
    for name in ("", "profile.json", "profile.txt"):
        request = replace(quantize, start=str(tmp_path / "first" / name), generations=0)
        assert run(request, tmp_path / f"again{name}")["profile"] == first["profile"]


def test_the_official_text_starts_a_search(quantize: QuantizeRequest, tmp_path: Path) -> None:
    layers = [layer.name for layer in Bank.open(quantize.banks[0]).layers]
    wanted = {name: "2" if i % 2 else "3" for i, name in enumerate(layers)}
    published = tmp_path / "published.txt"
    published.write_text("\n".join(f"{name}: {label}" for name, label in sorted(wanted.items())))  # no end of line
    request = replace(quantize, start=str(published), generations=0)
    run(request, tmp_path / "run")
    assert labels(tmp_path / "run") == wanted
    with pytest.raises(
        ProfileError, match=r"published.txt cannot start this search: a profile must cost at most .* got"
    ):
        run(replace(request, bits="2.1"), tmp_path / "dearer")
    published.write_text(published.read_text().replace(": 2", ": 5"))
    with pytest.raises(ProfileError, match=r"must be one of 2, 3, 4, 6, got '5'"):
        run(request, tmp_path / "five")
    published.write_text("model.layers.0.self_attn.q_proj: 3\n")
    with pytest.raises(ProfileError, match="labels for 1 of 56 layers"):
        run(request, tmp_path / "one")
    assert not any((tmp_path / name).exists() for name in ("dearer", "five", "one"))


def test_labels_of_sparsity_are_steps_sparser(sparsify: SparsifyRequest, tmp_path: Path) -> None:
    bank = Bank.open(sparsify.banks[0])
    wanted = {layer.name: "1" if layer.block % 2 else "-1" for layer in bank.layers}
    (tmp_path / "start.txt").write_text("".join(f"{name}: {label}\n" for name, label in wanted.items()))
    results = run(replace(sparsify, start=str(tmp_path / "start.txt"), generations=0), tmp_path / "run")
    assert labels(tmp_path / "run") == wanted
    zeros = {label: [] for label in ("1", "-1")}
    for layer in bank.layers:
        level = bank.labels.index(wanted[layer.name])
        zeros[wanted[layer.name]].append(layer.dense - int(layer.weights[level]))
        assert results["profile"][bank.layers.index(layer)] == level
    apart = {a - b for a, b in zip(zeros["1"], zeros["-1"], strict=True)}
    assert apart == {2 * bank.settings["step"]}


def test_a_width_starts_a_search_that_may_drop_as_well(compress: CompressRequest, tmp_path: Path) -> None:
    three = dict.fromkeys([layer.name for layer in Bank.open(compress.banks[0]).layers], "3")
    (tmp_path / "three.txt").write_text("".join(f"{name}: {label}\n" for name, label in three.items()))
    one = replace(compress, kinds=("drop", "quantization"), banks=compress.banks[:1], size="0.5x", generations=0)
    run(replace(one, start=str(tmp_path / "three.txt")), tmp_path / "one")
    assert set(labels(tmp_path / "one").values()) == {"quantization:3"}
    with pytest.raises(ProfileError, match=r"must be one of drop, .*quantization:3.*, got '3'"):
        run(replace(compress, size="0.5x", start=str(tmp_path / "three.txt")), tmp_path / "two")


def test_a_profile_of_depth_pruning_starts_no_search_over_banks(quantize: QuantizeRequest, tmp_path: Path) -> None:
    (tmp_path / "drop.txt").write_text("none\n" * BLOCKS)
    with pytest.raises(ProfileError, match="is a profile of depth pruning, expected one of quantization"):
        run(replace(quantize, start=str(tmp_path / "drop.txt")), tmp_path / "run")


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantize", "sparsify", "compress"])
def test_all_rows_keep_to_the_budget(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    asked = compared(request.getfixturevalue(kind))
    results = run(asked, tmp_path / "run")
    rows = {row["method"]: row for row in results["rows"]}
    known = asked.known_baselines
    assert [*rows] == ["dense", *known.values(), "evolved"]
    assert ("owl" in known) == (kind == "sparsify")
    model = load_model(asked.model).model
    assert rows["dense"]["bytes"] == 2 * sum(p.numel() for p in model.parameters())
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["evolved"]["bytes"] == results["met"]["bytes"]
    budgeted = [row["bytes"] for name, row in rows.items() if name != "dense"]
    if kind == "compress":
        assert max(budgeted) <= 0.4 * rows["dense"]["bytes"]
    else:  # a number of bits, or of zeros, means one of bytes where groups divide all layers alike
        assert max(budgeted) <= 1.01 * min(budgeted)
    spent = {name: row["tokens"] for name, row in rows.items()}
    assert spent["dense"] == spent["uniform"] == spent[known["additive"]] == 0
    assert spent[known["random"]] == 16 * 256
    owl = spent[known["owl"]] if kind == "sparsify" else 0
    assert spent["evolved"] == results["total_fidelity"] + owl + spent[known["measured"]]
    report = (tmp_path / "run" / "report.md").read_text()
    assert all(name in report for name in rows)
    assert asked.command_line(tmp_path / "run") in report
    assert all(f"`{bank}`" in report for bank in asked.banks)


@pytest.mark.parametrize("kind", ["quantize", "sparsify", "compress"])
def test_the_found_profile_is_never_worse_than_the_start(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Where the last stage has all tokens, its losses can be compared."""
    asked = compared(request.getfixturevalue(kind))
    asked = replace(asked, calibration_tokens=256, stages=("2@32", "1@256"), generations=6, group="none")
    run(asked, tmp_path / "run")
    best = [line["best"] for line in RunFolder.open(tmp_path / "run").trace() if line["fidelity"] == 256]
    assert len(best) == 7
    assert (np.diff(best) <= 1e-5).all()
    assert best[-1] < best[0] - 1e-3


def test_the_same_seed_gives_the_same_run(compress: CompressRequest, tmp_path: Path) -> None:
    first, second, other = (
        run(replace(compared(compress), seed=seed), tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["profile"] == second["profile"]
    assert first["rows"] == second["rows"]
    assert first["profile"] != other["profile"]


def test_baselines_are_those_asked_for(sparsify: SparsifyRequest, tmp_path: Path) -> None:
    results = run(replace(sparsify, baselines=("owl",), start="auto"), tmp_path / "run")
    assert [row["method"] for row in results["rows"]] == ["dense", sparsify.known_baselines["owl"], "evolved"]


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("kind", ["quantize", "sparsify", "compress"])
def test_a_run_leaves_its_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    asked: BankSearchRequest = request.getfixturevalue(kind)
    results = run(replace(asked, group="runtime"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == RUN_FILES
    assert read_document(tmp_path / "run" / "results.json") == results
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"Asked: {asked.budget.words}" in report
    assert "| q_proj+k_proj+v_proj |" in report


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("family", ["GPT2", "Qwen2Moe"])
def test_layers_of_one_name_in_a_block_are_told_apart(family: str, small: dict[str, Any], tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    request = QuantizeRequest(**{**small, "model": str(tmp_path / "model")}, bits="3", bank_tokens=64)
    task = request.task(load_model(request.model), tmp_path / "run", quiet=True, say=lambda line: None)
    kinds = report.unit_kinds(task.genome)
    assert len({*zip(task.genome.block_of.tolist(), kinds, strict=True)}) == task.genome.n
    if family == "GPT2":
        assert kinds[:4] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    else:
        assert {"experts.down_proj", "shared_expert.down_proj", "q_proj"} <= {*kinds}
    plot_levels(task.genome, task.space.cheapest(), tmp_path / "units.png")
    assert (tmp_path / "units.png").stat().st_size > 0


def test_the_report_counts_all_kinds_of_levels(compress: CompressRequest, tmp_path: Path) -> None:
    task = compress.task(load_model(compress.model), tmp_path, quiet=True, say=print)
    rows = task.genome.labels
    found = {label.partition(":")[0] for row in rows for label in row if label}
    assert found == {"drop", "sparsity", "quantization"}
    wanted = [0] * task.genome.n
    for unit, (block, _) in enumerate(task.genome.sub_block):
        kind = ("drop", "quantization", "sparsity")[block % 3]
        wanted[unit] = next((j for j, label in enumerate(rows[unit]) if label and label.startswith(kind)), 1)
    listing = task.listing(np.array(wanted, dtype=np.int16))
    header = listing.splitlines()[4]
    assert header.startswith("| layers | dropped | ")
    assert "bits" in header
    assert header.endswith("| sparse |")
    assert "The sparse ones have " in listing
    words = report.level_words(task.genome, np.array(wanted, dtype=np.int16))
    assert words[0] == "drop"
    assert any(word.endswith("%") for word in words)
