"""A Llama without some of its attentions and MLPs as a `DeciLMForCausalLM`, which vLLM runs.

That is the architecture of NVIDIA's Llama-Nemotron models: the config has an entry for every block that says whether
its attention and its MLP are there, and what is not there has no tensors. Read from vLLM 0.33.0, `models/nemotron_nas`:
the first sub-block that runs must be an attention, so a first block that lost its own keeps one whose output is zero.

transformers has no such class. The config is read by a small Python file beside it, for which vLLM asks to be trusted;
the tensors are proven by a reader here that goes by the config and the files alone: it builds a plain Llama of them.
vLLM itself is not run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from discopt_llm.errors import ModelError
from discopt_llm.export.hf import CheckpointSummary, write_student
from discopt_llm.export.plan import Plan
from discopt_llm.export.proof import Student, UnfitError, unfit_if
from discopt_llm.export.student import StudentModel

__all__ = ["read_deci", "refuse", "write_deci"]

ARCHITECTURE = "DeciLMForCausalLM"
MODEL_TYPE = "nemotron-nas"
PARTS = {"attention": ("self_attn", "input_layernorm"), "ffn": ("mlp", "post_attention_layernorm")}
MULTIPLE = 256  # an MLP given by its ratio has a width that is one of this


def refuse(config: PretrainedConfig) -> None:
    """Raise ModelError for a family that is no Llama by another name."""
    family = str(config.model_type)
    if family not in ("llama", "mistral"):
        raise ModelError(f"{ARCHITECTURE} holds models of the families llama and mistral, got {family}")
    if getattr(config, "sliding_window", None):
        raise ModelError(
            f"{ARCHITECTURE} attends to all tokens before; this {family} has a window of {config.sliding_window}"
        )


def write_deci(student: StudentModel, out: Path, *, force: bool = False, verify: bool = True) -> CheckpointSummary:
    """Write a student to the folder `out`, without the tensors of the sub-blocks that it lacks.

    Other weights that it has are stored dense. Raises as `write_checkpoint`.
    """
    refuse(student.loaded.model.config)
    return write_student(student, out, layout=_Deci(), force=force, verify=verify)


class _Deci:
    """Dropped sub-blocks have no tensors, and the config says so."""

    proof = "built from its tensors as a plain Llama, its logits equal the searched student's (vLLM itself was not run)"
    silent = "without tensors"

    def stored(self, plan: Plan, shell: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without those of dropped sub-blocks and of the norms before them."""
        absent = self._absent(plan)
        gone = tuple(
            f"{plan.anatomy.layers_name}.{block}.{module}." for block, part in absent for module in PARTS[part]
        )
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}

    def finish_(self, plan: Plan, folder: Path) -> None:
        """The config of transformers becomes one with an entry for each block."""
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        absent = self._absent(plan)
        heads = config["num_attention_heads"]
        grouped = heads // (config.get("num_key_value_heads") or heads)
        blocks = []
        for block in range(len(plan.kept)):
            attention, ffn = ((block, part) not in absent for part in PARTS)
            blocks.append(
                {
                    "attention": {"no_op": not attention, "n_heads_in_group": grouped if attention else None},
                    "ffn": {"no_op": not ffn, **(_width(config) if ffn else {"ffn_mult": None})},
                }
            )
        config.update(
            architectures=[ARCHITECTURE],
            model_type=MODEL_TYPE,
            auto_map={"AutoConfig": "configuration_deci.DeciLMConfig"},
            block_configs=blocks,
        )
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("configuration_deci.py"), folder / "configuration_deci.py")

    def check(self, plan: Plan, student: Student, folder: Path) -> None:
        """The Llama that the files describe gives the student's logits."""
        with unfit_if("what was written cannot be read and run"):
            student.check_model(read_deci(folder, student.loaded.model.dtype))

    def remarks(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """What is there all the same, and how vLLM loads it."""
        first = ("the first block keeps an attention whose output is zero",) if plan.dropped[plan.kept[0], 0] else ()
        return (*first, "vLLM loads it with --trust-remote-code, for its config")

    def _absent(self, plan: Plan) -> set[tuple[int, str]]:
        """Blocks, as they are numbered in the files, and parts of them that are not there."""
        return {
            (new, part)
            for new, old in enumerate(plan.kept)
            for part, gone in zip(PARTS, plan.dropped[old].tolist(), strict=True)
            if gone and (new, part) != (0, "attention")
        }


def read_deci(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that such a folder describes, as a plain Llama: parts that are not there contribute nothing.

    Raises UnfitError if the tensors in the files are not those that the config calls for.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    blocks = config["block_configs"]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = {block["attention"]["n_heads_in_group"] for block in blocks if not block["attention"]["no_op"]}
    widths = {_width_of(block["ffn"], hidden) for block in blocks if not block["ffn"]["no_op"]}
    if len(groups) != 1 or len(widths) > 1:
        raise UnfitError(f"expected attentions of one kind and MLPs of one width, got {groups} and {widths}")
    own = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": len(blocks)}
    own["num_key_value_heads"] = heads // groups.pop()
    if widths:
        own["intermediate_size"] = widths.pop()
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(own))
    model = model.to(dtype).eval()
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    absent = tuple(
        f"model.layers.{i}.{module}."
        for i, block in enumerate(blocks)
        for part, modules in PARTS.items()
        if block[part]["no_op"]
        for module in modules
    )
    wanted = {name for name in state if not name.startswith(absent)}
    if wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())
        raise UnfitError(f"its config and its tensors disagree about {', '.join(odd[:3])}")
    model.load_state_dict({name: tensors.get(name, torch.zeros_like(zero)) for name, zero in state.items()})
    return model


def _width(config: Mapping[str, Any]) -> dict[str, Any]:
    """The width of an MLP: as a ratio, where that can say it, as all releases of vLLM read it."""
    width, hidden = config["intermediate_size"], config["hidden_size"]
    ratio = {"ffn_mult": 1.5 * width / hidden}
    return ratio if _width_of(ratio, hidden) == width else {"intermediate_size": width}


def _width_of(ffn: Mapping[str, Any], hidden: int) -> int:
    """The width that an entry of the config stands for."""
    if "ffn_mult" not in ffn:
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * hidden / 3) // MULTIPLE) * MULTIPLE
