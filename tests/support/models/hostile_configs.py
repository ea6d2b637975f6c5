"""Exports with malicious configs, and a record of all that a process does to load them.

Run as a program: `python -m support.models.hostile_configs ORIGINALS FOLDER NUMBER` loads NUMBER such exports one after the other
under an audit hook, prints how many loaded, and everything that it did besides reading the export and the installed packages.
With 0 it imports the code that lies in FOLDER, which the hook has to see.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIRD = [None, True, -1, 0, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "a\x00b", [], [[]], {}, {"a": {}}]
CHANGES = ["replace", "delete", "add"]
# `evil` can be imported where the loads run, as a folder is from which somebody starts Python.
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
LIVE = [
    (
        "auto_map",
        {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]},
    ),
    ("auto_map", {"AutoModelForCausalLM": "someone/repository--evil.M"}),
    ("quantization_config", TORCHAO),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("compression_config", {"quant_method": "compressed-tensors"}),
    ("attn_implementation", "kernels-community/flash-attn2"),
    ("_attn_implementation", "kernels-community/flash-attn2"),
    ("_attn_implementation_internal", "kernels-community/flash-attn2"),
    ("experts_implementation", "someone/kernel"),
    ("megatron_core", "evil.core"),
    ("megatron_config", {"x": 1}),
    ("auto_mapping", {"base_model_class": "M", "parent_library": "evil"}),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("loftq_config", {"loftq_bits": 4}),
    ("corda_config", {"cache_file": "/etc/passwd", "covariance_file": "/etc/passwd"}),
    ("eva_config", {"rho": 2.0}),
    ("target_modules", "(a+)+$"),
    ("rank_pattern", {"(a|a)*b": 3}),
    ("custom_pipelines", ["evil", "P"]),
    ("custom_generate", "someone/repository"),
    ("transformers_weights", "../evil.bin"),
    ("backbone", "resnet18"),
    ("use_timm_backbone", True),
    ("model_type", "llama"),
    ("model_type", "timm_wrapper"),
    ("model_type", "evil"),
    ("_class_name", "AutoModel"),
    ("_class_name", "FluxTransformer2DModel"),
    ("_class_name", ["evil", "P"]),
    ("architectures", ["evil"]),
    ("text_encoder", ["evil", "M"]),
    ("vae", ["diffusers", "DiffusionPipeline"]),
    ("vae", ["transformers", "pipeline"]),
    ("tokenizer_class", "evil"),
    ("vocab_file", "/etc/passwd"),
    ("tokenizer_file", "/etc/passwd"),
    ("sp_model_kwargs", {"model_file": "/etc/passwd"}),
    ("_name_or_path", "/etc"),
    ("name_or_path", "someone/repository"),
    ("base_model_name_or_path", "someone/repository"),
    ("image_processor_type", "evil"),
    ("processor_class", "evil"),
    ("num_hidden_layers", 10**6),
    ("num_layers", 10**6),
    ("num_train_timesteps", 10**12),
    ("trust_remote_code", True),
]
HARM = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "pickle.find_class")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")


def places(value, path=()):
    """Every key and index of nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(content, generator):
    """Change one place of nested JSON; returns where."""
    path = generator.choice(list(places(content)))
    target = content
    for key in path[:-1]:
        target = target[key]
    change = generator.choice(CHANGES)
    if change == "replace":
        target[path[-1]] = generator.choice(WEIRD)
    elif change == "delete":
        del target[path[-1]]
    elif isinstance(target, dict):
        target[f"new_{path[-1]}"] = generator.choice(WEIRD)
    else:
        target.append(generator.choice(WEIRD))
    return path


def make_hostile(folder, generator, number):
    """Change one config of an export, by a key that means harm or at random, and seal it again."""
    from support.runs.runs import reseal

    configs = sorted(file for file in folder.rglob("*.json") if file.name not in ("tokenizer.json", "qat_patch.json"))
    headers = sorted(folder.rglob("pytorch_lora_weights.safetensors"))
    file = generator.choice(configs + headers)
    if file in headers:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata()
        content = json.loads(header["lora_adapter_metadata"])
        content |= dict([generator.choice(LIVE)])
        save_file(load_file(file), file, metadata=header | {"lora_adapter_metadata": json.dumps(content)})
    else:
        content = json.loads(file.read_text())
        if number % 3:
            key, value = generator.choice(LIVE)
            content[key] = value
        else:
            mutate(content, generator)
        file.write_text(json.dumps(content))
    reseal(folder)


def main(originals, scratch, number):
    """Load, and report what happened."""
    import diffusers
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from qat_patch import load_checkpoint

    # What a host library imports late, it imports from where it is installed.
    kinds = sorted(folder for folder in originals.iterdir() if (folder / "qat_patch.json").is_file())
    allowed = [
        *map(Path, {*sys.path, sys.prefix, sys.base_prefix}),
        Path(diffusers.__file__).parents[1],
        Path("/proc"),
        Path("/dev"),
    ]
    allowed = [path.resolve() for path in allowed if path != Path()]
    bases = [json.loads((kind / "qat_patch.json").read_text())["base_model"] for kind in kinds]
    allowed = [*(f"{path}/" for path in allowed if path not in (scratch, *scratch.parents)), *filter(None, bases)]
    done, current = [], []

    def audit(event, arguments):
        if not current:
            return
        if event in HARM + NETWORK:
            done.append((current[0], event, repr(arguments)[:200]))
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
            # A bare name is one in a folder that is open, unless it is found here.
            is_inside = len(path.parts) == 1 and not path.exists()
            mine = [*current[1:], str(Path(tempfile.gettempdir()) / "qat_patch-")]
            if not is_inside and not str(path.absolute()).startswith(tuple(allowed + mine)):
                done.append((current[0], event, str(path)))

    sys.addaudithook(audit)
    sys.path.insert(0, str(scratch))
    loaded = 0
    if not number:
        current[:] = ["what the hook is to see"]
        exec("import evil")  # as a string: no package of that name is one of ours
        current.clear()
    for index in range(number):
        generator = random.Random(index)
        original = kinds[index % len(kinds)]
        folder = scratch / f"megatron{index}"
        shutil.copytree(original, folder)
        make_hostile(folder, generator, index)
        current[:] = [f"{index}: {original.name}", str(folder)]
        with contextlib.suppress(ValueError):
            load_checkpoint(folder)
            loaded += 1
        current.clear()
        shutil.rmtree(folder)
    imported = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", None)).startswith(str(scratch))]
    print(json.dumps({"loads": number, "loaded": loaded, "done": done, "imported": imported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
