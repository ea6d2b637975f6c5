"""SERVING.md of an export: the command that makes a server compute the attention that the weights expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .handle import PatchHandle
from .linear.handle import LinearHandle
from .metadata import LOADING_ADAPTERS
from .servers import AUTO_CONFIG, AUTO_ENABLE, SERVERS, SERVING, Offer, gpu_names, head_sizes, left_out, number_of, offer_of

_VLLM_HEAD_DIMS = (64, 128, 256)
_PACKED_BASE = "packed-base"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Exported(NamedTuple):
    """The export to serve."""

    folder: Path
    kind: str
    """`model`, `pipeline` or `adapters`."""
    base_model: str | None
    """For adapters: their base model. For a transformer alone: the pipeline around it, if known."""
    component: str | None
    """Which component of a pipeline a transformer is."""


def write_serving(
    server: str, handle: PatchHandle, export: Exported, *, auto_enable: bool, linears: LinearHandle | None = None
) -> None:
    """Write SERVING.md of an export.

    Args:
        server: which one.
        handle: the patch of the exported model.
        export: the export, otherwise complete.
        auto_enable: add the file that makes vLLM switch the KV cache on by itself.
        linears: the model's quantized linear layers, if any.
    """
    about, spec = SERVERS[server], next(iter(handle.specs.values()))
    of_preset = offer_of(server, spec.preset)
    on_linears = [] if linears is None else [_note_on_linears(server, linears, export)]
    if linears is not None and export.kind == "adapters":
        export = export._replace(base_model=_PACKED_BASE)
    if about.host == "transformers":
        run = _fenced("sh", _command(server, handle, export, of_preset))
    else:
        run = _fenced("python", _pipeline_code(handle, export, of_preset))
    others = [offer for offer in about.offers if offer.option == of_preset.option and offer is not of_preset]
    rows = [
        (gpu_names(offer.gpus), offer.preset, offer.likeness if offer is of_preset else "another grid")
        for offer in (of_preset, *others)
    ]
    parts = [
        f"# Serving this model: {about.name}",
        f"The weights were exported for `{spec.preset}`: {spec.rules.what}. "
        + ("They are ordinary weights. Without" if linears is None else "Without")
        + " the options below they run ordinary attention.",
        f"In this folder ({about.packages[0]} {about.version} or newer; `.` may be the name of this repository on the Hub):",
        run,
        *on_linears,
        *_notes(server, handle, auto_enable),
        "\n".join(
            [
                "| GPU | what is computed | as the weights expect |",
                "|---|---|---|",
                *(f"| {a} | `{b}` | {c} |" for a, b, c in rows),
            ]
        ),
        "You can try this attention without the server: `qat_patch.load_checkpoint` loads this folder with 4-bit attention "
        "(install qat-patch).",
    ]
    (export.folder / SERVING).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if auto_enable:
        (export.folder / AUTO_CONFIG).write_text(json.dumps(AUTO_ENABLE, indent=2) + "\n", encoding="utf-8")


def _command(server: str, handle: PatchHandle, export: Exported, offer: Offer) -> str:
    is_alone, base_model, rank = export.kind == "adapters", export.base_model, 0
    if is_alone:
        config = json.loads((export.folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(config["r"], *(config.get("rank_pattern") or {}).values()) if config.get("rank_pattern") else config["r"]
    # Servers cannot use FP4 caches in float32.
    options = [f"--kv-cache-dtype {offer.option}", "--dtype bfloat16"]
    if server == "vllm":
        model = [f"vllm serve {base_model if is_alone else '.'}"]
        if skipped := sorted(number for name in left_out(handle) if (number := number_of(name)) is not None):
            options.append(f"--kv-cache-dtype-skip-layers {' '.join(map(str, skipped))}")
        if is_alone:
            limit = next((size for size in _VLLM_RANKS if size >= rank), rank)
            options.append(f"--enable-lora --max-lora-rank {limit} --lora-modules tuned=.")
    else:
        model = [f"python -m sglang.launch_server --model-path {base_model if is_alone else '.'}"]
        if is_alone:
            options.append(f"--enable-lora --max-lora-rank {rank} --lora-paths tuned=.")
    return " \\\n    ".join(model + options)


def _pipeline_code(handle: PatchHandle, export: Exported, offer: Offer) -> str:
    kind, component = export.kind, export.component
    import_line, parts = "from diffusers import DiffusionPipeline", [component or "transformer"]
    base = export.base_model or "PIPELINE"
    if kind == "pipeline":
        load = 'pipe = DiffusionPipeline.from_pretrained(".", dtype=torch.bfloat16).to("cuda")'
        parts = [prefix.removesuffix(".") for prefix in handle.plans]
    elif kind == "model":
        # With its own class: DiffusionPipeline ignores a transformer that it is given.
        import_line = "from diffusers import AutoModel, WanPipeline  # or the class of the pipeline that it belongs to"
        load = (
            f'{parts[0]} = AutoModel.from_pretrained(".", dtype=torch.bfloat16)\n'
            f'pipe = WanPipeline.from_pretrained("{base}", {parts[0]}={parts[0]}, dtype=torch.bfloat16).to("cuda")'
        )
    else:
        load = f'pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")\n'
        load += LOADING_ADAPTERS[parts[0]].replace("FOLDER", '"."')
    if handle.skipped:
        # Only these modules: the others keep their attention.
        where = '["attention"]' if kind == "adapters" else '["attention"][part]'
        switch = (
            f'record = json.load(open("qat_patch.json"))\nfor part in {parts}:\n'
            f'    for name in record{where}["groups"][0]["modules"]:\n'
            f'        getattr(pipe, part).get_submodule(name).set_attention_backend("{offer.option}")'
        )
        if kind == "model":
            switch = switch.replace("[part]", '[""]')
        return f"import json\nimport torch\n{import_line}\n\n{load}\n{switch}"
    switch = "\n".join(f'pipe.{part}.set_attention_backend("{offer.option}")' for part in parts)
    return f"import torch\n{import_line}\n\n{load}\n{switch}"


def _note_on_linears(server: str, linears: LinearHandle, export: Exported) -> str:
    what = "weights and inputs in 4 bits" if linears.config.rounds_inputs else "weights in 4 bits"
    if export.kind == "adapters":
        code = (
            "import qat_patch\nfrom transformers import AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({export.base_model!r})\n"
            "base = qat_patch.load_checkpoint('.').unload()\n"
            f"qat_patch.export_checkpoint(base, '{_PACKED_BASE}', tokenizer=tokenizer, dtype='bfloat16', server='{server}')"
        )
        return (
            f"`{_PACKED_BASE}` is the base model with its linear layers packed ({linears.config.format}: {what}). "
            f"These adapters were trained on it. Make it from this folder:\n\n{_fenced('python', code)}"
        )
    note = f"The linear layers are packed in NVFP4 ({linears.config.format}: {what}). `config.json` says so: no option is needed."
    if linears.config.rounds_inputs:
        note += " On GPUs without FP4 units vLLM leaves the inputs unrounded, and says so."
    return note


def _notes(server: str, handle: PatchHandle, auto_enable: bool) -> list[str]:
    """Notes for users, besides the command."""
    if server == "diffusers-sage3":
        return [
            "Needs `pip install kernels` and an RTX 50 or B200 GPU; the kernel comes from the Hub "
            "(`SageAttention/sage-blackwell`). It takes bfloat16 and float16, head dims 64 and 128, no mask, and no context "
            "parallelism."
        ]
    notes = []
    if auto_enable:
        notes.append(
            f"With `{AUTO_CONFIG}` vLLM needs no option: `vllm serve .` resolves `--kv-cache-dtype auto` to `nvfp4`. The "
            "weights stay as they are, and the scales of the cache are 1."
        )
    else:
        notes.append("The scales of the cache are 1, which is the default of the server.")
    sizes = sorted(head_sizes(handle))
    if server == "vllm" and 64 in sizes:
        notes.append(
            "**Head size 64:** vLLM refuses an NVFP4 cache of this size on sm_80, sm_90 and sm_120 (its prefill there "
            "misreads the cache). vLLM on sm_100 takes it, and SGLang takes it."
        )
    if server == "vllm" and (odd := [size for size in sizes if size not in _VLLM_HEAD_DIMS]):
        notes.append(
            f"**Head size {odd[0]}:** FlashInfer, which computes this cache in vLLM, is built for head sizes "
            f"{', '.join(map(str, _VLLM_HEAD_DIMS))}; vLLM will refuse this model."
        )
    return notes


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
