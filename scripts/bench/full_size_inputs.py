"""The inputs of scripts.bench.full_size: models of published sizes with random weights, and synthetic clips and text.

They have the formats that the recipes read. They are written piece by piece: at most one file of weights is in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from qat_patch.commands.clip_index import write_index
from qat_recipes.memory.empty_weights import without_weights
from scripts.bench.model_configs import CONFIGS, TINY_CONFIGS

_SHARD_SIZE = "5GB"
_WORDS = 4096
"""The number of words of the synthetic language."""


class Size(NamedTuple):
    """A model and its samples."""

    kind: str
    """wan or qwen3."""
    name: str
    """In scripts.bench.model_configs."""
    latents: tuple[int, ...]
    """The shape of a clip [C, F, h, w]; () for text."""
    tokens: int
    """Of a sample."""
    layers: int
    """The number of layers of the published model."""

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """The published config, cut to its first layers."""
        config = (CONFIGS | TINY_CONFIGS)[self.name]
        return config if layers is None else config | {self.layers_key: layers}

    @property
    def layers_key(self) -> str:
        return "num_layers" if self.kind == "wan" else "num_hidden_layers"

    def empty(self, layers: int | None = None) -> torch.nn.Module:
        """The model without weights."""
        config = self.config(layers)
        if self.kind == "wan":
            return without_weights(lambda: WanTransformer3DModel(**config))
        return without_weights(lambda: AutoModelForCausalLM.from_config(Qwen3Config(**config)))


SIZES = {
    # 81 frames of 720x1280: 21 latent frames of 90x160, in patches of 1x2x2.
    "wan": Size("wan", "Wan 2.1 14B", (16, 21, 90, 160), 75_600, 40),
    "qwen3": Size("qwen3", "Qwen3 14B", (), 8192, 40),
}
TINY_SIZES = {
    "wan": Size("wan", "Wan 2.1 tiny", (16, 3, 8, 8), 48, 2),
    "qwen3": Size("qwen3", "Qwen3 tiny", (), 64, 2),
}


def write_model(size: Size, folder: Path, layers: int | None = None, *, seed: int = 0) -> int:
    """Write a model with random bfloat16 weights. Returns the number of weights.

    Matrices are normal with a variance of one over the inputs, norms are 1 and biases 0, so that numbers keep their size from
    layer to layer.
    """
    model = size.empty(layers)
    prefix = "diffusion_pytorch_model" if size.kind == "wan" else "model"
    folder.mkdir(parents=True)
    if size.kind == "wan":
        model.save_config(folder)
    else:
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        write_tokenizer(folder, size.config()["vocab_size"])
    state = {name: parameter.to(torch.bfloat16) for name, parameter in model.named_parameters()}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{prefix}{{suffix}}.safetensors", max_shard_size=_SHARD_SIZE
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _random(name, state[name].shape, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    if device == "cuda":
        torch.cuda.empty_cache()
    return sum(x.numel() for x in state.values())


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    # The inputs of one output: all dimensions but the first.
    return (values / shape[1:].numel() ** 0.5).cpu()


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer for the words w0, w1, ... of a synthetic language, and an end of text."""
    end = "<|endoftext|>"
    words = {end: 0} | {f"w{number}": number + 1 for number in range(min(_WORDS, vocabulary - 1))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token=end).save_pretrained(folder)


def write_data(size: Size, folder: Path, samples: int, *, seed: int) -> Path:
    """Write clips, or documents as long as a sample. Returns the value for data.train."""
    generator = torch.Generator().manual_seed(seed)
    if size.kind == "wan":
        _write_clips(size, folder, samples, generator)
        return folder
    vocabulary = min(_WORDS, size.config()["vocab_size"] - 1)
    folder.mkdir(parents=True)
    file = folder / "text.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for _ in range(samples):
            # A walk over the words, which a model can learn. The recipe adds the end of text.
            steps = torch.randint(1, 4, (size.tokens - 1,), generator=generator)
            walk = (steps.cumsum(0) + torch.randint(vocabulary, (), generator=generator)) % vocabulary
            out.write(json.dumps({"text": " ".join(f"w{word}" for word in walk.tolist())}) + "\n")
    return file


def _write_clips(size: Size, folder: Path, samples: int, generator: torch.Generator) -> None:
    channels, frames, height, width = size.latents
    (folder / "clips").mkdir(parents=True)
    clips: list[dict[str, Any]] = []
    for number in range(samples):
        # Smooth, as videos are.
        coarse = torch.randn(1, channels, frames, max(1, height // 8), max(1, width // 8), generator=generator)
        latents = torch.nn.functional.interpolate(coarse, size.latents[1:], mode="trilinear")[0]
        embeds = torch.randn(512, size.config()["text_dim"], generator=generator)
        tensors = {"latents": latents.bfloat16(), "prompt_embeds": embeds.bfloat16()}
        file = f"clips/{number}.safetensors"
        save_file(tensors, folder / file)
        clip: dict[str, Any] = {"file": file, "caption": "synthetic", "source": f"{number}.mp4", "video_sha256": f"{number:064}"}
        clip |= {"frames": 1 + 4 * (frames - 1), "fps": 16.0, "height": 8 * height, "width": 8 * width}
        clips.append(clip | {"shapes": {name: list(x.shape) for name, x in tensors.items()}})
    settings = {"pipeline": "WanPipeline", "vae": "synthetic", "text_encoder": "synthetic", "text_length": 512}
    write_index(folder, settings, clips, skipped={})
