"""SageAttention3 from the package to a patched model: found, checked in a child, taken by `auto` or by name, and told about."""

import os
import sys

import pytest
import torch

from qat_kernels import QuantSpec, attention, explain, sageattn3
from qat_kernels.ran import counted
from qat_patch import AttnQATConfig, get_handle, patch_model, unpatch_model
from qat_patch.cli import main
from qat_patch.measure import doctor, servers
from qat_patch.self_check import child, store
from qat_patch.self_check.check import NOT_CHECKED, known_verdicts
from support.kernels.fake_gpu import CPU, IDENTITY, fake_gpu, passed, says
from support.kernels.fake_sage import fresh, install
from support.models.lively_wan import lively, wan_inputs
from support.models.tiny_wan import tiny_pipeline, tiny_transformer

SPEC = QuantSpec(preset="sage3")
CHILD = """
import sys
from support.kernels.fake_gpu import fake_gpu
from support.kernels.fake_sage import small_check
with fake_gpu(), small_check(("gaussian", "long")):
    from qat_kernels.self_check.__main__ import main
    main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and SageAttention3 loaded again."""
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "cache"))
    with fresh():
        yield tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package, installed for this process and for children."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)]))
    return tmp_path / "site"


@pytest.fixture
def gpu():
    with fake_gpu():
        yield


def wan(dtype=torch.bfloat16):
    return lively(tiny_transformer(layers=1, heads=1, head_dim=64)).to(dtype)


def ran(model, grad=False):
    """The implementations that a forward pass ran."""
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in wan_inputs(i2v=False).items()}
    with counted() as counts, torch.set_grad_enabled(grad):
        model(**inputs)
    return set(counts)


def explained(model):
    (layer, *_) = get_handle(model).patched.values()
    q = torch.empty(2, 1, 36, 64, dtype=model.dtype)
    words = explain(q, q, q, spec=layer.spec, impl=layer.impl, needs_gradient=False)
    return {line.partition(":")[0] for line in words.splitlines() if ": runs" in line}


def patched(model, **options):
    return patch_model(model, AttnQATConfig(spec=SPEC), **options)


def said(result):
    """The same as a child says it, of what is installed now."""
    found = sageattn3.installed()
    return result | {"identity": IDENTITY | {"sageattn3": found.fingerprint if found else "not installed"}}


@pytest.mark.usefixtures("gpu", "package")
@pytest.mark.parametrize(
    ("result", "taken", "words"),
    [
        (passed((16, 16)), "sageattn3", "impl auto: sageattn3 from 16 queries and 16 keys on, else triton"),
        (passed((4096, 16)), "triton", "impl auto: sageattn3 from 4096 queries and 16 keys on, else triton"),
        (passed(None), "triton", "impl auto: triton (sageattn3 right, 0.50 times as fast as triton at 64 tokens: not faster"),
        ({"state": "failed", "reason": "wrong: O is off by 2.0e-01"}, "triton", "(sageattn3 failed: wrong: O is off by 2.0e-01)"),
    ],
)
def test_auto_obeys_the_verdict_and_all_agree(monkeypatch, capsys, result, taken, words):
    says(monkeypatch, said(result))
    model = wan()
    handle = patched(model)
    assert NOT_CHECKED in str(handle).splitlines()[0] and ran(model) == explained(model) == {"triton"}
    report = handle.check()
    (only,) = report.checked
    assert only.case.kernel == "sageattn3" and only.is_kept
    again = wan()
    patched(again)  # reads what was kept
    for each in (model, again):
        assert ran(each) == explained(each) == {taken}
        assert ran(each, grad=True) == {"triton"}
        receipt = str(get_handle(each)).splitlines()[0]
        assert words in receipt and NOT_CHECKED not in receipt
    monkeypatch.setattr(doctor, "CASES", (only.case,))
    assert main(["doctor", "--check"]) == 0
    out = capsys.readouterr().out
    assert only.words in out and only.taken in out and "inference with SageAttention3 (bfloat16, head_dim 128)" in out
    assert "sageattn3: could run, by sageattn3 1.0.0 on FP4 units (never run by the authors of this package)" in out


@pytest.mark.usefixtures("gpu", "package")
def test_a_user_may_name_it():
    model, calls = wan(), []
    handle = patched(model, impl="sageattn3")
    assert handle.impl == "sageattn3" and "impl sageattn3" in str(handle)
    assert ran(model) == explained(model) == {"sageattn3"}
    with pytest.raises(ValueError, match="impl='sageattn3' has no gradient; call it under torch.no_grad"):
        ran(model, grad=True)
    with handle.observed(lambda layer, call: calls.append(call)):
        ran(model)
    for call in calls:  # of a real model: alike, but not the same
        key = call.key.clone()
        out, expected = (attention(call.query, key, call.value, spec=SPEC, impl=impl) for impl in ("sageattn3", "eager"))
        error = ((out - expected).norm() / expected.norm()).item()
        assert 1e-3 < error < 0.05 and out.stride() == call.query.stride() and torch.equal(key, call.key)
    x = call.query
    with pytest.raises(ValueError, match="impl='sageattn3' has no derivative; use impl='auto'"):
        torch.func.jvp(lambda q: attention(q, x, x, spec=SPEC, impl="sageattn3"), (x,), (x,))
    empty = (
        attention(x[:, :, :0], x, x, spec=SPEC, impl="sageattn3"),
        attention(x, x[:, :, :0], x[:, :, :0], spec=SPEC, impl="sageattn3"),
    )
    assert empty[0].numel() == 0 and not empty[1].any()


@pytest.mark.usefixtures("gpu")
def test_what_is_not_installed_is_refused_and_auto_does_without(monkeypatch, capsys):
    model = wan()
    with pytest.raises(
        ValueError,
        match="impl='sageattn3' cannot run .* not installed: expected the package sageattn3.*one of 'auto', 'triton', 'eager'",
    ):
        patched(model, impl="sageattn3")
    assert get_handle(model) is None
    handle = patched(model)
    assert str(handle).splitlines()[0].count("impl auto: triton") == 1 and NOT_CHECKED not in str(handle)
    assert ran(model) == explained(model) == {"triton"}
    with pytest.raises(ValueError, match="not installed.*there is nothing to check: `auto` takes triton there"):
        handle.check()
    x = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="attention: impl='sageattn3': SageAttention3 is not installed.*; use impl='triton' or 'eager'"
    ):
        attention(x, x, x, spec=SPEC, impl="sageattn3")
    assert "SageAttention3       not installed" in servers.report()


@pytest.mark.usefixtures("package")
def test_what_it_cannot_do_is_refused_with_the_reason():
    with fake_gpu(arch=90), pytest.raises(ValueError, match="impl='sageattn3' cannot run .*sm_90 has no FP4 units"):
        patched(wan(), impl="sageattn3")
    x = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU, got cpu"):
        attention(x, x, x, spec=SPEC, impl="sageattn3")
    with fake_gpu():
        model = wan(torch.float32)
        with pytest.raises(ValueError, match="impl='sageattn3' cannot run .*it takes bfloat16 and float16, got float32"):
            patched(model, impl="sageattn3")
        assert NOT_CHECKED not in str(patched(model)) and ran(model) == {"triton"}
        with pytest.raises(ValueError, match="impl='sageattn3' cannot run .*it does not compute preset='nvfp4'"):
            patch_model(wan(), impl="sageattn3")
        for options, message in (
            ({"causal": True}, "causal with preset='sage3'"),
            ({"scale": 0.3}, "scale with preset='sage3'"),
            ({"key_mask": torch.ones(1, 16, dtype=torch.bool)}, "key_mask and cu_seqlens with preset='sage3'"),
            ({"return_lse": True}, "return_lse with preset='sage3'"),
        ):
            with pytest.raises(ValueError, match=message):
                attention(x, x, x, spec=SPEC, impl="sageattn3", **options)
        with pytest.raises(ValueError, match="dtype with impl='sageattn3': expected bfloat16 or float16"):
            attention(*[x.float()] * 3, spec=SPEC, impl="sageattn3")
        with pytest.raises(ValueError, match="head_dim with preset='sage3': expected 64 or 128, got 32"):
            attention(*[x[..., :32]] * 3, spec=SPEC, impl="sageattn3")


@pytest.mark.usefixtures("gpu", "package")
def test_a_verdict_is_about_the_package_that_was_checked(monkeypatch, package):
    says(monkeypatch, said(passed((16, 16))))
    model = wan()
    patched(model).check()
    assert ran(model) == {"sageattn3"} and known_verdicts() is not None
    file = package / "sageattn3" / "__init__.py"
    file.write_text(file.read_text() + "\n# built again\n")
    assert known_verdicts() is None
    unpatch_model(model)
    assert NOT_CHECKED in str(patched(model)) and ran(model) == {"triton"}


@pytest.mark.usefixtures("gpu", "package")
def test_a_kernel_that_cannot_be_loaded_raises(package):
    (package / "sageattn3" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    model = wan()
    patched(model, impl="sageattn3")  # nothing is imported before it runs
    with pytest.raises(ValueError, match="sageattn3 1.0.0 cannot be loaded: ImportError: undefined symbol.*install it again"):
        ran(model)


@pytest.mark.usefixtures("gpu", "package")
def test_the_child_finds_the_package_and_checks_it(monkeypatch, package, tmp_path):
    """The program itself, on a CPU: the stand-in is imported there; one head dim is right, the other takes the process down."""
    install(package, "if q.shape[-1] == 128: os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(doctor, "CASES", doctor.CASES[-2:])
    large, small = doctor.self_check().checked
    assert (large.case.head_dim, large.result["state"], large.result["reason"]) == (128, "failed", "killed by SIGSEGV")
    assert small.result["state"] == "passed" and list(small.result["errors"]) == ["gaussian", "long"] and small.is_kept
    assert small.result["identity"]["sageattn3"] == large.result["identity"]["sageattn3"] == sageattn3.installed().fingerprint
    verdicts = known_verdicts()
    assert [verdicts.of(CPU, each.case) is not None for each in (large, small)] == [True, True]


@pytest.mark.usefixtures("gpu", "package")
def test_compiled_calls_choose_by_size(monkeypatch):
    says(monkeypatch, said(passed((32, 32))))
    model = wan()
    patched(model).check()
    (verdicts,) = {layer.impl for layer in get_handle(model).patched.values()}
    compiled = torch.compile(
        lambda q: attention(q, q, q, spec=SPEC, impl=verdicts), backend="eager", fullgraph=True, dynamic=True
    )
    for tokens, expected in ((24, "triton"), (40, "sageattn3")):
        with counted() as counts, torch.no_grad():
            compiled(torch.randn(1, 2, tokens, 64, dtype=torch.bfloat16))
        assert counts == {expected: 1}


def test_servers_says_whether_it_is_installed(package):
    assert "SageAttention3       sageattn3 1.0.0" in servers.report()
    versions = dict.fromkeys(servers.PACKAGES) | {servers.SAGE: "sageattn3 1.0.0"}
    assert servers.served_by("sage3", 12, versions).startswith("this package by sageattn3 1.0.0, Diffusers with")
    assert "this package" not in servers.served_by("sage3", 9, versions)


HUB = """
import sys, types
from pathlib import Path

def install_kernel(repo_id, *, version, local_files_only):
    assert (repo_id, version, local_files_only) == ("SageAttention/sage-blackwell", 1, True)
    return Path(__file__).with_name("variant")

def get_local_kernel(path):
    assert path == Path(__file__).with_name("variant")
    from support.kernels.fake_sage import sageattn3_blackwell
    return types.SimpleNamespace(sageattn3_blackwell=sageattn3_blackwell)
"""


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("version", "kind"), [("0.17.2", "kernels"), ("0.18.0.dev0", "models"), ("0.16.0", "kernels"), (None, "kernels")]
)
def test_the_build_that_diffusers_has_downloaded_is_taken_from_the_cache(monkeypatch, tmp_path, version, kind):
    folder, commit = tmp_path / "hub" / f"{kind}--SageAttention--sage-blackwell", 40 * "a"
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "hub"))
    if version is not None:
        (tmp_path / "site" / "kernels").mkdir(parents=True)
        (tmp_path / "site" / "kernels" / "__init__.py").write_text(HUB)
        (tmp_path / "site" / f"kernels-{version}.dist-info").mkdir()
        (tmp_path / "site" / f"kernels-{version}.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert sageattn3.installed() is None
    build = folder / "snapshots" / commit / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("")
    assert sageattn3.installed() is None
    (folder / "refs").mkdir()
    (folder / "refs" / "v1").write_text(commit)
    if version in (None, "0.16.0"):
        assert sageattn3.installed() is None
        return
    assert sageattn3.installed().name == "SageAttention/sage-blackwell aaaaaaaaaaaa" and sageattn3.installed().files == (
        build / "__init__.py",
    )
    model = wan()
    patched(model, impl="sageattn3")
    assert ran(model) == {"sageattn3"}


@pytest.mark.usefixtures("package")
def test_generate_and_the_receipt_say_what_ran(monkeypatch, tmp_path, capsys):
    from qat_patch import export_checkpoint
    from qat_patch.commands import generate

    pipe, make = tiny_pipeline(layers=1, heads=1, head_dim=64), generate.make_pipeline
    patched(pipe)
    export_checkpoint(pipe, tmp_path / "out")
    monkeypatch.setattr(generate, "_CHECKED", set())
    # As on a GPU; on a CPU it would be float32.
    monkeypatch.setattr(generate, "make_pipeline", lambda folder, base, dtype, **more: make(folder, base, torch.bfloat16, **more))
    arguments = [str(tmp_path / "out"), "--prompt", "a red square", "--output", str(tmp_path / "a.mp4")]
    arguments += ["--height=32", "--width=32", "--num-frames=5", "--steps=1"]
    with fake_gpu():
        says(monkeypatch, said(passed((1, 1))))
        generate.main(arguments)
    out = capsys.readouterr().out
    assert "self-check of FP4 units, once" in out and "calls of 4-bit attention: 4 sageattn3; 5 frames" in out
    assert out.rstrip().endswith("[4-bit attention in 2 of 2 attention modules; sageattn3 implementation, cpu]")
