"""Which kernel a block gets, and why: the whole table, and that every reason is true."""

from dataclasses import replace

import pytest
import torch

from moeify.kernels.choose import KERNELS, LARGE_EXPERT, Choice, Workload, choose, refusal
from moeify.kernels.elementwise import FUSED
from moeify.nn.activations import ACTIVATIONS

CPU = Workload(device="cpu", dtype=torch.float32, widths=(16, 24, 16), activation="silu")
CUDA = replace(CPU, device="cuda", dtype=torch.bfloat16)
LARGE = replace(CUDA, widths=(4096, 14336, 4096))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("work", "kernel", "why"),
    [
        (CPU, "cpu", "float32 on cpu, fused"),
        (replace(CPU, dtype=torch.float64), "cpu", "float64 on cpu, fused"),
        (replace(CPU, device="meta"), "cpu", "float32 on meta, fused"),
        (replace(CPU, widths=(33, 7, 33)), "cpu", "float32 on cpu, fused"),
        (replace(CPU, dropout=True), "cpu",
         "float32 on cpu, fused in evaluation; dropout unfuses training"),
        (replace(CPU, activation=None), "reference",
         "the activation is a module of the model's own, which is not fused"),
        (replace(CPU, activation="tanh"), "reference",
         "the activation is tanh, which is not fused"),
        (replace(CPU, device="mps"), "reference", "no kernels for mps"),
        (CUDA, "triton", "bfloat16 on CUDA, fused"),
        (replace(CUDA, dtype=torch.float64), "reference", "Triton has no matmul for float64"),
        (replace(CUDA, activation=None), "reference",
         "the activation is a module of the model's own, which is not fused"),
        (LARGE, "grouped_mm", "large bfloat16 experts: the vendor's matmul"),
        (replace(LARGE, dtype=torch.float16), "triton", "float16 on CUDA, fused"),
        (replace(LARGE, widths=(4097, 14336, 4097)), "triton", "bfloat16 on CUDA, fused"),
    ],
)  # fmt: skip
def test_auto(work, kernel, why):
    assert choose(work) == Choice(kernel, why)


def test_large_begins_at_the_threshold():
    side = int(LARGE_EXPERT**0.5)
    assert choose(replace(CUDA, widths=(side, side, side))).kernel == "grouped_mm"
    assert choose(replace(CUDA, widths=(side, side - 8, side))).kernel == "triton"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps"])
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_a_kernel_of_the_plan_is_used_on_any_device(kernel, device):
    got = choose(replace(CUDA, device=device), kernel)
    assert got == Choice(kernel, "the plan asks for it")


REFUSALS = [
    ("triton", replace(CPU, dtype=torch.float64), "Triton has no matmul for float64"),
    ("grouped_mm", replace(CPU, dtype=torch.float64), "torch's grouped matmul has no float64"),
    ("grouped_mm", replace(CPU, widths=(16, 26, 16)),
     "rows of width 26 are not a multiple of 16 bytes in float32"),
    ("grouped_mm", replace(CUDA, widths=(12, 24, 16)),
     "rows of width 12 are not a multiple of 16 bytes in bfloat16"),
    ("cpu", replace(CPU, activation=None), "a module of the model's own"),
    ("triton", replace(CUDA, activation="tanh"), "tanh, which is not fused"),
    ("grouped_mm", replace(CPU, activation="mish"), "mish, which is not fused"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "work", "why"), REFUSALS)
def test_what_cannot_run_anywhere_is_refused_with_the_reason(kernel, work, why):
    reason = refusal(kernel, work)
    assert reason is not None
    assert why in reason
    with pytest.raises(ValueError, match=f"^kernel '{kernel}' cannot run here: .*; use auto$") as e:
        choose(work, kernel)
    assert why in str(e.value)
    assert choose(work, "reference").kernel == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "xpu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_auto_never_chooses_what_is_refused(device, dtype, activation):
    for widths in ((16, 24, 16), (33, 24, 33), (8192, 8192, 8192)):
        work = Workload(device=device, dtype=dtype, widths=widths, activation=activation)
        choice = choose(work)
        assert choice.kernel in KERNELS[1:]
        assert choice.why
        assert refusal(choice.kernel, work) is None
        assert refusal("auto", work) is None
        if activation not in FUSED:
            assert choice.kernel == "reference"
