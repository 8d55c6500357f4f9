"""The Triton kernels: on a GPU for real, elsewhere interpreted (conftest.py sets TRITON_INTERPRET=1) and compiled.

Triton is a test dependency on Linux: without it this file fails to import.
"""

import os
import subprocess
import sys

import pytest
import torch
from head_problems import AESL_SETTINGS, TRANSFORMS, assert_equal, found_by_head, problem, truth
from triton.runtime.interpreter import InterpretedFunction

from aesl_trl.losses import head, head_triton
from aesl_trl.losses.head import LogitTransform, fused_head
from aesl_trl.losses.rules import aesl_rule, eaft_rule, gem_rule, nll_rule


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 4, 9, 1, 6)
BLOCKS_OF_128 = head_triton.Launch(128, 4, 2)  # several blocks to a row, the last one partial


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Let the head take the kernels on this device, and count how often each was launched."""
    counts = {"statistics": 0, "rest_and_gradient": 0}
    for name in counts:
        launch = getattr(head_triton, name)

        def counted(*arguments, _launch=launch, _name=name):
            counts[_name] += 1
            _launch(*arguments)

        monkeypatch.setattr(head_triton, name, counted)
    monkeypatch.setattr(head_triton, "runs_on", lambda device: True)
    for name in counts:
        monkeypatch.setitem(head_triton.LAUNCHES, name, BLOCKS_OF_128)
    return counts


def device_problem(**settings):
    tensors = problem(LENGTHS, **settings)
    return tuple(value.detach().to(DEVICE).requires_grad_(value.requires_grad) for value in tensors)


def test_the_kernels_are_interpreted_where_there_is_no_gpu():
    assert head.head_triton is head_triton
    for kernel in (head_triton._statistics_kernel, head_triton._rest_and_gradient_kernel):
        assert isinstance(kernel, InterpretedFunction) == (DEVICE == "cpu")


def test_the_kernels_are_for_gpus(monkeypatch):
    monkeypatch.undo()
    assert head_triton.runs_on(torch.device("cuda")) and not head_triton.runs_on(torch.device("cpu"))


@pytest.mark.parametrize("settings", AESL_SETTINGS, ids=lambda s: f"{s['prefix_mode']}-{s['t_scaling']}")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_equals_the_definition(transform, settings, launches):
    tensors = device_problem()
    expected = truth(*tensors, transform, **settings)
    scores, gradients = found_by_head(*tensors, aesl_rule(**settings), transform, tile_rows=8)
    assert launches == {"statistics": 3, "rest_and_gradient": 3}  # 21 tokens, a partial last tile
    assert_equal(scores, gradients, expected, atol=1e-12, rtol=1e-13)


@pytest.mark.parametrize("vocab", [2, 127, 128, 129])
def test_vocabularies_around_a_block(vocab, launches):
    tensors = device_problem(vocab=vocab)
    scores, gradients = found_by_head(*tensors, aesl_rule())
    assert_equal(scores, gradients, truth(*tensors, LogitTransform()), atol=1e-12, rtol=1e-13)


def test_float32(launches):
    tensors = device_problem(dtype=torch.float32)
    scores, gradients = found_by_head(*tensors, aesl_rule())
    assert launches["statistics"] == 1 and scores.log_probs.dtype == torch.float32
    assert_equal(scores, gradients, truth(*tensors, LogitTransform()), atol=2e-5, rtol=1e-6)


def test_plain_nll_and_evaluation_launch_what_they_need(launches):
    tensors = device_problem()
    with torch.no_grad():
        fused_head(*tensors, nll_rule())
    assert launches == {"statistics": 1, "rest_and_gradient": 0}
    with torch.no_grad():
        scores = fused_head(*tensors, aesl_rule())
    assert launches == {"statistics": 2, "rest_and_gradient": 1}
    _, statistics, _ = truth(*tensors, LogitTransform())
    torch.testing.assert_close(scores.weights, statistics["weights"], atol=1e-12, rtol=0)
    weights = torch.ones(len(tensors[3]), dtype=torch.float64, device=DEVICE)
    scores, gradients = found_by_head(*tensors, nll_rule())
    assert_equal(scores, gradients, truth(*tensors, LogitTransform(), weights=weights), atol=1e-12, rtol=1e-13)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("rule", "second"), [(gem_rule(), 0), (eaft_rule(), 3)], ids=["own gradient", "own weight"])
def test_a_rule_that_reads_the_tile_has_torch_beside_the_kernels(rule, second, transform, launches, monkeypatch):
    """K1 stays a kernel, and K2 where the gradient is the usual one; one line says that it is slower."""
    notes = []
    monkeypatch.setattr(head.logger, "warning_once", notes.append)
    tensors = device_problem()
    scores, gradients = found_by_head(*tensors, rule, transform, tile_rows=8)
    assert launches == {"statistics": 3, "rest_and_gradient": second}
    assert len(notes) == 1 and "in torch beside the Triton kernels" in notes[0] and "\n" not in notes[0]
    monkeypatch.setattr(head_triton, "runs_on", lambda device: False)
    expected, true_gradients = found_by_head(*tensors, rule, transform, tile_rows=8)
    assert launches["statistics"] == 3 and len(notes) == 1
    torch.testing.assert_close(scores.loss_sum, expected.loss_sum, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(scores.weights, expected.weights, atol=1e-13, rtol=0)
    for gradient, value in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(gradient, value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tile_dtype", [None, torch.bfloat16], ids=["float32 tile", "bfloat16 tile"])
def test_bf16_operands_and_a_gradient_apart_from_the_tile(tile_dtype, launches):
    """With a float32 tile the kernel writes bf16 gradients to a buffer of their own; a bf16 tile is overwritten."""
    tensors = device_problem(dtype=torch.bfloat16, spread=0.3)
    _, statistics, true_gradients = truth(*tensors, LogitTransform())
    scores, gradients = found_by_head(*tensors, aesl_rule(), tile_dtype=tile_dtype)
    assert launches == {"statistics": 1, "rest_and_gradient": 1}
    # bf16 keeps 8 bits: logits up to 5 are off by up to 0.02 in a bf16 tile
    torch.testing.assert_close(
        scores.weights.double(), statistics["weights"], atol=1e-5 if tile_dtype is None else 0.02, rtol=0
    )
    for gradient, value in zip(gradients, true_gradients, strict=True):
        assert (gradient.double() - value).norm() < 0.01 * value.norm()


def test_ties_and_confident_logits(launches):
    hidden = torch.ones(4, 1, device=DEVICE)
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]], device=DEVICE)
    ids = torch.zeros(4, device=DEVICE)
    scores = fused_head(hidden, weight, None, torch.tensor([0, 1, 2, 3], device=DEVICE), ids, nll_rule())
    assert scores.is_top1.tolist() == [False, True, False, False]
    hidden = torch.tensor([[40.0], [500.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0]], device=DEVICE)
    labels = torch.zeros(2, dtype=torch.long, device=DEVICE)
    rule = aesl_rule(t_scaling=1.0, prefix_mode="none")
    scores = fused_head(hidden, weight, None, labels, ids[:2], rule)
    assert scores.weights.tolist() == pytest.approx([8.4967087e-18, 0.0], rel=1e-5, abs=0)
    assert scores.entropy.tolist() == pytest.approx([2 * 41 * 4.2483543e-18, 0.0], rel=1e-5, abs=5e-7)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton, triton.language as tl
from aesl_trl.losses import head_triton as h

TYPES = dict(tile_ptr="*{tile}", gradient_ptr="*bf16", labels_ptr="*i64", is_top1_ptr="*i1", scale="fp32",
             softcap="fp32", tile_stride="i32", gradient_stride="i32", vocab="i32")
FLAGS = dict(HAS_SOFTCAP=True, HAS_TEMPERATURE=True, HAS_GRADIENT=True, FLOAT=tl.float32)
KERNELS = dict(statistics=h._statistics_kernel, rest_and_gradient=h._rest_and_gradient_kernel)

for name, kernel in KERNELS.items():
    names = kernel.arg_names
    for launch in (h.LAUNCHES[name], h.Launch(1024, 4, 3))[:{num_launches}]:
        flags = {{**FLAGS, "BLOCK": launch.block, "STAGES": launch.stages}}
        flags = {{flag: value for flag, value in flags.items() if flag in names}}
        signature = {{each: "constexpr" if each in flags else TYPES.get(each, "*fp32") for each in names}}
        constants = {{(names.index(flag),): value for flag, value in flags.items()}}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {{"num_warps": launch.warps}}
        compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
        print(name, launch.stages, len(compiled.asm["cubin"]) > 1000, ".local" in compiled.asm["ptx"])
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above compile and run them")
@pytest.mark.parametrize(("capability", "tile", "num_launches"), [(80, "fp32", 1), (90, "fp32", 2), (90, "bf16", 1)])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, tile, num_launches):
    """To machine code for A100 and H100, nothing spilt to local memory, loading ahead or not; it takes no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = COMPILE.format(capability=capability, tile=tile, num_launches=num_launches)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [f"{name} {stages} True False" for name in head_triton.LAUNCHES for stages in (1, 3)[:num_launches]]
    assert done.stdout.splitlines() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 896, 151_936), (1000, 4096, 128_256)])
def test_real_sizes_on_a_gpu(shape, launches, monkeypatch):
    """bf16 at the block size in use, tile rows by budget, against float64 on the same operands."""
    monkeypatch.undo()
    count, width, vocab = shape
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device="cuda").mul(width**-0.5 * 4).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(vocab, (count,), device="cuda")
    ids = torch.arange(count, device="cuda") // 300
    expected = truth(hidden, weight, None, labels, ids, LogitTransform())
    scores, gradients = found_by_head(hidden, weight, None, labels, ids, aesl_rule())
    torch.testing.assert_close(scores.weights.double(), expected[1]["weights"], atol=1e-4, rtol=0)
    for gradient, value in zip(gradients[:2], expected[2][:2], strict=True):
        assert (gradient.double() - value).norm() < 0.01 * value.norm()
