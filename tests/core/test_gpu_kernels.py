"""Kernels for GPUs, as far as a CPU can tell: when they are used, what they are given, what they compute, that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import strategies
import torch
from hypothesis import given
from strategies import generator, seeds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from whole_maps import HEAD_DIM, HEADS, SCALE, TIGHT, heads, naive

from vltprune import Layout, Stat, attend, attend_with_stats
from vltprune.core import attention
from vltprune.core.kernels import column_stats, varlen

CUDA = torch.device("cuda", 0)
BOTH = Stat.RECEIVED | Stat.COLUMN


def reference(q, k, v, q_offsets, k_offsets, longest_q, longest_k, *, scale, window_size):
    """What `varlen_attn` computes, by its own arguments."""
    assert q_offsets.dtype is k_offsets.dtype is torch.int32
    assert (longest_q, longest_k) == (int(q_offsets.diff().max()), int(k_offsets.diff().max()))
    out = torch.zeros_like(q)
    for q0, q1, k0, k1 in zip(q_offsets, q_offsets[1:], k_offsets, k_offsets[1:], strict=False):
        logits = torch.einsum("ihd,jhd->hij", q[q0:q1], k[k0:k1]) * scale
        if window_size == (-1, 0):  # aligned with the ends, as in FlashAttention
            shape = logits.shape[1:]
            logits.masked_fill_(torch.ones(shape, dtype=torch.bool).triu(1 + shape[1] - shape[0]), -torch.inf)
        out[q0:q1] = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v[k0:k1])
    return out


CALLED = []


def kernel(*args, **options):
    CALLED.append(options)
    return reference(*args, **options)


@pytest.fixture(autouse=True)
def by_reference(request, monkeypatch):
    """`attend` goes by the kernel wherever it may on a GPU, and the kernel is the reference."""
    CALLED.clear()
    if "on_gpu" not in request.fixturenames:
        monkeypatch.setattr(varlen, "applies", lambda *_: True)
        monkeypatch.setattr(varlen, "_kernel", lambda: kernel)


@given(heads(), st.booleans())
def test_self_attention_by_the_kernel(drawn, causal):
    layout, q, k, v, bias, apart = drawn
    CALLED.clear()
    out = attend(q, k, v, layout, SCALE, causal=causal, key_bias=bias, pairs=apart and apart.pairs)
    assert_close(out, naive(q, k, v, layout, layout, causal=causal, bias=bias, apart=apart), **TIGHT)
    assert bool(CALLED) == (bias is None and apart is None)  # which the kernel cannot take


@given(heads(), seeds)
def test_cross_attention_by_the_kernel(drawn, seed):
    keys, _, k, v, _, _ = drawn
    layout = Layout(tuple(torch.randint(1, 6, (keys.batch,), generator=generator(seed)).tolist()))
    q = torch.randn(layout.total, HEADS, HEAD_DIM, generator=generator(seed), dtype=torch.float64)
    CALLED.clear()
    assert_close(attend(q, k, v, layout, SCALE, key_layout=keys), naive(q, k, v, layout, keys), **TIGHT)
    assert CALLED


def test_dropout_is_not_left_to_the_kernel():
    q = torch.randn(5, HEADS, HEAD_DIM)
    attend(q, q, q, Layout((2, 3)), SCALE, dropout=0.5)
    assert not CALLED


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors without contents say that they are on an NVIDIA GPU of the Ampere generation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        yield


def empty(total, head_dim=64, dtype=torch.bfloat16, heads=3, device=CUDA):
    return torch.empty(total, heads, head_dim, dtype=dtype, device=device)


def layouts():
    """A ragged one and a uniform one; their tensors must not outlive a test."""
    return Layout((2, 3), CUDA), Layout((5, 5), CUDA)


def test_when_ragged_attention_goes_by_the_kernel(on_gpu, monkeypatch):
    (ragged, uniform), q, k = layouts(), empty(5), empty(10)
    assert varlen.applies(q, q, q, ragged, ragged)
    assert varlen.applies(q, q, q, ragged, ragged, causal=True)
    assert varlen.applies(q, k, k, ragged, uniform)
    assert varlen.applies(*[empty(5, dtype=torch.float16)] * 3, ragged, ragged)
    assert varlen.applies(*[empty(5, head_dim=80)] * 3, ragged, ragged)

    assert not varlen.applies(k, k, k, uniform, uniform)  # where SDPA needs no padding
    assert not varlen.applies(q, k, k, ragged, uniform, causal=True)
    assert not varlen.applies(*[empty(5, dtype=torch.float32)] * 3, ragged, ragged)
    assert not varlen.applies(q, q, q.float(), ragged, ragged)
    assert not varlen.applies(*[empty(5, head_dim=20)] * 3, ragged, ragged)
    assert not varlen.applies(*[empty(5, head_dim=256)] * 3, ragged, ragged)
    assert not varlen.applies(*[empty(5, device="cpu")] * 3, ragged, ragged)
    assert not varlen.applies(q, q, q, Layout((5, 0), CUDA), Layout((5, 0), CUDA))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert not varlen.applies(q, q, q, ragged, ragged)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_takes_what_its_kernel_is_given(on_gpu, causal):
    """The real operator, on tensors without contents: its own checks, and the shape of its result."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")
    ragged, uniform = layouts()
    qkv = torch.empty(5, 3, 3, 64, dtype=torch.bfloat16, device=CUDA)
    out = attend(*qkv.unbind(1), ragged, SCALE, causal=causal)
    assert out.shape == (5, 3, 64) and out.dtype is torch.bfloat16
    assert attend(empty(5), empty(10), empty(10), ragged, SCALE, key_layout=uniform).shape == (5, 3, 64)


def test_without_the_kernel_torch_computes_the_same_way_as_before(on_gpu, monkeypatch):
    """An older torch: all instances padded in one call, or one by one."""
    ragged, _ = layouts()
    monkeypatch.setattr(varlen, "_kernel", lambda: None)
    assert attend(empty(5), empty(5), empty(5), ragged, SCALE).shape == (5, 3, 64)
    monkeypatch.setattr(attention, "_SMALL", {})
    assert attend(empty(5), empty(5), empty(5), ragged, SCALE).shape == (5, 3, 64)


def test_when_column_statistics_go_by_the_kernel(on_gpu, monkeypatch):
    pytest.importorskip("triton", reason="this environment has no triton")
    q = empty(5)
    for needs in (Stat.RECEIVED, Stat.COLUMN, BOTH):
        assert column_stats.applies(q, q, needs)
    assert column_stats.applies(q.float(), q.float(), BOTH)

    for needs in (Stat.NONE, Stat.DIAGONAL, BOTH | Stat.PAGERANK):
        assert not column_stats.applies(q, q, needs)
    assert not column_stats.applies(q, q.float(), BOTH)
    assert not column_stats.applies(empty(5, device="cpu"), empty(5, device="cpu"), BOTH)
    trained = empty(5).requires_grad_()
    assert not column_stats.applies(trained, trained, BOTH)
    with torch.no_grad():
        assert column_stats.applies(trained, trained, BOTH)
    with monkeypatch.context() as recording:
        recording.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not column_stats.applies(q, q, BOTH)
    monkeypatch.setattr(column_stats, "_HAS_TRITON", False)
    assert not column_stats.applies(q, q, BOTH)


def test_statistics_by_the_kernel_run_beside_fused_attention(monkeypatch):
    """The kernel gets what it needs, its results are the statistics, and nothing else makes a map."""
    layout, g = Layout((4, 3)), generator(0)
    tokens = strategies.packed(layout, 2, 0.3, True, False, 1.0, g)
    q, k, v = (torch.randn(7, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    out, exact = attend_with_stats(q, k, v, tokens, SCALE, BOTH | Stat.SUMMARY)
    given = []

    def kernel(*args, **options):
        given.append((args, options))
        return {stat: exact[stat] for stat in BOTH}

    monkeypatch.setattr(column_stats, "applies", lambda q, k, needs: needs == BOTH)
    monkeypatch.setattr(column_stats, "column_statistics", kernel)
    monkeypatch.setattr("vltprune.core.attention_stats._sum_blocks", None)
    same_out, stats = attend_with_stats(q, k, v, tokens, SCALE, BOTH | Stat.SUMMARY)
    assert_close(same_out, out)
    assert_close(stats[Stat.SUMMARY], exact[Stat.SUMMARY])
    assert stats[Stat.RECEIVED] is exact[Stat.RECEIVED]
    ((args, options),) = given
    assert args[:5] == (q, k, layout, SCALE, BOTH)
    assert torch.equal(args[5], tokens.free.float()) and torch.equal(args[6], torch.ones(7))
    assert options == {"causal": False}


def test_column_statistics_in_the_interpreter():
    """Against the exact path: ragged lengths, widths of heads, causal, half precision. See the script."""
    pytest.importorskip("triton", reason="this environment has no triton")
    script = Path(__file__).with_name("interpreted_column_stats.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 cases agree" in done.stdout


@pytest.mark.parametrize(("capability", "causal"), [(80, True), (90, False)])
def test_the_kernels_compile_for_a_gpu_in_bfloat16(monkeypatch, tmp_path, capability, causal):
    """For tensor cores, without more shared memory than an RTX card has. The interpreter cannot multiply bfloat16."""
    triton = pytest.importorskip("triton", reason="this environment has no triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vltprune.core.kernels import triton_column_stats as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"HEAD_DIM": 80, "WIDTH": 128, "BLOCK": 64, "CAUSAL": causal}
    kinds = {"q": "*bf16", "k": "*bf16", "offsets": "*i32", "scale": "fp32"} | dict.fromkeys(fixed, "constexpr")
    floats = ("row_sums", "free", "present", "of_largest", "of_mean")
    for kernel in (kernels._row_log_sums, kernels._column_sums):
        signature = {name: kinds.get(name, "*fp32" if name in floats else "i32") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", capability, 32))
        assert "mma" in made.asm["ptx"]
        assert made.metadata.shared <= 99 * 1024
