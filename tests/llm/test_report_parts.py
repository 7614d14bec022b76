"""The parts that reports are made of: markup, units, intervals, scales, and what is read of a run."""

from __future__ import annotations

import json
import math
import re
from importlib import resources

import numpy as np
import pytest

from discopt.errors import RunFolderError
from discopt_llm import report_maps as maps
from discopt_llm.markup import Markup, join, tag
from discopt_llm.profile import BankReference, Profile
from discopt_llm.report_costs import cost_table
from discopt_llm.report_intervals import Interval, mean_interval, normal_interval
from discopt_llm.report_record import Samples, samples_json
from discopt_llm.report_svg import MARKS, Scale, mark_path
from discopt_llm.report_units import Units, short_names
from discopt_llm.report_words import size_words

TYPES = ("Q4_0", "Q5_0", "Q8_0")
ENDS = Units(  # two blocks between an embedding and a head, as a GGUF bank has them
    kind="gguf",
    names=("embed", "layers.0.q", "layers.1.q", "head"),
    places=(((-1, "embed"),), ((0, "q"),), ((1, "q"),), ((2, "head"),)),
    blocks=2,
    labels=(TYPES, TYPES, (None, *TYPES[1:]), TYPES),
    bytes=np.array([[18, 22, 34]] * 4) * 10,
    kept=np.full((4, 3), 320),
    weights=np.full(4, 320),
)


def luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# -- markup --------------------------------------------------------------------------------------------------------


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    inner = tag("b", "1 < 2")
    assert tag("a", "<i>", inner, href="\"&'") == (
        '<a href="&quot;&amp;&#x27;">&lt;i&gt;<b>1 &lt; 2</b></a>'  # inner as it is
    )
    assert tag("p", [inner, inner], class_=None, hidden=False) == "<p><b>1 &lt; 2</b><b>1 &lt; 2</b></p>"
    assert isinstance(join("&", Markup("&amp;")), Markup)
    assert tag("meta", name="a") == '<meta name="a">'
    assert tag("line", x1=1 / 3, stroke_width=2) == '<line x1="0.33" stroke-width="2"></line>'


# -- intervals -----------------------------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_the_t_interval_where_values_are_normal() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=200)
    found = mean_interval(values)
    half = 1.972 * values.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval(values) == found  # the same samples, the same report


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [mean_interval(rng.gamma(4, size=40)) for _ in range(60)]
    assert 0.85 < np.mean([i.low <= 4 <= i.high for i in found]) <= 1


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (np.linspace(-2, -1, 12), "better"),
        (np.linspace(1, 2, 12), "worse"),
        (np.linspace(-1, 1, 12), "no difference"),
        (np.zeros(12), "the same"),
        (np.array([1.0, 2.0]), "too few sequences to tell"),
        (np.array([1.0, np.nan, 2.0]), "not finite"),
    ],
)
def test_a_difference_is_judged_by_its_interval(values: np.ndarray, verdict: str) -> None:
    assert mean_interval(values).verdict == verdict


def test_what_has_no_samples_has_an_interval_from_its_standard_error() -> None:
    assert normal_interval(1.0, 0.1) == Interval(1.0, pytest.approx(0.804), pytest.approx(1.196))
    assert not normal_interval(1.0, None).known
    assert math.isnan(normal_interval(None, None).mean)
    assert Interval(0.0, -1.0, 1.0).exp() == Interval(1.0, math.exp(-1), math.exp(1))


def test_samples_survive_the_file_and_what_is_not_finite_too() -> None:
    kl, nll = np.array([[0.5, np.inf]]), np.array([[1.0, 2.0]])
    samples = Samples.from_json(json.loads(samples_json(["a"], kl, nll)))
    assert np.array_equal(samples.of("a")[0], [0.5, np.nan], equal_nan=True)
    assert np.array_equal(samples.of("a")[1], [1.0, 2.0])
    with pytest.raises(RunFolderError, match=r"expected discopt-heldout 1, got x 1"):
        Samples.from_json({"format": "x", "version": 1})
    with pytest.raises(RunFolderError, match=r"kl must have shape \(2, s\), got \(1, 2\)"):
        Samples.from_json({**json.loads(samples_json(["a"], kl, nll)), "methods": ["a", "b"]})


# -- units ---------------------------------------------------------------------------------------------------------


def test_units_survive_the_file() -> None:
    again = Units.from_json(json.loads(ENDS.to_json()))
    assert again.places == ENDS.places
    assert again.labels == ENDS.labels
    assert again.bytes is not None
    assert np.array_equal(again.bytes, ENDS.bytes)
    with pytest.raises(RunFolderError, match=r"units.json is damaged: bytes must have shape \(4, 3\), got \(4, 2\)"):
        Units.from_json({**json.loads(ENDS.to_json()), "bytes": [[1, 2]] * 4})


def test_the_embedding_comes_first_and_the_head_last() -> None:
    assert ENDS.columns == ("embed", "q", "head")
    picture = maps.level_map(ENDS, np.array([2, 0, 1, 2]))
    assert re.findall(r">(emb\.|\d|head)</text>", picture) == ["head", "emb.", "0", "1", "head"]  # a column, then rows
    assert re.findall(r"in-cell[^>]*>(\w+)<", picture) == ["Q8_0", "Q4_0", "Q5_0", "Q8_0"]


def test_labels_are_ranked_by_what_they_cost() -> None:
    assert ENDS.ranked == TYPES
    assert [ENDS.share(0, level) for level in range(3)] == [0, 0.5, 1]
    assert [ENDS.word(2, 1), ENDS.words(2, 2)] == ["Q5_0", "Q8_0"]


def test_the_costs_are_those_of_each_kind_of_unit() -> None:
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", cost_table(ENDS, np.array([2, 0, 1, 2])))
    cells = [re.sub(r"<[^>]+>", "|", row).split("|") for row in rows]
    found = [[cell for cell in row if cell] for row in cells]
    assert found[0] == ["level", "embed (1)", "q (2)", "head (1)"]
    assert found[1] == ["Q4_0", "180 B", "180 B", " ×1", "180 B"]
    assert found[3] == ["Q8_0", "340 B", " ×1", "340 B", "340 B", " ×1"]
    assert found[4] == ["all of them, here", "340 B, 31.5%", "400 B, 37.0%", "340 B, 31.5%"]


def test_a_profile_alone_says_where_its_units_are() -> None:
    names = ("model.embed_tokens", "model.layers.0.attn.c_proj", "model.layers.0.mlp.c_proj+c_fc", "lm_head")
    banks = (BankReference("bank", "f"),)
    profile = Profile("quantization", "layer", "m", "f", names, np.array([0, 1, 2, 0]), banks, ("2", "3", "4", "2"))
    units = Units.of_profile(profile)
    assert units.blocks == 1
    assert units.places == (
        ((-1, "embed_tokens"),),
        ((0, "c_proj"),),
        ((0, "c_proj+c_fc"),),
        ((1, "lm_head"),),
    )
    assert [units.word(unit, level) for unit, level in enumerate(profile.levels.tolist())] == ["2", "3", "4", "2"]
    assert units.word(0, 1) == "1"  # a level that nothing says more of


@pytest.mark.parametrize(
    ("unit", "names", "blocks"),
    [
        ("sublayer", ("a.0.x", "a.0.y", "a.1.x", "a.1.y"), 2),
        ("block", ("a.0", "a.1", "a.2"), 3),
        ("pair", ("a.0+1", "a.2"), 3),
        ("pair", ("a.0+1", "a.2+3"), 4),
    ],
)
def test_a_dropping_profile_alone_says_where_its_units_are(unit: str, names: tuple[str, ...], blocks: int) -> None:
    units = Units.of_profile(Profile("drop", unit, "m", "f", names, np.ones(len(names), dtype=int)))
    assert units.blocks == blocks
    every = [place for places in units.places for place in places]
    assert every == [(block, column) for block in range(blocks) for column in ("attention", "MLP")]


def test_names_are_as_short_as_tells_them_apart() -> None:
    names = ("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.gate+up", "h.1.attn.c_proj")
    assert short_names(names, [0, 0, 0, 1]) == ["attn.c_proj", "mlp.c_proj", "gate+up", "attn.c_proj"]
    assert [size_words(size) for size in (0, 999, 1500, 2_500_000)] == ["0 B", "999 B", "1.5 KB", "2.5 MB"]


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.39, 0.52, False), (-0.5, 0.02, False), (1, 1e6, True), (300, 900, True)]
)
def test_ticks_are_round_few_and_within_the_range(low: float, high: float, log: bool) -> None:
    scale = Scale(low, high, 0, 100, log)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 6
    assert 2 <= len(scale.ticks(4)) <= 4
    assert all(low <= tick <= high for tick in ticks)
    assert all(0 <= scale(tick) <= 100 for tick in ticks)
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)
    assert (scale(low), scale(high)) == (0, 100)


def test_a_scale_needs_a_range() -> None:
    with pytest.raises(ValueError, match="a scale needs a range, got 1 to 1"):
        Scale(1, 1, 0, 100)
    with pytest.raises(ValueError, match="needs values above 0, got 0"):
        Scale(0, 1, 0, 100, log=True)
    assert len({mark_path(shape, 1, 2) for shape in MARKS}) == len(MARKS)


def test_words_stand_out_on_every_shade() -> None:
    for colors in (maps._SHADES, maps._UP, maps._DOWN):
        for share in np.linspace(0, 1, 41):
            fill = maps._shade(colors, float(share))
            assert contrast(fill, maps._ink(fill)) >= 4.5


def test_shades_get_darker_for_the_color_blind_too() -> None:
    shades = [luminance(maps._shade(maps._SHADES, share)) for share in np.linspace(0, 1, 13)]
    assert shades == sorted(shades, reverse=True)


def test_text_stands_out_in_light_in_dark_and_on_paper() -> None:
    style = resources.files("discopt_llm").joinpath("report.css").read_text()
    modes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(modes) == 3
    for colors in modes:
        for ink in ("ink", "muted", "link", "best", "gone-ink"):
            for ground in ("page", "panel", "mark"):
                assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
        assert contrast(colors["gone-ink"], colors["gone"]) >= 4.5
        for stroke in ("best", "other", "s0", "s1", "s2", "s3", "s4"):
            assert contrast(colors[stroke], colors["page"]) >= 3, stroke
