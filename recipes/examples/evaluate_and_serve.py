"""Measure what a language model loses in vLLM's NVFP4 KV cache, and export it for vLLM; needs qat-patch[qwen].

python recipes/examples/evaluate_and_serve.py --model Qwen/Qwen3-0.6B --text held_out.txt --output outputs/for-vllm
vllm serve outputs/for-vllm --kv-cache-dtype nvfp4 --dtype bfloat16

`qat-patch evaluate` measures more: several attentions at once, KL, and tasks of lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, patch_model


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, generate from the cache, export."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval().to(device)
    text = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : options.tokens].to(device)

    # The grid of the server: keys and values as in vLLM's cache. Load a trained export with load_checkpoint instead.
    handle = patch_model(model, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4")))
    served = model(input_ids=text, labels=text, use_cache=False).loss.item()
    with handle.disabled():
        original = model(input_ids=text, labels=text, use_cache=False).loss.item()
    print(f"loss {original:.4f} in original attention, {served:.4f} as served: {served - original:+.4f}")

    # The text that the server would generate: this cache holds keys and values in 4 bits, too.
    prompt = text[:, :32]
    with handle.cached():
        answer = model.generate(prompt, max_new_tokens=options.new_tokens, do_sample=False)
    print(tokenizer.decode(answer[0, prompt.shape[1] :]))

    export_checkpoint(model, options.output, tokenizer=tokenizer, dtype="bfloat16", server="vllm")
    print((options.output / "SERVING.md").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the Hub, or a folder")
    parser.add_argument("--text", type=Path, required=True, help="text file to measure on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the export")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text to use (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
