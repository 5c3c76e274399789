"""The kernels of both GPU backends, on a GPU: ``benchmarks/gpu.sh test`` runs it.

With MOBILEMAMBA_GPU_DRY_RUN=1 the CPU stands in for the GPU (``benchmarks/gpu.sh test --dry-run``): CUDA kernels are
run by tests/emulation and Triton's by its interpreter. What needs a GPU is skipped then.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import test_ops
import test_updates
import torch
import torch.nn.functional as F
from test_ops import LAYOUTS, SMALL, TYPICAL, differentiate
from torch import Tensor

import mobilemamba
import mobilemamba_kernels as mk
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.backends import INTERPRETED, PREFERENCES, TRITON_ERROR, forced_backend
from mobilemamba_kernels.testing import BUILDERS, Case, assert_close, cases, map_tensors, tensors

DRY_RUN = os.environ.get("MOBILEMAMBA_GPU_DRY_RUN") == "1"
if not DRY_RUN and not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)

DEVICE = "cpu" if DRY_RUN else "cuda"
BACKENDS = {"cuda": "cpu" if DRY_RUN else "cuda", "triton": "triton"}
"""The kernels under test, and what ``use_backend`` calls them here."""

needs_gpu = pytest.mark.skipif(DRY_RUN, reason="a CPU has nothing of the kind")
pytestmark = pytest.mark.usefixtures("ieee_float32")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
two_layouts = pytest.mark.parametrize("layout", LAYOUTS[:2])


def has_kernel(backend: str, op: str) -> bool:
    return op in _library.TRITON if backend == "triton" else DEVICE in _library.KERNELS[op]


def has_backward_kernel(backend: str, op: str) -> bool:
    """One of its own, not PyTorch's: its gradients are the same bits every time."""
    if backend == "triton":
        return hasattr(__import__(f"mobilemamba_kernels.triton.{op}", fromlist=["backward"]), "backward")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mobilemamba::{op}_bwd", DEVICE.upper())


def on_backends(chosen: Sequence[Case]) -> pytest.MarkDecorator:
    """Each case on each backend with a kernel for it; one case after the other, so that its truth is computed once."""
    pairs = [(backend, case) for case in chosen for backend in BACKENDS if has_kernel(backend, case.operator)]
    return pytest.mark.parametrize(("backend", "case"), pairs, ids=[f"{backend}-{case}" for backend, case in pairs])


@pytest.fixture
def forced(backend: str) -> Iterator[None]:
    """Runs the test on the backend of its parameters."""
    with use_backend(BACKENDS[backend]):
        yield


@pytest.fixture
def ieee_float32() -> Iterator[None]:
    """Convolutions of float32 without TF32, which cuDNN has by default: an error of PyTorch is the measure of ours."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


on_forced = pytest.mark.usefixtures("forced")


def test_kernels_are_loaded():
    """Without them the tests below would be fewer, and green."""
    assert TRITON_ERROR is None
    if DRY_RUN:
        assert (_library.cpu_capability(), INTERPRETED) == ("emulated CUDA", True)
        return
    assert _library.CUDA_ERROR is None
    if forced_backend() is None:
        runs = {row.op: row.backend for row in mk.report() if row.device == "cuda"}
        for op, _, preferred in PREFERENCES:
            assert runs[op] in BACKENDS, f"{op} runs on {runs[op]}"
            assert runs[op] == preferred or not has_kernel(preferred, op)


@all_layouts
@all_dtypes
@on_backends(SMALL)
@on_forced
def test_forward_and_gradients(backend, case, dtype, layout):
    test_ops.check_against_truth(case, dtype, layout, DEVICE)


@all_layouts
@all_dtypes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", test_updates.STEPS, ids=str)
@on_forced
def test_steps_in_place(backend, step, dtype, layout):
    test_updates.check_step(step, dtype, layout, device=DEVICE)


@needs_gpu
@two_dtypes
@on_backends(cases(benchmark=True))
@on_forced
def test_benchmark_shapes(backend, case, dtype):
    test_ops.check_against_truth(case, dtype, "channels_last", DEVICE)


@on_backends(SMALL)
@on_forced
def test_every_element_is_written(backend, case):
    """With memory that PyTorch fills with NaN before use."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own gradients
            results, grads = differentiate(case, case.make(device=DEVICE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (*results, *grads.values()))


@two_layouts
@two_dtypes
@on_backends(TYPICAL)
@on_forced
def test_opcheck(backend, case, dtype, layout):
    test_ops.run_opcheck(case, dtype, layout, DEVICE)


@two_layouts
@all_dtypes
@on_backends([c for c in SMALL if "levels" not in c.name])
@on_forced
def test_strides_are_those_of_the_fake(backend, case, dtype, layout):
    test_ops.compare_strides(case, dtype, layout, DEVICE)


@two_layouts
@on_backends(SMALL)
@on_forced
def test_non_finite_values_propagate(backend, case, layout):
    test_ops.check_non_finite_values(case, layout, DEVICE)


@pytest.mark.parametrize("case", TYPICAL, ids=lambda c: c.op)
@needs_gpu
def test_derivatives_of_the_reference(case):
    """By gradcheck, in float64. The kernels have no float64; their gradients are compared with these."""
    with use_backend("reference"), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        test_ops.check_derivatives_of_reference(case, DEVICE)


@two_layouts
@all_dtypes
@on_backends(TYPICAL)
@on_forced
def test_same_bits_every_time(backend, case, dtype, layout):
    gradients = has_backward_kernel(backend, case.operator)
    found = []
    for _ in range(3):
        results, grads = differentiate(case, case.make(dtype, layout, DEVICE))
        found.append([*results, *(grads.values() if gradients else ())])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@on_backends(TYPICAL)
@on_forced
def test_compiles_without_a_graph_break(backend, case):
    test_ops.compare_compiled(case, "aot_eager", DEVICE)


@on_backends([case for case in TYPICAL if case.op in ("bidirectional_selective_scan", "pointwise_conv2d_act")])
@on_forced
def test_compiles_with_inductor(backend, case):
    test_ops.compare_compiled(case, "inductor", DEVICE)


# --- streams, graphs, devices --------------------------------------------------------------------------------------


def step(case: Case, arguments: dict, backward: bool) -> list[Tensor]:
    """Results and, where they are the kernels', the gradients of their sum."""
    inputs = list(tensors(arguments).values()) if backward else []
    results = case.run(arguments)
    return (
        [*results, *torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])]
        if inputs
        else [*results]
    )


def leaves(case: Case, dtype: torch.dtype, seed: int, backward: bool, device: str = DEVICE) -> dict:
    made = case.make(dtype, "channels_last", device, seed)
    return map_tensors(lambda t: t.requires_grad_(backward), made)


@needs_gpu
@two_dtypes
@on_backends(TYPICAL)
@on_forced
def test_graph_replays_with_changed_inputs(backend, case, dtype):
    backward = has_backward_kernel(backend, case.operator)
    arguments = leaves(case, dtype, 0, backward)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(case, arguments, backward)  # compilers and libraries want memory and time before they can be captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step(case, arguments, backward)
    for seed in (1, 2):
        changed = leaves(case, dtype, seed, backward)
        with torch.no_grad():
            for name, tensor in tensors(arguments).items():
                tensor.copy_(tensors(changed)[name])
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, step(case, changed, backward)))


@needs_gpu
@on_backends(TYPICAL)
@on_forced
def test_two_streams(backend, case):
    """Calls that run at the same time share no scratch memory, and each waits for its own stream alone."""
    backward = has_backward_kernel(backend, case.operator)
    arguments = [leaves(case, torch.float32, seed, backward) for seed in range(2)]
    expected = [step(case, given, backward) for given in arguments]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in arguments]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for stream, given, results in zip(streams, arguments, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(case, given, backward))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        assert all(all(map(torch.equal, result, right)) for result in results)


@needs_gpu
@on_backends(TYPICAL)
@on_forced
def test_runs_on_the_current_stream(backend, case):
    """The input is written late on a side stream: a kernel on another one would read what was there before."""
    arguments, late = (leaves(case, torch.float32, seed, False) for seed in range(2))
    expected = case.run(late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, tensor in tensors(arguments).items():
            tensor.copy_(tensors(late)[name])
        found = case.run(arguments)
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


@needs_gpu
@on_backends(TYPICAL)
@on_forced
def test_does_not_wait_for_the_device(backend, case):
    backward = has_backward_kernel(backend, case.operator)
    arguments = leaves(case, torch.float32, 0, backward)
    step(case, arguments, backward)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, arguments, backward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.skipif(not DRY_RUN and torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_backends(TYPICAL)
@on_forced
def test_runs_on_the_device_of_its_arguments(backend, case):
    backward = has_backward_kernel(backend, case.operator)
    expected = step(case, leaves(case, torch.float32, 0, backward), backward)
    found = step(case, leaves(case, torch.float32, 0, backward, "cuda:1"), backward)
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


# --- networks ------------------------------------------------------------------------------------------------------


def network(batch: int) -> tuple[mobilemamba.MobileMamba, Tensor]:
    """S6 whose branches all matter, which most do not at the start, and images; in a dry run narrow and small ones."""
    torch.manual_seed(0)
    options = {"widths": (48, 64, 80)} if DRY_RUN else {}
    model = mobilemamba.create_model("mobilemamba_s6", **options).to(DEVICE)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    size = 64 if DRY_RUN else 224
    return model, torch.randn(batch, 3, size, size).to(DEVICE, memory_format=torch.channels_last)


def test_training_step_under_autocast():
    """Bfloat16 around float32 parameters: gradients as good as on plain PyTorch, and a loss that falls."""
    model, x = network(2 if DRY_RUN else 16)
    labels = torch.arange(len(x), device=DEVICE)

    def gradients(model: mobilemamba.MobileMamba, x: Tensor, autocast: bool) -> Tensor:
        model = copy.deepcopy(model).train()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with use_backend("reference"):
        exact = gradients(model.double(), x.double(), False)
        plain = gradients(model.float(), x, True)
    found = gradients(model, x, True)
    assert found.dtype == torch.float32
    error, allowed = ((g.double() - exact).norm() / exact.norm() for g in (found, plain))
    assert error <= 1.5 * allowed, f"relative error {error:.2e}, of plain PyTorch {allowed:.2e}"

    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    losses = []
    for _ in range(5 if DRY_RUN else 10):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def optimized(model: mobilemamba.MobileMamba, dtype: torch.dtype) -> mobilemamba.MobileMamba:
    if DRY_RUN and dtype == torch.float16:
        pytest.skip("on a CPU a network is optimized in float32 and bfloat16")
    return mobilemamba.optimize_for_inference(model, dtype)


@all_dtypes
def test_optimized_network(dtype):
    model, x = network(1 if DRY_RUN else 8)
    model.eval()
    fast = optimized(model, dtype)
    x = x.to(dtype)
    with torch.inference_mode():
        found = fast(x)
        with use_backend("reference"):
            exact = mobilemamba.fuse(model).double()(x.double())
            plain = mobilemamba.fuse(model).to(dtype)(x)
    assert_close(found.to(plain.dtype), exact, plain, "logits")


@needs_gpu
@all_dtypes
def test_optimized_network_as_a_graph(dtype):
    model, x = network(8)
    fast, x = optimized(model.eval(), dtype), x.to(dtype)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            fast(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = fast(x)
        x.copy_(x.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, fast(x))


# --- large tensors -------------------------------------------------------------------------------------------------

# 16 maps of so many rows and columns are over 2³¹ bytes in float32, and over 2³¹ elements in bfloat16.
SIDES = {"2-GB": (torch.float32, 5_796), "2-to-the-31-elements": (torch.bfloat16, 11_590)}
all_sides = pytest.mark.parametrize(("dtype", "side"), SIDES.values(), ids=SIDES)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_merge": lambda x: mk.cross_merge_fn(mk.cross_scan_fn(x).view(1, 4, *x.shape[1:])).view(x.shape),
    "haar_dwt2d": mk.haar_dwt2d,
    "haar_idwt2d": lambda x: mk.haar_idwt2d(x.unflatten(1, (4, 4))),
    "wavelet_depthwise_conv2d": lambda x: mk.wavelet_depthwise_conv2d(x, ones(64, 1, 3, 3), base=x),
    "depthwise_conv2d_act": lambda x: mk.depthwise_conv2d_act(x, ones(16, 1, 3, 3), residual=x),
    "conv2d_act": lambda x: mk.conv2d_act(x, ones(4, 16, 3, 3), stride=2),
    "pointwise_conv2d_act": lambda x: mk.pointwise_conv2d_act(x, ones(16, 16), residual=x),
    "feed_forward": lambda x: mk.feed_forward(x, ones(16, 16), None, ones(16, 16), None),
}
huge_on_backends = pytest.mark.parametrize(
    ("backend", "op"), [(backend, op) for op in MAPS for backend in BACKENDS if has_kernel(backend, op)]
)


@pytest.fixture
def memory() -> Iterator[None]:
    """Skips what does not fit into the device's memory, and gives back what it took."""
    try:
        yield
    finally:
        torch.cuda.empty_cache()


def skip_without(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of the device's memory, of which {free / 2**30:.0f} are free")


@needs_gpu
@two_layouts
@all_sides
@huge_on_backends
@pytest.mark.usefixtures("forced", "memory")
def test_huge_maps(backend, op, dtype, side, layout):
    """Zeros but for the last corner of the last channel, where a 32-bit index would have wrapped."""
    backward = has_backward_kernel(backend, op)
    skip_without({"haar_idwt2d": 12, "cross_merge": 24}.get(op, 8) * 16 * side**2 * dtype.itemsize)
    shape = (1, side, side, 16) if layout == "channels_last" else (1, 16, side, side)
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    x = x.permute(0, 3, 1, 2) if layout == "channels_last" else x
    x[0, -1, -4:, -4:] = torch.arange(1.0, 17).view(4, 4)
    corner = x[:, :, -16:, -16:].clone().requires_grad_(backward)
    x.requires_grad_(backward)
    results = [MAPS[op](x), MAPS[op](corner)]
    assert torch.equal(results[0][..., -4:, -4:], results[1][..., -4:, -4:])
    assert results[1].any()
    if backward:
        for given, result in zip((x, corner), results, strict=True):
            grad = torch.zeros_like(result)
            grad[..., -2:, -2:] = 1
            given.grad = torch.autograd.grad(result, given, grad)[0]
        assert torch.equal(x.grad[..., -4:, -4:], corner.grad[..., -4:, -4:])
        assert corner.grad.any()


@needs_gpu
@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 2**25 + 5), (torch.bfloat16, 2**27 + 5)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("forced", "memory")
def test_huge_scan(backend, dtype, length):
    """Zeros but for the end of the sequence."""
    skip_without(12 * 16 * length * dtype.itemsize)
    u = torch.zeros(1, 16, length, dtype=dtype, device=DEVICE)
    u[:, :, -32:] = torch.linspace(-1, 1, 32)
    delta = torch.full((1, 1, 1), 0.5, dtype=dtype, device=DEVICE).expand(u.shape)
    A, B = -ones(16, 1), ones(1, 1, 1).expand(1, 1, length)
    u.requires_grad_()
    y = mk.selective_scan_fn(u, delta, A, B, B)
    grad = torch.zeros_like(y)
    grad[..., -32:] = 1
    (found,) = torch.autograd.grad(y, u, grad)
    end = u.detach()[..., -32:].clone().requires_grad_()
    expected = mk.selective_scan_ref(end, delta[..., -32:], A, B[..., -32:], B[..., -32:])
    (expected_grad,) = torch.autograd.grad(expected.sum(), end)
    torch.testing.assert_close(y[..., -32:], expected)
    torch.testing.assert_close(found[..., -32:], expected_grad)
    assert not y[..., :-32].any()


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("forced", "memory")
def test_huge_batch_of_short_scans(backend):
    """The network's bidirectional scan with so many images that the last ones lie beyond 2³¹ elements."""
    case = BUILDERS["bidirectional_selective_scan"](2, 320, 49, 1, has="Dbs")
    few = case.make(torch.bfloat16, "channels_last", DEVICE)
    images = -(-(2**31) // few["u"][0].numel()) // 2 * 2 + 2
    skip_without(10 * images * few["u"][0].numel() * 2)
    repeated = {name: few[name].repeat(images // 2, *[1] * (few[name].ndim - 1)) for name in ("u", "delta", "B", "C")}
    (found,) = case.run(few | repeated)
    assert torch.equal(found[-2:], case.run(few)[0])
