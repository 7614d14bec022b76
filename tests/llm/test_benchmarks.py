"""The benchmarks that other machines run: they run here as well, and their formulae count what is computed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = "--model-size tiny --device cpu --offspring 6 --stage 2@48 1@96 --sequence-length 48 --repeats 1 --threads 1"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts, as Python finds each other's names when one of them is run."""
    names = ("gpu", "scale", "search_costs", "shapes", "tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in names}
        for name in (*names, "plain", "random_llama", "record"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(scripts, tmp_path_factory):
    return scripts["gpu"].Bench(scripts["gpu"].parser().parse_args(TINY.split()), tmp_path_factory.mktemp("bench"))


def test_both_ways_give_the_same_losses_and_the_figures_are_recorded(scripts, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    scripts["gpu"].main([*TINY.split(), "--out", str(out)])
    found = json.loads(out.read_text())
    assert 0 < found["largest_relative_difference"] < 1e-3
    assert [stage["candidates"] for stage in found["stages"]] == [6, 3]
    assert found["times_over_plain"] == found["plain"]["seconds"] / found["block_wise"]["seconds"]
    assert found["met"] == {"times_over_plain": None, "share_of_peak": None, "peak_bytes": None}
    assert "not told by this run" in capsys.readouterr().out


def test_losses_that_differ_are_not_recorded(scripts, bench, monkeypatch):
    gpu = scripts["gpu"]
    honest = bench.plain.measure
    monkeypatch.setattr(bench.plain, "measure", lambda *asked: 1.01 * honest(*asked))
    with pytest.raises(SystemExit, match="got a relative difference of 0"):
        gpu.run(bench, 1, with_plain=True, say=lambda line: None)


def test_a_bound_on_memory_streams_the_model_and_changes_no_loss(scripts, bench, tmp_path):
    options = scripts["gpu"].parser().parse_args([*TINY.split(), "--memory", "1.6MiB"])
    streamed = scripts["gpu"].Bench(options, tmp_path)
    assert streamed.evaluator.plan.streamed
    population, sequences = bench.space.random(5, np.random.default_rng(4)), bench.text.sample(96, 4)
    asked = scripts["gpu"].Asked(population, sequences)
    assert np.allclose(streamed.block_wise(asked).losses, bench.block_wise(asked).losses, rtol=1e-4)


def test_the_model_has_its_own_weights_again_after_the_plain_way(bench):
    before = {name: p.clone() for name, p in bench.loaded.model.named_parameters()}
    population = bench.space.random(2, np.random.default_rng(0))
    ids = bench.text.sample(16, 0)
    bench.plain.write_levels(population)
    with bench.plain.students_():
        bench.plain.measure(population, ids, bench.plain.teacher_logits(ids))
        assert any(not torch.equal(p, before[name]) for name, p in bench.loaded.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in bench.loaded.model.named_parameters())


def test_operations_are_those_that_torch_counts(scripts, bench):
    gpu, shapes = scripts["gpu"], scripts["shapes"]
    population = bench.space.random(4, np.random.default_rng(1))
    asked = gpu.Asked(population, bench.text.sample(96, 1))
    before = bench.evaluator.counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fused one
        bench.block_wise(asked)
    done = bench.evaluator.counts
    # torch counts attention to all positions, ours to those before.
    tokens = (done.passes - before.passes) / 2
    full = tokens * bench.shape.block_operations(48) + (done.projected - before.projected) * bench.shape.head_operations
    assert counter.get_total_flops() == full
    causal = shapes.mean_keys([48, 48])
    assert causal == 24.5
    assert bench.shape.block_operations(48) - bench.shape.block_operations(causal) == 4 * 23.5 * bench.shape.hidden


def test_the_formulae_of_sizes_are_those_of_the_model_and_its_bank(bench):
    parameters = sum(p.numel() for p in bench.loaded.model.parameters() if p.dim() > 1)
    assert bench.shape.weights == parameters
    assert bench.shape.bank_bytes() == sum(int(layer.bytes.sum()) for layer in bench.levels.banks[0].layers)


def test_the_simulated_share_is_what_the_evaluator_counts(scripts, bench):
    costs = scripts["search_costs"]
    population = np.unique(bench.space.random(6, np.random.default_rng(2)), axis=0)
    before = bench.evaluator.counts
    bench.evaluator.measure(population, bench.text.sample(48, 2), [])
    done = bench.evaluator.counts
    steps = costs.steps(bench.shape, costs.fresh_blocks(bench.shape, population))
    stage = costs.Stage(len(population), 48, steps, 0, 0)
    assert 2 * 48 * steps == done.passes - before.passes
    assert stage.share(bench.shape) == (done.passes - before.passes) / (done.plain_passes - before.plain_passes)


def test_slices_cost_what_the_plan_of_each_slice_costs(scripts, bench):
    costs = scripts["search_costs"]
    population = bench.space.random(9, np.random.default_rng(3))
    ordered = population[np.lexsort(population.T[::-1])]
    apart = [costs.steps(bench.shape, costs.fresh_blocks(bench.shape, part)) for part in np.array_split(ordered, 4)]
    whole = costs.fresh_blocks(bench.shape, population)
    assert [costs.steps(bench.shape, part) for part in np.array_split(whole, 4)] == apart


@pytest.mark.parametrize(("script", "name"), [("tables", "performance_tables"), ("scale", "tables")])
def test_the_tables_of_the_documents_are_up_to_date(scripts, script, name):
    document = scripts[script].DOCUMENT.read_text()
    assert scripts["tables"].refreshed(document, getattr(scripts[script], name)()) == document


def test_a_document_without_a_table_is_refused(scripts):
    with pytest.raises(ValueError, match="expected the tables a, got b"):
        scripts["tables"].refreshed("<!-- table b -->\n<!-- end -->", {"a": ""})
