"""explain and `qat-patch doctor`: what runs, and why nothing faster does."""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qat_kernels import NVFP4, QuantSpec, attention, dispatch, explain
from qat_kernels.fp4 import launch as fp4_launch
from qat_kernels.verdicts import Case, Verdict, Verdicts
from qat_patch.cli import main

HALF = torch.zeros(1, 2, 16, 32, dtype=torch.bfloat16)


def on_gpu(capability):
    """As if the machine had one of this compute capability: neither checks nor words touch the device."""
    arch = 10 * capability[0] + capability[1]
    return (
        mock.patch("qat_kernels.triton.launch.check_device", lambda device: None),
        mock.patch("qat_kernels.fp4.launch.arch_of", lambda device: arch),
        mock.patch("qat_kernels.dispatch.resolve", lambda device, dtype, preset, packed, asked: "triton"),
    )


def test_on_a_cpu_eager_runs_and_the_rest_says_why_not():
    fp4, triton, eager = explain(HALF, HALF, HALF).splitlines()
    for line in (fp4, triton):
        assert "cannot run: expected tensors on an NVIDIA GPU, got cpu" in line
    assert eager == "eager: runs, in PyTorch"
    assert explain(HALF, HALF, HALF, impl="triton").splitlines()[1].startswith("triton: would raise: expected tensors on")
    with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU"):
        attention(HALF, HALF, HALF, impl="triton")


def test_words_for_gpus_with_and_without_fp4_units():
    for capability, words in (
        ((9, 0), "emulated in BF16, since sm_90 has no FP4 units"),
        ((12, 0), "could run, on FP4 units (compiled and inspected"),
    ):
        with ExitStack() as stack:
            for patch in on_gpu(capability):
                stack.enter_context(patch)
            fp4, triton, eager = explain(HALF, HALF, HALF).splitlines()
            assert words in fp4 and "pass impl='fp4'" in fp4 and "not been measured" in fp4
            assert triton.startswith("triton: runs, as fused kernels")
            assert eager == "eager: could run, in PyTorch: pass impl='eager'"
            assert "it has no gradient" in explain(HALF, HALF, HALF, needs_gradient=True).splitlines()[0]
            assert "float64 is for eager only" in explain(*[HALF.double()] * 3).splitlines()[1]
            wide = torch.zeros(1, 2, 16, 256, dtype=torch.bfloat16)
            assert "emulated in BF16" in explain(wide, wide, wide).splitlines()[0]


def test_a_verdict_holds_for_shifted_queries_too_and_not_for_what_the_kernel_does_not_compute():
    verdicts = Verdicts((Verdict(HALF.device, Case(32, False, QuantSpec().to_json(), HALF.dtype), (1, 1), "right"),))
    options = {"q_shift": torch.zeros(2, 32), "impl": verdicts}
    with ExitStack() as stack:
        for patch in on_gpu((12, 0)):
            stack.enter_context(patch)
        assert explain(HALF, HALF, HALF, **options).splitlines()[0] == "fp4: runs, on FP4 units (checked here: right)"
        fp4, triton, _ = explain(HALF, HALF, HALF, softcap=2.0, **options).splitlines()
        assert fp4 == "fp4: cannot run: it does not compute softcap" and triton.startswith("triton: runs")
    with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU"):
        attention(HALF, HALF, HALF, **options)
    assert attention(HALF, HALF, HALF, softcap=2.0, **options).shape == HALF.shape


def test_fp4_has_no_gradient():
    q = HALF.clone().requires_grad_()
    with pytest.raises(ValueError, match="impl='fp4' has no gradient"):
        attention(q, HALF, HALF, impl="fp4")
    with pytest.raises(ValueError, match="use impl='eager' for float64"):
        attention(*[HALF.double()] * 3, impl="fp4")


@pytest.mark.parametrize("version", [(3, 6), (3, 7)])
@pytest.mark.parametrize("arch", [100, 103, 110])
def test_a_triton_that_cannot_compile_for_a_gpu_is_refused_and_auto_is_eager(arch, version, caplog):
    """It would stop with an error of the compiler's."""
    gpu = SimpleNamespace(type="cuda", index=0)
    with (
        mock.patch("qat_kernels.triton.device.INTERPRET", SimpleNamespace(value=False)),
        mock.patch("qat_kernels.triton.device.arch_of", lambda device: arch),
        mock.patch("qat_kernels.triton.device.TRITON", version),
    ):
        for impl in ("fp4", "triton"):
            problem = dispatch.why_not(impl, gpu, torch.bfloat16, NVFP4, needs_gradient=False)
            assert problem.startswith(f"expected Triton 3.8 or later for sm_{arch}, which 3.{version[1]} cannot compile for")
        dispatch._resolve.cache_clear()
        assert dispatch.resolve(torch.device("cuda"), torch.bfloat16, "nvfp4", packed=False) == "eager"
        assert "expected Triton 3.8 or later" in caplog.text
    with (
        mock.patch("qat_kernels.triton.device.INTERPRET", SimpleNamespace(value=False)),
        mock.patch("qat_kernels.triton.device.arch_of", lambda device: arch),
        mock.patch("qat_kernels.triton.device.TRITON", (3, 8)),
    ):
        dispatch._resolve.cache_clear()
        assert dispatch.resolve(torch.device("cuda"), torch.bfloat16, "nvfp4", packed=False) == "triton"
    dispatch._resolve.cache_clear()


@pytest.mark.parametrize(
    ("version", "arch", "said"),
    [((3, 6), 90, True), ((3, 7), 121, True), ((3, 7), 89, False), ((3, 8), 90, True), ((3, 9), 90, False)],
)
def test_a_triton_that_spills_registers_is_taken_and_explained(version, arch, said):
    with ExitStack() as stack:
        for patch in (
            *on_gpu(divmod(arch, 10)),
            mock.patch("qat_kernels.triton.launch.arch_of", lambda device: arch),
            mock.patch("qat_kernels.triton.launch.TRITON", version),
        ):
            stack.enter_context(patch)
        line = explain(HALF, HALF, HALF).splitlines()[1]
        assert line.startswith("triton: runs, as fused kernels")
        assert (f"Triton 3.{version[1]} spills registers on sm_{arch}, 3.9 does not" in line) == said


@pytest.mark.parametrize(
    ("triton", "arch", "known"),
    [
        ((3, 6), 100, "3.9"),
        ((3, 8), 100, "3.9"),
        ((3, 10), 100, "3.9"),
        ((3, 10), 120, "3.6, 3.7, 3.8, 3.9"),
        ((4, 0), 121, "3.8, 3.9"),
        ((3, 9), 110, "no version"),
        ((3, 9), 130, "no version"),
    ],
)
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_what_is_not_known_to_compile_well_is_emulated_and_explained(triton, arch, known, preset):
    with ExitStack() as stack:
        for patch in (*on_gpu(divmod(arch, 10)), mock.patch.object(fp4_launch, "TRITON", triton)):
            stack.enter_context(patch)
        line = explain(HALF, HALF, HALF, spec=QuantSpec(preset=preset)).splitlines()[0]
        quantize_pv = preset == "nvfp4"
        what = "P and V quantized" if quantize_pv else "P and V in BF16"
        version = ".".join(map(str, triton))
        assert (
            f"emulated in BF16, since Triton {version} is not known to compile it well for sm_{arch}, head_dim 32, {what}" in line
        )
        assert f"(known: {known})" in line
        for head_dim in (16, 64, 128):
            assert fp4_launch.choose(arch, head_dim, quantize_pv) == fp4_launch._EMULATED


def test_what_is_known_to_compile_well_is_taken():
    for triton, arch, block_d, quantize_pv in fp4_launch.ON_FP4_UNITS:
        with mock.patch.object(fp4_launch, "TRITON", triton):
            for head_dim in (block_d, block_d - 16):
                assert fp4_launch.why_not_native(arch, head_dim, quantize_pv) is None
                assert fp4_launch.choose(arch, head_dim, quantize_pv) != fp4_launch._EMULATED


def test_doctor_prints_machine_versions_and_what_runs(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for text in (
        "torch",
        torch.__version__,
        "triton",
        "transformers",
        "cpu: ",
        "training (bfloat16",
        "eager: runs",
        "handle.cache()",
    ):
        assert text in out
    gpu = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=80 << 30)
    with (
        mock.patch("torch.cuda.device_count", lambda: 1),
        mock.patch("torch.cuda.get_device_properties", lambda device: gpu),
        mock.patch("torch.empty", lambda *shape, **options: HALF),
    ):
        main(["doctor"])
    assert "cuda:0: GPU, sm_90, 80 GiB" in capsys.readouterr().out


def test_commands_are_listed(capsys):
    for arguments in ([], ["docter"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "usage: qat-patch" in capsys.readouterr().err


def on_hopper(version=(3, 6), problem=None):
    """As if there were an H100 and this Triton."""
    stack = ExitStack()
    for patch in (
        *on_gpu((9, 0)),
        mock.patch("qat_kernels.triton.launch.arch_of", lambda device: 90),
        mock.patch("qat_kernels.triton.launch.TRITON", version),
        mock.patch("qat_kernels.triton.launch.why_no_gluon", lambda: problem),
    ):
        stack.enter_context(patch)
    return stack


def words_for(head_dim=128, **options):
    q = torch.zeros(1, 2, 16, head_dim, dtype=torch.bfloat16)
    return next(line for line in explain(q, q, q, **options).splitlines() if line.startswith("triton: "))


def test_which_kernels_run_on_hopper():
    with on_hopper():
        assert words_for().endswith("(in Gluon for sm_90: forward)")
        assert words_for(needs_gradient=True).endswith("(in Gluon for sm_90: forward, grad_query, grad_key_value)")
        assert words_for(causal=True, window=64, needs_gradient=True).endswith("forward, grad_query, grad_key_value)")
        assert "grad_query in Triton: Gluon's, it does not compute softcap" in words_for(softcap=30.0, needs_gradient=True)
        words = words_for(sinks=torch.zeros(2), needs_gradient=True)
        assert "forward in Triton: Gluon's, it does not compute sinks" in words
        words = words_for(q_shift=torch.zeros(2, 128), needs_gradient=True)
        for kernel in ("forward", "grad_query", "grad_key_value"):
            assert f"{kernel} in Triton: Gluon's, it does not compute q_shift" in words
        words = words_for(112, needs_gradient=True)
        assert "grad_query in Triton: Gluon's, its results for such calls have not been compared on a GPU yet" in words
        assert "forward in Triton: Gluon's, it does not take head_dim 96" in words_for(96, needs_gradient=True)
        words = words_for(spec=QuantSpec(preset="nvfp4_qk"), needs_gradient=True)
        assert "grad_query in Triton: Gluon's, it does not compute bf16_pv" in words
        assert "Triton 3.6 spills registers on sm_90" in words
    with on_hopper((3, 7)):
        assert "forward in Triton: Gluon's, it has run with Triton 3.6 only, and this is 3.7" in words_for()
    with on_hopper(problem="Triton 3.9 does not have Gluon"):
        assert "(in Triton instead of Gluon: Triton 3.9 does not have Gluon" in words_for(needs_gradient=True)
