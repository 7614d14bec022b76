"""Loading a causal language model, with its tokenizer and its anatomy, from a folder, the hub or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the HTTP client it uses: no connection, too slow, a bad status
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from discopt_llm.anatomy import Anatomy, block_modules, read_anatomy
from discopt_llm.errors import DeviceError, MemoryPlanError, ModelError, one_line, short, typed_line
from discopt_llm.layers import Layer, read_layers
from discopt_llm.memory import Memory
from discopt_llm.residency import Residency
from discopt_llm.untrusted import check_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINGERPRINT_SAMPLES = 8  # values per parameter
HUB_TIMEOUT = 10.0  # seconds
SOURCES = "a folder, a hub id (ORGANISATION/NAME), a .gguf file or package:NAME"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, its parameters without gradients."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # as it was asked for
    anatomy: Anatomy
    residency: Residency | None = None  # None: all of it is on the device

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are when first asked; see `fingerprint`."""
        return fingerprint(self.model)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Of all blocks; see `read_layers`. Raises ModelError for a model whose layers cannot be told."""
        return read_layers(self.model, self.anatomy)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device if self.residency is None else self.residency.device

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in."""
        return self.model.dtype

    def place_(self, blocks: Collection[int]) -> None:
        """Let these blocks stay on the device, and the others be there while they run.

        Raises MemoryPlanError for a model that was loaded whole, unless all are to stay.
        """
        if self.residency is not None:
            self.residency.place_(blocks)
        elif len(blocks) < len(self.anatomy.blocks):
            raise MemoryPlanError("the whole model is on the device: load it with the same bound on memory")


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """Where a causal language model is: its config and tokenizer are read, its weights not yet."""

    source: str  # as it was asked for
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool
    origin: str  # folder or hub id
    gguf_file: str | None
    extra: Mapping[str, Any]  # arguments for loading

    @classmethod
    def find(
        cls,
        source: str,
        *,
        trust_remote_code: bool = False,
        packed: bool = False,
        check_config: Callable[[PretrainedConfig], None] = lambda _: None,
    ) -> ModelFiles:
        """Find what `load_model` would load; raises ModelError for what cannot be loaded.

        packed: take quantized weights as well, which stay as they are.
        """
        origin, gguf_file, extra = _locate(source)
        if gguf_file is not None:
            extra["gguf_file"] = gguf_file
        elif not trust_remote_code:
            check_model_folder(Path(origin))
        with _quiet(downloads=gguf_file is None):
            with _explained("model", source, gguf_file):
                config = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code, **extra)
                _check_config(config, source, gguf_file, packed)
                check_config(config)
            with _explained("tokenizer", source, gguf_file):
                tokenizer = AutoTokenizer.from_pretrained(origin, trust_remote_code=trust_remote_code, **extra)
        return cls(source, config, tokenizer, trust_remote_code, origin, gguf_file, extra)

    @property
    def bytes(self) -> int:
        """Of its files with weights; of a model of the hub once it is downloaded."""
        if self.gguf_file is not None:
            return (Path(self.origin) / self.gguf_file).stat().st_size
        return sum(path.stat().st_size for path in weight_files(self.origin))

    def load(self, device: torch.device, dtype: torch.dtype, *, on_host: bool = False) -> PreTrainedModel:
        """The model in evaluation mode, its parameters without gradients; raises ModelError if it cannot be used.

        on_host: leave it in the host's memory, for the device to take parts of it.
        """
        packed = self.gguf_file is None and bool(getattr(self.config, "quantization_config", None))
        # The libraries of packed weights have bars of their own, as the reader of GGUF files does.
        downloads = self.gguf_file is None and not packed
        with _quiet(downloads=downloads), _explained("model", self.source, self.gguf_file):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.origin,
                config=self.config,
                dtype=dtype,
                device_map={"": device} if device.type == "cuda" and not on_host else None,
                use_safetensors=None if self.trust_remote_code or self.gguf_file else True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **_attention(self.config, device),
                **self.extra,
                **(_unpacked(self.gguf_file) if self.gguf_file else {}),
            )
            model, report = loaded
            _check_complete(model, report, self.source)
            if self.gguf_file is not None:
                _forget_packing_(model)
            model.eval().requires_grad_(False)
            if packed:  # some are unpacked by the first call
                with torch.no_grad():
                    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
        return model


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    check_config: Callable[[PretrainedConfig], None] = lambda _: None,
    memory: Memory = Memory(),  # noqa: B008, it is frozen
) -> LoadedModel:
    """Load a model and read its anatomy.

    `source` is a folder, a hub id, a GGUF file (its weights are unpacked), or `package:NAME`: the first GGUF file of
    an installed Python package, found without importing it. `dtype` "auto" is float32 on a CPU and bfloat16 on CUDA.
    Weights come from safetensors or GGUF; pickles, which can run code, are read only with `trust_remote_code`.
    `check_config` sees the config before any weights are read, and may raise ModelError.

    With a bound on the device's `memory` the blocks stay on the host, see `Residency`; an `Evaluator` brings to the
    device what there is place for. Weights in safetensors of that very data type are mapped into memory, never read
    as a whole; all others are in the host's memory once while they are loaded.

    Raises DeviceError for a device or data type this machine lacks, ModelError for a model that cannot be used,
    MemoryPlanError for one that cannot be kept within the memory.
    """
    place = parse_device(device)
    precision = parse_dtype(dtype, place)
    files = ModelFiles.find(source, trust_remote_code=trust_remote_code, check_config=check_config)
    if memory.on(place) is None:
        return with_anatomy(files, files.load(place, precision))
    model = files.load(place, precision, on_host=True)
    return with_anatomy(files, model, Residency(model, block_modules(model), place, host=memory.host))


def with_anatomy(files: ModelFiles, model: PreTrainedModel, residency: Residency | None = None) -> LoadedModel:
    """A model that was just loaded, with its anatomy; raises ModelError if that cannot be read."""
    with _quiet(downloads=False):
        return LoadedModel(model, files.tokenizer, files.source, read_anatomy(model), residency)


def weight_files(origin: str) -> list[Path]:
    """The files that hold the weights of a folder, or of a model of the hub as far as it is downloaded."""

    def find(name: str) -> Path | None:
        found = cached_file(origin, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        names = {single}
        if listed := find(index):
            names = _listed(listed)
        if found := [path for path in map(find, sorted(names)) if path is not None]:
            return found
    return []


def _listed(index: Path) -> set[str]:
    """The files that an index of weights names; ModelError for one that is damaged."""
    try:
        names = {*json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{index} is damaged: {one_line(error)}") from error
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ModelError(f"expected names of files in {index}, got {short(wrong[0])}")
    return names


def _attention(config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Ask CUDA for fused attention where the model has it; a matrix of all positions by all would not fit."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    fused = device.type == "cuda" and getattr(known, "_supports_sdpa", False)
    return {"attn_implementation": "sdpa"} if fused else {}


def _unpacked(gguf_file: str) -> dict[str, Any]:
    """Ask for dense weights; transformers before 5.18 or so knows nothing else, and has no way to say it."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(gguf_file, dequantize=True)}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Name of the weights: equal for the same weights in float32 and bfloat16, on any device.

    The hash covers every parameter's name and shape and a few of its values, evenly spread, as bfloat16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        if parameter.numel():
            at = torch.linspace(0, parameter.numel() - 1, FINGERPRINT_SAMPLES, dtype=torch.float64).long()
            values = parameter.reshape(-1)[at.to(parameter.device)].to(torch.bfloat16)
            digest.update(values.view(torch.int16).cpu().numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def parse_device(device: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`; raises DeviceError if this machine lacks it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and not index.isdecimal()) or device.startswith("cpu:"):
        raise DeviceError(f"expected auto, cpu, cuda or cuda:N as the device, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA asked for, but this machine has none (or this build of torch cannot use it)")
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(f"{device} asked for, but this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(device)


def parse_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` (float32 on a CPU, bfloat16 on CUDA), `float32`, `bfloat16` or `float16`."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise DeviceError(f"expected auto, {', '.join(DTYPES)} as the data type, got {dtype!r}")
    return DTYPES[dtype]


def _locate(source: str) -> tuple[str, str | None, dict[str, Any]]:
    """Where to load from: a folder or hub id, the GGUF file in it if it is one, more arguments for loading."""
    if source.startswith("package:"):
        file = _package_file(source.removeprefix("package:"))
        return str(file.parent), file.name, {}
    if not source:
        raise ModelError(f"expected {SOURCES}, got nothing")
    path = Path(source).expanduser()
    if source.lower().endswith(".gguf"):
        _check_gguf(path)
        return str(path.resolve().parent), path.name, {}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"expected a model's config.json in the folder {source}, found none")
        return str(path), None, {}
    if path.exists():
        raise ModelError(f"expected {SOURCES}, got the file {source}")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"expected {SOURCES}, got {source!r}, and no such folder exists")
    return source, None, _reach_hub(source)


def gguf_file_of(source: str) -> Path | None:
    """The GGUF file that a source of models is; None for any other."""
    if not (source.startswith("package:") or source.lower().endswith(".gguf")):
        return None
    folder, name, _ = _locate(source)
    return Path(folder) / str(name)


def _package_file(package: str) -> Path:
    """The first GGUF file of an installed package; the package is not imported."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ModelError(f"expected the name of an installed Python package after package:, got {package!r}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if not files:
        raise ModelError(f"expected a .gguf file inside the Python package {package}, found none")
    _check_gguf(files[0])
    return files[0]


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: expected it to begin with b'GGUF', got {magic!r}")


def _reach_hub(name: str) -> dict[str, Any]:
    """Ask the hub once whether it has the model; without network, fall back on what was downloaded before.

    The hub's own client would retry for half a minute.
    """
    offline = {"local_files_only": True}
    cached = isinstance(_cached_config(name), str)
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise ModelError(f"the hub gives {name} only to accounts with access; log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"expected {SOURCES}; the hub has no model {name}, and there is no such folder") from error
    except RemoteEntryNotFoundError as error:
        raise ModelError(f"expected a model's config.json in {name} on the hub, found none") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        if not cached:
            raise ModelError(
                f"cannot reach the hub for {name}, and neither a folder of that name nor a copy downloaded before "
                f"is here ({typed_line(error)})"
            ) from error
        return offline
    return {}


def _cached_config(name: str) -> Any:
    try:
        return huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ModelError(f"expected {SOURCES}, got {name!r}") from error


def _check_config(config: Any, source: str, gguf_file: str | None, packed_too: bool) -> None:
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in remote:
        raise ModelError(f"expected a causal language model in {source}, got the model type {config.model_type!r}")
    packed = getattr(config, "quantization_config", None)
    if packed and gguf_file is None and not packed_too:
        method = packed.get("quant_method") if isinstance(packed, dict) else type(packed).__name__
        raise ModelError(f"expected plain weights in {source}, got quantized ones ({method})")


def _check_complete(model: PreTrainedModel, report: dict[str, Any], source: str) -> None:
    """Weights that a checkpoint lacks would be left random."""
    if missing := sorted(report["missing_keys"]):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(f"{source} lacks {len(missing)} of the weights of {type(model).__name__}: {some}")


@contextmanager
def _explained(step: str, source: str, gguf_file: str | None) -> Iterator[None]:
    """Turn whatever loading raises into one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # parsers of damaged files and the code of models may raise anything
        if step == "tokenizer":
            line = f"expected a tokenizer beside the weights in {source}, got {typed_line(error)}"
        elif gguf_file is not None:
            line = (
                f"cannot load {source}: expected a whole GGUF file of a causal language model, got {typed_line(error)}"
            )
        elif "trust_remote_code" in str(error):
            line = f"{source} brings its own Python code; load it with trust_remote_code only if you trust that code"
        elif isinstance(error, OSError) and "safetensors" in str(error):
            pickled = any(Path(source).expanduser().glob("*.bin"))
            got = "pickled ones (reading those could run code)" if pickled else "none"
            line = f"expected weights as safetensors in {source}, got {got}"
        else:
            line = f"cannot load {source}: {typed_line(error)}"
        raise ModelError(line) from error


def _forget_packing_(model: PreTrainedModel) -> None:
    """Undo the marks of GGUF loading: the weights are plain now, and save like any others."""
    model.hf_quantizer = None  # type: ignore[assignment]
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config


@contextmanager
def _quiet(*, downloads: bool) -> Iterator[None]:
    """No warnings, logs or progress bars of the libraries while inside; bars of downloads if asked for."""
    libraries = (transformers.logging, huggingface_hub.logging)
    levels = [library.get_verbosity() for library in libraries]
    bars, hub_bars = transformers.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for library in libraries:
            library.set_verbosity_error()
        transformers.logging.disable_progress_bar()  # the hub's too
        if downloads and hub_bars:
            enable_progress_bars()
        if not downloads:  # the reader of GGUF files has a bar that nothing else switches off
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            for library, level in zip(libraries, levels, strict=True):
                library.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()
            if hub_bars:
                enable_progress_bars()
