"""The Triton kernels compile for a GPU, also where none is here to run them.

What they compute is tested in ``test_agreement``.
"""

import os
from types import SimpleNamespace

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the agreement tests compile and run them")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(
    ("dtype", "rounded"),  # of the coefficients and states; of what goes to matrix products
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_kernels_compile_without_fused_multiply_add(dtype, rounded, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", exc_type=ImportError)
    from triton.backends.compiler import GPUTarget

    from snn_lib.kernels import cuda

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled[kernel.fn.__name__] = run(kernel, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    steps, batch, channels, order_p, order_q = 5, 3, 70, 3, 1
    sequence = torch.ones(1, batch, channels, dtype=dtype).expand(steps, -1, -1)
    alpha, beta = sequence[:1, 0].expand(order_p, -1), sequence[:1, 0].expand(order_q + 1, -1)
    past = sequence[:order_p], sequence[:order_q]
    product = sequence.to(rounded)
    neuron = product, *alpha, *sequence[:2]
    seed = torch.tensor(0)
    cuda.filter_forward(sequence, alpha, beta, *past, rounded)
    cuda.filter_backward(product, past[0], sequence, alpha, beta, product, *past, [True] * 5)
    cuda.neuron_forward(*neuron, 0.3, seed)
    cuda.neuron_backward(
        sequence, *sequence[:2], *neuron, "gaussian", 0.4, 0.3, seed, needed=[True] * 6
    )

    assert len(compiled) == 4
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
    for name in ("_filter_forward", "_neuron_forward"):  # spikes depend on their rounding
        assert "fma." not in compiled[name].asm["ptx"]
