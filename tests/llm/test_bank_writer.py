"""Writing banks: one that was stopped ends in the same bytes, and nothing else is replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from discopt_llm import bank as bank_module
from discopt_llm import bank_blocks
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.errors import BankError
from discopt_llm.quantization import Quantized
from tests.llm.banks import files_of
from tests.llm.handmade import BITS, BLOCKS, CPU, block_of, build, header, quantized, same


def test_the_same_build_gives_the_same_bytes(bank_folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again").finish()
    assert files_of(tmp_path / "again") == files_of(bank_folder)


@pytest.mark.parametrize("stop", range(BLOCKS + 1))
def test_a_build_stopped_after_any_block_ends_in_the_same_bytes(bank_folder: Path, tmp_path: Path, stop: int) -> None:
    build(tmp_path / "stopped", stop)
    writer = BankWriter.begin(tmp_path / "stopped", header())
    assert writer.finished == {*range(stop)}
    build(tmp_path / "stopped").finish()
    assert files_of(tmp_path / "stopped") == files_of(bank_folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_a_torn_block_is_built_again_and_the_others_are_not(
    bank_folder: Path, tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stopped"
    build(path, 2)
    torn = path / "block-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:keep])
    assert BankWriter.begin(path, header()).finished == {1}
    assert "block 0 is built again" in caplog.text and "block-00000.safetensors is damaged" in caplog.text
    build(path).finish()
    assert files_of(path) == files_of(bank_folder)


def test_a_changed_byte_anywhere_in_a_block_is_noticed_by_the_block_itself(tmp_path: Path) -> None:
    build(tmp_path, 1)
    file = tmp_path / "block-00000.safetensors"
    data = file.read_bytes()
    header_ = json.loads((tmp_path / "bank.json").read_text())["header"]
    bank_blocks.StoredBlock.open(file, header_, 0).verify()
    for at in range(0, len(data), 13):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        with pytest.raises(BankError, match=r"block-00000\.safetensors"):
            bank_blocks.StoredBlock.open(file, header_, 0).verify()


def test_a_stray_temporary_file_is_cleared_away(bank_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    build(path, 1)
    (path / ".block-00001.safetensors.0a1b2c.tmp").write_bytes(b"half a bl")
    (path / ".bank.json.0a1b2c.tmp").write_bytes(b"{")
    build(path).finish()
    assert files_of(path) == files_of(bank_folder)


def test_a_build_killed_while_it_writes_ends_in_the_same_bytes(
    bank_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its writes in turn, it is begun again until it is through."""
    path = tmp_path / "killed"
    write, deaths = bank_module.write_atomic, []

    def dying(file: Path, data: bytes | str) -> None:
        if file.name not in deaths:
            deaths.append(file.name)
            (file.parent / f".{file.name}.0a1b2c.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(file, data)
        if f"after {file.name}" not in deaths:
            deaths.append(f"after {file.name}")
            raise KeyboardInterrupt

    monkeypatch.setattr(bank_module, "write_atomic", dying)
    for _ in range(20):
        try:
            build(path).finish()
        except KeyboardInterrupt:
            continue
        except BankError:  # killed right after the last write: it is finished
            break
    assert len(deaths) == 2 * (BLOCKS + 1)
    assert files_of(path) == files_of(bank_folder)
    Bank.open(path)


def test_blocks_of_another_bank_are_built_again(bank_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    build(tmp_path / "other", propagate="3")
    build(path, 0)
    shutil.copy(tmp_path / "other" / "block-00000.safetensors", path)
    assert BankWriter.begin(path, header()).finished == frozenset()
    build(path).finish()
    assert files_of(path) == files_of(bank_folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"propagate": "3"}, "propagate: 'dense' there, '3' here"),
        ({"settings": {"bits": BITS, "group_size": 64, "method": "gptq"}}, "settings group_size: 8 there, 64 here"),
        ({"settings": {"bits": (2, 3, 4), "group_size": 8, "method": "gptq"}}, r"settings bits: \[2, 3, 5\] there"),
        ({"settings": {"bits": BITS, "group_size": 8}}, "settings method: only there"),
        ({"model": {"source": "a/model", "fingerprint": "0"}}, "model fingerprint: 'f*' there, '0' here"),
        ({"act_order": None}, "act_order: only here"),
    ],
)
def test_an_unfinished_bank_of_other_options_is_left_alone(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    build(tmp_path, 1)
    before = files_of(tmp_path)
    with pytest.raises(BankError, match=rf"begun with other options \({reason}"):
        BankWriter.begin(tmp_path, header(**changes))
    assert files_of(tmp_path) == before


def test_a_finished_bank_is_replaced_only_by_force(bank_folder: Path, tmp_path: Path) -> None:
    before = files_of(bank_folder)
    with pytest.raises(BankError, match="holds a finished bank already; use it, choose another folder, or replace it"):
        BankWriter.begin(bank_folder, header())
    assert files_of(bank_folder) == before
    (bank_folder / "notes.txt").write_text("mine")
    writer = BankWriter.begin(bank_folder, header(propagate="3"), force=True)
    assert writer.finished == frozenset() and {*files_of(bank_folder)} == {"bank.json", "notes.txt"}
    with pytest.raises(BankError, match="is unfinished: 0 of 3"):
        Bank.open(bank_folder)


def test_force_replaces_a_damaged_bank_but_nothing_else(bank_folder: Path, tmp_path: Path) -> None:
    manifest = bank_folder / "bank.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 7}))
    with pytest.raises(BankError, match="expected version 1, got 7"):
        BankWriter.begin(bank_folder, header())
    BankWriter.begin(bank_folder, header(), force=True)
    for text in ('{"format": "account"}', "not JSON"):
        manifest.write_text(text)
        with pytest.raises(BankError, match=r"holds a bank\.json that is not a bank's"):
            BankWriter.begin(bank_folder, header(), force=True)
        assert manifest.read_text() == text


def test_folders_that_are_none_of_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match="is a file, not a folder"):
        BankWriter.begin(tmp_path / "file", header(), force=True)
    with pytest.raises(BankError, match="cannot make the bank"):
        BankWriter.begin(tmp_path / "file" / "bank", header())
    (tmp_path / "block-00000.safetensors").write_text("mine")
    with pytest.raises(BankError, match=r"holds block-00000\.safetensors but no bank\.json"):
        BankWriter.begin(tmp_path, header(), force=True)
    assert (tmp_path / "block-00000.safetensors").read_text() == "mine"


def test_a_writer_gives_back_what_its_finished_blocks_hold(tmp_path: Path) -> None:
    build(tmp_path, 1)
    writer = build(tmp_path, 2)
    for block in (0, 1):
        for (name, level), form in block_of(block)[1].items():
            assert isinstance(form, Quantized)
            assert same(writer.form(block, name, level, CPU), form)
            assert torch.equal(writer.weights(block, name, level, CPU), form.dequantized())
    with pytest.raises(ValueError, match=r"a layer in a finished block, got layers\.2\.self_attn\.q_proj in block 2"):
        writer.form(2, "layers.2.self_attn.q_proj", 1, CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "drop"}, "kind must be one of quantization, sparsity, gguf, got 'drop'"),
        ({"labels": ["2", "2"]}, r"labels must be different names without a slash, got \['2', '2'\]"),
        ({"labels": []}, r"got \[\]"),
        ({"labels": ["a/b"]}, r"got \['a/b'\]"),
        ({"labels": [2]}, "a label must be text, got 2"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"blocks": True}, "blocks must be a whole number, got True"),
        ({"model": {"source": "a"}}, "model's fingerprint must be text, got None"),
        ({"settings": None}, "settings must be an object, got None"),
        ({"calibration": "text"}, "calibration must be an object, got 'text'"),
    ],
)
def test_headers_that_lack_something_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BankWriter.begin(tmp_path / "bank", header(**changes))
    assert not (tmp_path / "bank").exists()


def test_blocks_that_are_not_what_their_layers_say_are_refused(tmp_path: Path) -> None:
    writer = build(tmp_path, 1)
    layers, forms = block_of(1)
    name = layers[0].name
    lacking = {key: form for key, form in forms.items() if key != (name, 1)}
    with pytest.raises(ValueError, match=r"got forms that lack layers\.1\.self_attn\.q_proj at 1"):
        writer.write_block(1, layers, lacking)
    with pytest.raises(ValueError, match="got forms that must not hold other at 0"):
        writer.write_block(1, layers, {**forms, ("other", 0): forms[name, 0]})
    with pytest.raises(ValueError, match=r"q_proj at level 1 must cost Costs\(weights=147, bits=441.*bits=735"):
        writer.write_block(1, layers, {**forms, (name, 1): forms[name, 2]})
    with pytest.raises(ValueError, match=r"must have shape \(1, 7, 21\), got \(1, 21, 7\)"):
        writer.write_block(1, layers, {**forms, (name, 1): quantized((1, 21, 7), 3, 8, False, 0)})
    with pytest.raises(ValueError, match="must be of block 2 and have 3 levels, got block 1 and 3 levels"):
        writer.write_block(2, layers, forms)
    with pytest.raises(ValueError, match=r"names of layers must differ, got 'layers\.1\.self_attn\.q_proj' 2 times"):
        writer.write_block(1, [*layers, layers[0]], forms)
    with pytest.raises(ValueError, match="a block of 0 to 2 not yet written, got 0"):
        writer.write_block(0, *block_of(0))
    with pytest.raises(ValueError, match="a block of 0 to 2 not yet written, got 3"):
        writer.write_block(3, layers, forms)
    with pytest.raises(ValueError, match=r"all 3 blocks to be written, got none for \[1, 2\]"):
        writer.finish()
    assert {*files_of(tmp_path)} == {"bank.json", "block-00000.safetensors"}
