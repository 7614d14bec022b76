"""The manifest of a bank: whatever is wrong in it is refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from discopt.encoding import checksum
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.bank_manifest import Manifest
from discopt_llm.errors import BankError
from tests.llm.handmade import CPU, block_of, build, header


def test_what_is_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"nowhere is not a bank: there is no such folder"):
        Bank.open(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"is not a bank: it has no bank\.json"):
        Bank.open(tmp_path)
    (tmp_path / "bank.json").write_text('{"format": "account"}')
    with pytest.raises(BankError, match=r"bank\.json is not ours: expected format 'discopt-bank', got 'account'"):
        Bank.open(tmp_path)


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_an_unfinished_bank_says_how_far_it_came(tmp_path: Path, stop: int) -> None:
    build(tmp_path, stop)
    with pytest.raises(BankError, match=rf"is unfinished: {stop} of 3 blocks are built; build it with the same"):
        Bank.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"format": "discopt-bank"}'])
def test_a_manifest_that_is_not_whole_is_refused(bank_folder: Path, text: str) -> None:
    (bank_folder / "bank.json").write_text(text, encoding="latin-1")
    with pytest.raises(BankError, match=r"bank\.json"):
        Bank.open(bank_folder)


def test_every_cut_of_the_manifest_is_refused(bank_folder: Path) -> None:
    data = (bank_folder / "bank.json").read_bytes()
    for end in range(0, len(data) - 2, 97):
        (bank_folder / "bank.json").write_bytes(data[:end])
        with pytest.raises(BankError, match=r"bank\.json"):
            Bank.open(bank_folder, verify=False)


def test_every_changed_byte_of_the_manifest_is_refused(bank_folder: Path) -> None:
    data = (bank_folder / "bank.json").read_bytes()
    for at in range(0, len(data), 31):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        (bank_folder / "bank.json").write_bytes(changed)
        with pytest.raises(BankError, match=r"bank\.json"):
            Bank.open(bank_folder, verify=False)


def test_every_changed_byte_of_an_unfinished_manifest_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    build(tmp_path, stop=1)
    data = (tmp_path / "bank.json").read_bytes()
    before = Manifest.read(tmp_path)
    refused = 0
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        (tmp_path / "bank.json").write_bytes(changed)
        try:
            assert vars(Manifest.read(tmp_path)) == vars(before)
        except BankError:
            refused += 1
    assert refused > 0.9 * len(data)


@pytest.mark.parametrize("version", [0, 2, True, "1", None])
def test_a_manifest_of_another_version_is_refused(bank_folder: Path, version: Any) -> None:
    document = json.loads((bank_folder / "bank.json").read_text())
    (bank_folder / "bank.json").write_text(json.dumps({**document, "version": version}))
    with pytest.raises(BankError, match=rf"bank\.json: expected version 1, got {version!r}"):
        Bank.open(bank_folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything is in a JSON document, the document itself left out."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    document = copy.deepcopy(document)
    at = document
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return document


def signed(document: Any) -> Any:
    """With a fingerprint that fits, as somebody might who writes manifests by hand."""
    return {**document, "fingerprint": checksum({key: document.get(key) for key in ("header", "files", "layers")})}


def refuses(bank_folder: Path, document: Any) -> None:
    (bank_folder / "bank.json").write_text(json.dumps(document))
    with pytest.raises(BankError, match=r"bank\.json"):
        Bank.open(bank_folder, verify=False)


FREE = ("settings", "calibration", "propagate")  # what a header says in there is the builder's business


def small_manifest(bank_folder: Path) -> Any:
    """The manifest of a bank of one block and one layer."""
    shutil.rmtree(bank_folder)
    writer = BankWriter.begin(bank_folder, header(blocks=1))
    layers, forms = block_of(0)
    writer.write_block(0, layers[-1:], {key: form for key, form in forms.items() if key[0] == layers[-1].name})
    writer.finish()
    document = json.loads((bank_folder / "bank.json").read_text())
    assert document == signed(document)
    return document


WRONG = ({"no": 1}, ["no"], "no", 7.5, -3, 10**40, True, None)


def test_a_wrong_value_anywhere_in_the_manifest_is_refused(bank_folder: Path) -> None:
    document = small_manifest(bank_folder)
    for path in places(document):
        for value in WRONG:
            wrong = changed(document, path, lambda at, key, value=value: at.__setitem__(key, value))  # type: ignore[misc]
            if wrong != document:
                refuses(bank_folder, wrong)


def test_a_wrong_type_anywhere_in_the_manifest_is_refused_whatever_its_fingerprint(bank_folder: Path) -> None:
    document = small_manifest(bank_folder)
    other = {str: 7, int: "7", float: "7", bool: 7, list: {}, dict: []}
    for path in places(document):
        if path[:1] != ("fingerprint",) and not (path[0] == "header" and path[1:2] and path[1] in FREE and path[2:]):
            if path == ("header", "propagate"):
                continue
            wrong = changed(document, path, lambda at, key: at.__setitem__(key, other[type(at[key])]))
            refuses(bank_folder, signed(wrong))


def test_whatever_the_manifest_lacks_is_missed(bank_folder: Path) -> None:
    document = small_manifest(bank_folder)
    for path in places(document):
        lacking = changed(document, path, lambda at, key: at.pop(key))
        refuses(bank_folder, lacking)
        free = path[0] == "header" and path[1:2] and path[1] in FREE and (path[2:] or path[1] == "propagate")
        if not free and path != ("fingerprint",) and path[1:2] != ("labels",) and path[2:3] != ("outliers",):
            refuses(bank_folder, signed(lacking))


@pytest.mark.parametrize(
    "name", ["../block-00000.safetensors", "/etc/passwd", "", ".", "a\0b", "block-00001.safetensors"]
)
def test_a_file_name_that_is_not_the_blocks_own_is_refused(bank_folder: Path, name: str) -> None:
    shutil.copy(bank_folder / "block-00000.safetensors", bank_folder.parent)
    document = json.loads((bank_folder / "bank.json").read_text())
    document["files"][0]["name"] = name
    (bank_folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=r"bank\.json is damaged: the file of block 0 must be block-00000\.safetensors"):
        Bank.open(bank_folder)


@pytest.mark.parametrize("name", ["bank.json", "block-00001.safetensors"])
def test_a_link_out_of_the_bank_is_refused_and_one_inside_is_not(bank_folder: Path, name: str) -> None:
    (bank_folder / name).rename(bank_folder / "inside")
    (bank_folder / name).symlink_to("inside")
    Bank.open(bank_folder)
    (bank_folder / "inside").rename(bank_folder.parent / "outside")
    (bank_folder / name).unlink()
    (bank_folder / name).symlink_to("../outside")
    with pytest.raises(BankError, match=f"{name} is a link that leads out of the bank; put the file itself there"):
        Bank.open(bank_folder, verify=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"present": [False, False, False]}, "must have a level, got none of 3"),
        ({"rows": 0}, r"must be at least 1, got \(3, 0, 9\)"),
        ({"rows": 2**52}, "at least 1, got"),
        ({"block": 1}, r"come block by block, 0 to 0, got \[1\]"),
        ({"block": -1}, "must not be negative, got -1"),
        ({"kind": "norm"}, "kind must be one of attention, mlp, embedding, head, got 'norm'"),
        ({"weights": [0, 136, 135]}, "weights of level 1 must be 0 to 135, got 136"),
        ({"weights": [1, 135, 135]}, "weights of level 0 must be 0 to 0, got 1"),
        ({"bytes": [0, -1, 5]}, "bytes of level 1 must be 0 to 9007199254740992, got -1"),
        ({"errors": [0.5]}, "errors must have 3 entries, one a level, got 1"),
        ({"more": 1}, "a layer must have name, .*, outliers, got name, .*, more"),
    ],
)
def test_layers_that_cannot_be_are_refused(bank_folder: Path, changes: dict[str, Any], reason: str) -> None:
    document = small_manifest(bank_folder)
    document["layers"][0] |= changes
    (bank_folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=rf"bank\.json is damaged: .*{reason}"):
        Bank.open(bank_folder)


def test_costs_that_the_file_does_not_bear_out_are_refused(bank_folder: Path) -> None:
    document = small_manifest(bank_folder)
    document["layers"][0]["bytes"][1] -= 1
    (bank_folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=r"block-00000\.safetensors is damaged: expected .* to cost .*, got Costs"):
        Bank.open(bank_folder).form(0, 1, CPU)
