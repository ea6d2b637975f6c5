"""Every transformer class of the installed Diffusers, tiny, and what the patch makes of it: a table in docs/MODELS.md.

PYTHONPATH=.:kernels:tests python -m support.families.every_transformer examines them (a minute) and writes what it found to a
JSON file; `models_table.py` makes the table of it. `diffusers_classes.py` knows how to build and to call each class.
"""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import diffusers
import torch
from torch.utils._pytree import tree_map_only

from qat_patch import patch_model
from support.families import diffusers_classes
from support.families.diffusers_reference import outputs, reference
from support.families.families import lively, relative

FILE = Path(__file__).with_suffix(".json")
names = diffusers_classes.names
OUTSIDE = "does not go through diffusers' attention dispatcher"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about a class. A row of docs/MODELS.md."""

    name: str
    outcome: str
    """exact; partly, if some modules keep their original attention; refused; or not examined"""
    patched: int = 0
    others: int = 0
    """Attention modules that keep their original attention."""
    why: str = ""
    """Why modules keep it, or why the class was not examined."""


def build(name: str):
    """A tiny model with weights that make attention matter, in float64, and how to call it."""
    torch.manual_seed(0)
    model, inputs = diffusers_classes.tiny(name)
    model = lively(model).double().eval()
    for module in model.modules():  # some compute embeddings in float32, whatever the model does
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_in_its_dtype)
    return model, inputs


def _in_its_dtype(module, arguments):
    return tuple(x.to(module.weight.dtype) for x in arguments)


def examine(name: str) -> Finding:
    """Builds, patches and compares one class.

    Raises:
        AssertionError: numbers differ.
    """
    try:
        stock, inputs = build(name)
    except Exception as error:
        return Finding(name, "not examined", why=f"{type(error).__name__}: {_short(error)}")
    model = copy.deepcopy(stock)
    try:
        handle = patch_model(model)
    except ValueError as error:
        assert "patch_model: nothing to patch in" in str(error), error
        return Finding(name, "refused", others=len(_reasons(stock)), why=_reason(_reasons(stock)))
    finding = Finding(name, "partly" if handle.skipped else "exact", len(handle.patched), len(handle.skipped))
    finding = dataclasses.replace(finding, why=_reason(handle.skipped))
    if inputs is None:
        return dataclasses.replace(finding, outcome="not examined", why="; ".join(filter(None, (finding.why, "no inputs known"))))
    given = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs())
    called: set[str] = set()
    hooks = [
        stock.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name) and None)
        for name in handle.patched
    ]
    with torch.no_grad():
        try:
            plain = outputs(stock, given)
        except Exception as error:
            return dataclasses.replace(finding, outcome="not examined", why=f"{type(error).__name__}: {_short(error)}")
        for hook in hooks:
            hook.remove()
        found = outputs(model, given)
        assert {name for name, layer in handle.patched.items() if layer.reached} == called, (
            "not all of those that the model calls"
        )
        if idle := len(handle.patched) - len(called):
            finding = dataclasses.replace(finding, patched=len(called), why=f"the model never calls {idle} of its modules")
        with handle.disabled():
            assert torch.equal(outputs(model, given), plain), "disabled() is not the stock model"
        assert relative(found, plain) > 1e-4, "4-bit attention changes nothing"
        expected = reference(stock, called, given)
    assert relative(found, expected) < 1e-9, "4-bit attention is not the oracle's"
    return finding


def _reasons(model) -> dict[str, str]:
    """Why nothing of a model can be patched, by module."""
    from qat_patch.hosts.diffusers import adapter

    return {name: adapter.reason_to_skip(module) for name, module in adapter.attention_modules(model).items()}


def _reason(skipped: dict[str, str]) -> str:
    return "; ".join(dict.fromkeys(skipped.values()))


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else ""


def load() -> dict[str, dict]:
    """What the last sweep found, by the name of the class."""
    return {row["name"]: row for row in json.loads(FILE.read_text(encoding="utf-8"))["classes"]}


def version() -> str:
    """Of diffusers, when the last sweep ran."""
    return json.loads(FILE.read_text(encoding="utf-8"))["diffusers"]


def main() -> None:
    """Examine all classes, and write what was found."""
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name in names():
        finding = examine(name)
        print(f"{name}: {finding.outcome} {finding.patched}+{finding.others}, {finding.why}", flush=True)
        rows.append(dataclasses.asdict(finding))
    FILE.write_text(json.dumps({"diffusers": diffusers.__version__, "classes": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
