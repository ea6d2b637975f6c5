"""Export a model with 4-bit attention, upload it to the Hub, and load it again; needs qat-patch[qwen] and `hf auth login`.

python recipes/examples/share.py --model Qwen/Qwen3-0.6B --repo my-name/qwen3-fp4 --output outputs/shared
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from qat_patch import export_checkpoint, get_handle, load_checkpoint, patch_model, push_to_hub, verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, check, upload, load."""
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    patch_model(model)  # and train it: finetune.py
    folder = export_checkpoint(model, options.output, tokenizer=tokenizer)
    print("\n".join(verify_checkpoint(folder)))
    print(push_to_hub(folder, options.repo, private=not options.public))

    # Anyone can do this: every file is checked, and nothing in the repository is run. `revision=` pins a commit.
    loaded = load_checkpoint(options.repo)
    print(get_handle(loaded))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the Hub, or a folder")
    parser.add_argument("--repo", required=True, help="name of the new repository on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the export")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
