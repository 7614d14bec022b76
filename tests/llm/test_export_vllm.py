"""What vLLM asks of quantized layers, and which option of a search answers it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from discopt_llm.export.schemes import Scheme
from discopt_llm.export.vllm import StoredLayer, broken_rules, search_options

FOUR = Scheme(4, True, 64)
Q = StoredLayer("model.layers.0.self_attn.q_proj", 0, "attention", 0, 512, 512, FOUR)
K = replace(Q, name="model.layers.0.self_attn.k_proj", rows=128)
O = replace(Q, name="model.layers.0.self_attn.o_proj", input=1)  # noqa: E741
UP = replace(Q, name="model.layers.0.mlp.up_proj", kind="mlp", rows=1024)


def test_layers_that_are_fused_may_differ_from_the_others() -> None:
    assert broken_rules([Q, K, replace(O, scheme=Scheme(8, True, None)), replace(UP, scheme=None)]) == ()


@pytest.mark.parametrize("scheme", [None, Scheme(8, True, 64), Scheme(4, False, 64), Scheme(4, True, 128)])
def test_layers_with_one_input_share_their_scheme(scheme: Scheme | None) -> None:
    (rule,) = broken_rules([Q, replace(K, scheme=scheme), O, UP])
    assert rule.option == "--group runtime"
    words = "16 bits" if scheme is None else scheme.words
    assert rule.what.endswith(f"got {Q.name} and k_proj in 4 bits in groups of 64 and {words}")


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_go_with_4_and_8_bits_only(bits: int) -> None:
    symmetric, not_so = ([replace(Q, scheme=Scheme(bits, symmetric, 64))] for symmetric in (True, False))
    assert broken_rules(symmetric) == ()
    assert [rule.option for rule in broken_rules(not_so)] == ([] if bits in (4, 8) else ["--symmetric"])


def test_one_bit_is_too_few() -> None:
    (rule,) = broken_rules([replace(Q, scheme=Scheme(1, True, 64))])
    assert rule.what == f"it takes 2 to 8 bits, got 1 in {Q.name}"


@pytest.mark.parametrize(
    ("size", "columns", "option"),
    [
        (32, 512, None),
        (64, 512, None),
        (128, 512, None),
        (None, 512, None),
        (16, 512, "128"),
        (16, 192, "64"),
        (16, 48, "0"),
    ],
)
def test_groups_are_of_sizes_that_the_kernels_have(size: int | None, columns: int, option: str | None) -> None:
    rules = broken_rules([replace(Q, columns=columns, scheme=Scheme(8, True, size)), replace(O, columns=1024)])
    assert [rule.option for rule in rules] == ([] if option is None else [f"--group-size {option}"])


@pytest.mark.parametrize(("columns", "option"), [(40, "--widths 4,8"), (36, "--widths 8"), (35, "")])
def test_rows_are_whole_words(columns: int, option: str) -> None:
    (rule,) = broken_rules([replace(Q, columns=columns, scheme=Scheme(3, True, None))])
    assert rule.option == option
    assert f"got {columns} columns of 3 bits" in rule.what


def test_columns_of_zero_points_are_whole_words() -> None:
    layer = replace(Q, rows=12)
    assert broken_rules([layer]) == ()
    (rule,) = broken_rules([replace(layer, scheme=Scheme(4, False, 64))])
    assert (rule.option, "got 12 of 4 bits" in rule.what) == ("--symmetric", True)


def test_each_rule_is_named_once() -> None:
    odd = Scheme(3, False, 16)
    layers = [replace(layer, scheme=odd) for layer in (Q, K, O, UP)]
    rules = broken_rules([*layers, replace(Q, scheme=Scheme(1, False, 16))])
    assert [rule.option for rule in rules] == ["--group runtime", "--symmetric", "--group-size 128", "--widths 4,8"]
    assert search_options(rules) == "search with --group runtime --symmetric --group-size 128 --widths 4,8"
    assert search_options([]) == ""
