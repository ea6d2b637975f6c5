"""Fine-tune a language model through 4-bit attention with your own training loop; needs qat-patch[qwen].

python recipes/examples/finetune.py --model Qwen/Qwen3-0.6B --train train.txt --held-out held_out.txt --output outputs/finetuned
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat_patch import AttnQATConfig, QuantSpec, calibrate, export_checkpoint, patch_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, train, measure again, export."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    train, held_out = (blocks(tokenizer, file, options.length).to(device) for file in (options.train, options.held_out))

    # Rotation, four over six and K shifts halve what 4-bit attention costs, and Q shifts halve the rest (docs/EVIDENCE.md).
    handle = patch_model(model, AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True)))
    calibrate(model, train[:8].split(1))
    print(handle)

    def report(when: str) -> None:
        with handle.disabled():
            original = loss_on(model, held_out)
        print(f"{when}: held-out loss {original:.4f} in original attention, {loss_on(model, held_out):.4f} in 4-bit attention")

    report("before")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    for step in range(options.steps):
        batch = train[torch.randint(len(train), (options.batch_size,))]
        # In bfloat16 on a GPU; the weights stay in float32.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    report("after")
    export_checkpoint(model.eval(), options.output, tokenizer=tokenizer)
    print(f"{options.output} is the export: qat-patch generate {options.output} --prompt '...'")


def blocks(tokenizer: Any, file: Path, length: int) -> torch.Tensor:
    """A text as tokens, int64 [blocks, length]. The rest at the end is dropped."""
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < length:
        raise ValueError(f"{file}: expected at least {length} tokens, got {len(ids)}; take a longer text or a smaller --length")
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def loss_on(model: Any, rows: torch.Tensor) -> float:
    """The mean loss of rows of tokens, in nats per token."""
    model.eval()
    return sum(model(input_ids=row, labels=row, use_cache=False).loss.item() for row in rows.split(1)) / len(rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the Hub, or a folder")
    parser.add_argument("--train", type=Path, required=True, help="text file")
    parser.add_argument("--held-out", type=Path, required=True, help="text file that is not trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the export")
    parser.add_argument("--length", type=int, default=1024, help="tokens per block (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
