"""Every family of language models in every mode: the tests behind docs/MODELS.md."""

import inspect
import re

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.masking_utils import create_chunked_causal_mask

from qat_kernels import attention
from qat_patch import calibrate, get_handle, patch_model, sensitivity, unpatch_model
from qat_patch.hosts.transformers import attention as transformers_attention
from support.families.families import relative
from support.families.in_float64 import InFloat64
from support.families.transformers_families import FAMILIES, REFUSED
from support.kernels.calls import record_calls
from support.models.tiny_qwen3 import checkpoint_activations, logits, pad, token_ids


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(out.flatten(0, 1).float(), inputs["input_ids"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def greedy(model, ids, steps=12, **options):
    return model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options)


def switched_off_and_unpatched(family, monkeypatch):
    model, inputs = family.build(), family.inputs()
    padded, mask = pad(inputs["input_ids"], 5, "left")
    before, before_padded = logits(model, **inputs), logits(model, input_ids=padded, attention_mask=mask)
    keys = list(model.state_dict())
    handle = patch_model(model, family.config)
    with monkeypatch.context() as patch:
        seen = record_calls(patch)
        assert 1e-3 < relative(logits(model, **inputs), before) < 0.5
    assert len(seen) == family.calls == len(handle.patched)
    assert len(handle.skipped) == family.skipped
    with handle.disabled():
        assert torch.equal(logits(model, **inputs), before)
        assert torch.equal(logits(model, input_ids=padded, attention_mask=mask), before_padded)
    unpatch_model(model)
    assert torch.equal(logits(model, **inputs), before)
    assert torch.equal(logits(model, input_ids=padded, attention_mask=mask), before_padded)
    assert list(model.state_dict()) == keys


def training_step(family, monkeypatch):
    model, inputs = family.build().train(), family.inputs()
    stock = {name: gradient.norm() for name, gradient in gradients(model, inputs).items()}
    patch_model(model, family.config)
    for name, gradient in gradients(model, inputs).items():
        assert gradient.isfinite().all() and gradient.any(), name
        assert gradient.norm() == pytest.approx(stock[name], rel=1.0), name


def gradient_checkpointing(family, monkeypatch):
    model, inputs = family.patched().train(), family.inputs()
    plain = gradients(model, inputs)
    checkpoint_activations(model)
    checkpointed = gradients(model, inputs)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def compiled(family, monkeypatch):
    torch._dynamo.reset()
    model = family.patched().train()
    inputs = family.inputs() | {"attention_mask": torch.ones_like(family.inputs()["input_ids"])}
    plain = gradients(model, inputs)
    model.compile(fullgraph=True, backend="aot_eager")
    graph = gradients(model, inputs)
    assert all(torch.allclose(plain[name], graph[name], rtol=1e-2, atol=1e-3 * plain[name].abs().max()) for name in plain)


def compiled_stock_model(family):
    """The one mode that fails for some stock models too."""
    torch._dynamo.reset()
    model = family.build().train()
    model.compile(fullgraph=True, backend="aot_eager")
    gradients(model, family.inputs() | {"attention_mask": torch.ones_like(family.inputs()["input_ids"])})


def autocast(family, monkeypatch):
    model, inputs = family.patched().train(), family.inputs()
    seen = record_calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    assert {call[name].dtype for call in seen for name in "qkv"} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in found.values())


def padding(side):
    def check(family, monkeypatch):
        model, ids = family.patched(torch.float64), token_ids(length=40)
        padded, mask = pad(ids, 7, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with InFloat64():
            out = logits(model, input_ids=padded, attention_mask=mask, position_ids=positions)
            assert relative(out[mask.bool()], logits(model, input_ids=ids).flatten(0, 1)) < 1e-9

    return check


def dynamic_cache(family, monkeypatch):
    model, ids = family.patched(torch.float64), token_ids(length=21)
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def static_cache(family, monkeypatch):
    chunked = "attention_chunk_size" in vars(family.build().config)
    if chunked and "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters:
        pytest.skip("this release of transformers passes its own function an argument that it does not know")
    model, ids = family.patched(torch.float64), token_ids(length=21)
    static = greedy(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy(model, ids, use_cache=False))


def continuation(family, monkeypatch):
    model, ids = family.patched(torch.float64), token_ids(length=40)
    with InFloat64():
        head = model(ids[:, :23], use_cache=True)
        tail = logits(model, input_ids=ids[:, 23:], past_key_values=head.past_key_values)
        assert relative(torch.cat([head.logits.detach(), tail], 1), logits(model, input_ids=ids)) < 1e-9


def beam_search(family, monkeypatch):
    model, ids = family.patched(torch.float64), token_ids(length=21)
    padded, mask = pad(ids, 5, "left")
    beams = greedy(model, ids, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, num_beams=3, use_cache=False))
    assert torch.equal(beams, greedy(model, padded, num_beams=3, attention_mask=mask)[:, 5:])


def trainer(family, monkeypatch, tmp_path):
    model = family.patched()
    before = model.lm_head.weight.detach().clone()
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append(torch.is_grad_enabled())
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    data = [{"input_ids": row, "labels": row} for row in token_ids(batch=4, length=24)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    result = Trainer(model, arguments, train_dataset=data).train()
    assert len(seen) == 2 * family.calls and all(seen)
    assert result.training_loss > 0 and not torch.equal(model.lm_head.weight, before)
    assert "LOST" not in str(get_handle(model))


def lora(family, monkeypatch, tmp_path):
    base = family.patched().train()
    names = {name.split(".")[-1] for name, _ in base.named_modules()}
    targets = [name for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "q_b_proj", "kv_b_proj") if name in names]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    found = gradients(model, family.inputs())
    assert all("lora" in name and gradient.isfinite().all() and gradient.any() for name, gradient in found.items())
    assert len(found) and get_handle(model) is get_handle(base)
    expected = logits(model.eval(), **family.inputs())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(family.patched(), tmp_path)
    assert torch.equal(logits(again, **family.inputs()), expected)


def packed(family, monkeypatch):
    """Samples one after the other in a row, told apart by position_ids: each as if alone, forward and backward."""
    model, ids = family.patched(torch.float64).train(), token_ids(batch=1, length=60)
    calibrate(model, [ids])
    positions = torch.cat([torch.arange(23), torch.arange(37)])[None]
    whole = model(ids, position_ids=positions, use_cache=False).logits
    whole.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([23, 37], 1)], 1)
    alone.square().sum().backward()
    assert relative(whole, alone) < 1e-9
    assert all(relative(found[name], p.grad) < 1e-6 for name, p in model.named_parameters())


def calibrated(family, monkeypatch):
    model, inputs = family.patched(), family.inputs()
    before = logits(model, **inputs)
    report = sensitivity(model, [inputs])
    assert all(0 < layer.error < 1 for layer in report.layers)
    calibrate(model, [inputs])
    family.check_shifts(get_handle(model))
    assert not torch.equal(logits(model, **inputs), before)


MODES = {
    "off, unpatch": switched_off_and_unpatched,
    "training": training_step,
    "gradient checkpointing": gradient_checkpointing,
    "`torch.compile(fullgraph=True)`, training": compiled,
    "autocast": autocast,
    "left padding": padding("left"),
    "right padding": padding("right"),
    "packed samples": packed,
    "dynamic cache": dynamic_cache,
    "static cache": static_cache,
    "tokens on a cache": continuation,
    "beam search": beam_search,
    "`Trainer`": trainer,
    "`peft` LoRA": lora,
    "`calibrate`, `sensitivity`": calibrated,
}


def cells():
    """Every family in every mode; compiling takes long, so that most of it is for -m slow."""
    for family in FAMILIES:
        for mode in MODES:
            slow = "compile" in mode and family.name != "Qwen3"
            yield pytest.param(family, mode, id=f"{family.name}-{mode}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "mode"), list(cells()))
def test_family_in_mode(family, mode, monkeypatch, tmp_path):
    arguments = {"tmp_path": tmp_path} if mode in ("`Trainer`", "`peft` LoRA") else {}
    if mode in family.not_applicable:
        with pytest.raises(RuntimeError):
            compiled_stock_model(family)
    elif mode in family.refused_modes:
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=re.escape(family.refused_modes[mode])):
            MODES[mode](family, monkeypatch, **arguments)
    else:
        MODES[mode](family, monkeypatch, **arguments)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused_family(family):
    model = family.build()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=re.escape(family.refused)):
        patch_model(model)
    assert model.config._attn_implementation == before


def test_a_module_that_never_asks_the_interface_is_left_alone():
    """It accepts the name, as the whole model does, and computes attention by itself."""
    family = FAMILIES[0]
    model = family.build()
    attn = model.model.layers[1].self_attn

    class OwnWay(type(attn)):
        def forward(self, hidden_states, **kwargs):
            return torch.nn.functional.scaled_dot_product_attention(*[hidden_states] * 3, is_causal=True), None

    class ThroughSuper(type(attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    attn.__class__ = OwnWay
    handle = patch_model(model)
    assert list(handle.skipped) == ["model.layers.1.self_attn"]
    assert "its OwnWay never calls transformers' AttentionInterface" in handle.skipped["model.layers.1.self_attn"]
    unpatch_model(model)
    attn.__class__ = ThroughSuper
    assert len(patch_model(model).patched) == 2
