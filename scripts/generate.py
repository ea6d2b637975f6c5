"""Generate text with an exported model; says which attention ran.

python scripts/generate.py outputs/run/export --prompt "To be, or not to be"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qat_patch import get_handle, load_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what export_checkpoint wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after so many (default: 64)")
    parser.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="do not stop before so many (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    model = load_checkpoint(options.folder, device=options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    lengths = {"max_new_tokens": options.max_new_tokens, "min_new_tokens": options.min_new_tokens}
    tokens = model.generate(**inputs, **lengths, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    handle = get_handle(model)
    total = len(handle.patched) + len(handle.skipped)
    print(f"\n[4-bit attention in {len(handle.patched)} of {total} attention modules, eager implementation on {model.device}]")


if __name__ == "__main__":
    main()
