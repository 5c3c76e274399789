"""The network optimized for a GPU: on tensors without data, in Triton's interpreter, and on a GPU if there is one."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from test_network import create_small, filled
from test_optimized import CHANGES, VARIATIONS, compare
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilemamba
from mobilemamba import cuda_graphs, optimized
from mobilemamba.cuda_graphs import CudaGraphs
from mobilemamba_kernels import backends
from mobilemamba_kernels.backends import INTERPRETED, forced_backend

CUDA_LAUNCHES = {
    "ss2d_bidirectional": 3,  # projection, scan, normalization with the gate; in 16 bits
    "wavelet_depthwise_conv2d": 1,
    "depthwise_conv2d_act": 1,
}
"""Launches of a call of the operators that are CUDA C++ in the network. Triton's are counted by their launcher."""

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the logits' scale, of small networks

interpreted = pytest.mark.skipif(
    not (INTERPRETED and forced_backend() == "triton"), reason="needs TRITON_INTERPRET=1 and MOBILEMAMBA_BACKEND=triton"
)
not_forced = pytest.mark.skipif(forced_backend() is not None, reason="a backend is forced")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available() or forced_backend() is not None, reason="needs a GPU")


class Launches(TorchDispatchMode):
    """Counts the kernels that calls on tensors without data would launch on a GPU, by operator."""

    LAUNCHES_NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # within an operator, and in inference mode, PyTorch's compositions arrive whole
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        op = func._schema.name.split("::")[1].removesuffix("_fwd")
        if func.namespace == "mobilemamba_triton":
            self.found[op] += self._of_triton(op, args)
        elif func.namespace == "mobilemamba":
            self.found[op] += CUDA_LAUNCHES[op]
        elif not func.is_view and not func._schema.name.startswith(self.LAUNCHES_NOTHING):
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _of_triton(op, args):
        launcher = importlib.import_module("mobilemamba_kernels.triton._launch")
        module = importlib.import_module(f"mobilemamba_kernels.triton.{op}")
        with Launches() as others:  # PyTorch's, such as copies
            own = list(launcher.record(op, module.forward, *args))
        return len(own) + others.found.total()


@dataclass(frozen=True)
class WithoutData(optimized._Target):
    """A GPU whose tensors are of the device "meta"."""

    kernels: tuple[str, ...]

    def backend(self, operator):
        return next(b for b in backends._candidates(operator, "cuda") if b in self.kernels)


@pytest.fixture(params=["cuda and triton", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The backends of a GPU; CUDA C++ may be missing."""
    for op in CUDA_LAUNCHES:
        operator = getattr(torch.ops.mobilemamba, f"{op}_fwd").default
        monkeypatch.setitem(backends.implementations(op), "cuda", operator)
    return tuple(request.param.split(" and "))


def without_data(model: mobilemamba.MobileMamba, dtype: torch.dtype, kernels: tuple[str, ...]):
    """``model`` optimized for a GPU, without data."""
    target = WithoutData(torch.device("meta"), dtype, kernels)
    return optimized._rebuilt(mobilemamba.fuse(model).to("meta"), target)


@not_forced
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_at_most_100_launches(dtype, kernels):
    model = without_data(mobilemamba.create_model("mobilemamba_s6"), dtype, kernels)
    totals = []
    for image_dtype in (torch.float32, dtype):
        x = torch.empty(256, 3, 224, 224, dtype=image_dtype, device="meta", memory_format=torch.channels_last)
        with torch.inference_mode(), Launches() as launches:
            model(x)
        totals.append(launches.found.total())
    assert totals[0] == totals[1] + 1 <= 100, launches.found
    assert {name: n for name, n in launches.found.items() if name.startswith("aten")} == {"aten::mean": 1}


@not_forced
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_maps_are_channels_last_in_its_type(dtype, kernels):
    model = without_data(create_small(), dtype, kernels)
    assert model.backend == " and ".join(kernels)
    seen = 0

    def check(module, inputs, output):
        nonlocal seen
        seen += 1
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, optimized.Direct) and name != "head"}
    for module in layers.values():
        module.register_forward_hook(check)
    with torch.no_grad():
        for image_dtype in (torch.float32, torch.float16, torch.float64):
            result = model(torch.empty(2, 3, 130, 90, dtype=image_dtype, device="meta"))
            assert result.dtype == torch.float32
            assert result.shape == (2, model.num_classes)
        _, maps = model.forward_intermediates(torch.empty(2, 3, 130, 90, device="meta"))
    assert seen == 4 * len(layers)
    assert all(m.dtype == dtype and m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    with pytest.raises(ValueError, match="images must be on meta, as the network is, but are on cpu"):
        model(torch.empty(2, 3, 130, 90))
    with pytest.raises(TypeError, match=r"stays on meta with its torch.b?float\d\d, but was to become"):
        model.double()


@not_forced
def test_weights_are_as_the_kernels_read_them(kernels):
    """Products in the type asked for, small parameters in float32, and nothing that a kernel would copy first."""
    model = without_data(create_small(), torch.float16, kernels)
    for module in model.modules():
        if isinstance(module, optimized.DirectConv):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        if isinstance(module, (optimized.DirectDepthwise, optimized.DirectWavelet)):
            weight = module.weight.permute(2, 3, 1, 0) if module.backend == "triton" else module.weight
            assert weight.is_contiguous()
        if isinstance(module, optimized.Direct):
            products = module.operator in ("conv2d_act", "pointwise_conv2d_act", "feed_forward", "squeeze_excite")
            for name, p in module.named_parameters():
                multiplied = (products and name[0] == "w") or name == "x_proj_weight"
                assert p.dtype == (torch.float16 if multiplied else torch.float32)


def as_for_gpus(model: mobilemamba.MobileMamba, dtype: torch.dtype) -> mobilemamba.MobileMamba:
    """``model`` optimized as for a GPU, on the backend that the CPU has."""
    fused = mobilemamba.fuse(copy.deepcopy(model).double()).float()
    return optimized._rebuilt(fused, optimized._Target(torch.device("cpu"), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("name", [*VARIATIONS, *CHANGES])
@not_forced
def test_every_option_and_change(name, dtype, monkeypatch):
    monkeypatch.setattr(optimized._Target, "packs", False)
    model = filled(create_small(**VARIATIONS.get(name, {})))
    changed = CHANGES[name](model) if name in CHANGES else model
    model = (changed if isinstance(changed, mobilemamba.MobileMamba) else model).eval()
    compare(model, as_for_gpus(model, dtype), torch.randn(2, model.in_chans, 70, 45), TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_interpreter(dtype):
    model = filled(create_small())
    found = mobilemamba.optimize_for_inference(model, dtype)
    assert (found.backend, found.map_dtype) == ("triton", dtype)
    x = torch.randn(2, 3, 70, 45)
    with backends.use_backend("reference"), torch.inference_mode():
        wanted = model(x)
    with torch.inference_mode():
        result = found(x)
    assert result.dtype == torch.float32
    assert (result - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.full
@pytest.mark.skipif(bool(backends.TRITON_ERROR), reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="runs by itself")
def test_in_an_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "in_the_interpreter"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "MOBILEMAMBA_BACKEND": "triton"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


@not_forced
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_training_under_autocast(device):
    """Maps of 16 bits within, float32 parameters and gradients; two steps lower the loss."""
    torch.manual_seed(0)
    model = create_small().to(device).train()
    seen = Counter()
    for module in model.modules():
        if not isinstance(module, (mobilemamba.MobileMamba, nn.Sequential, nn.ModuleList)):
            module.register_forward_hook(lambda module, inputs, output: seen.update([output.dtype]))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, losses = torch.randn(4, 3, 64, 64, device=device), []
    for _ in range(3):  # the last layer of each residual is zero at first, and so are gradients before it
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), torch.arange(4, device=device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert set(seen) == {torch.bfloat16}
    assert losses[2] < losses[0]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == p.grad.dtype == torch.float32, name
            assert p.grad.isfinite().all(), name


class _Stub:
    """What CudaGraphs calls of ``torch``, with "graphs" that run the function of the last capture again."""

    def __init__(self, function):
        self.function, self.captured, self.replays = function, [], 0
        self.cuda = self

    def __getattr__(self, name):
        return getattr(torch, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def _context(self, *args, **kwargs):
        return self

    def is_current_stream_capturing(self):
        return False

    device = stream = graph = current_stream = Stream = Event = autocast = _context
    wait_event = wait_stream = record = _context

    def CUDAGraph(self):
        return _StubGraph(self)


class _StubGraph:
    def __init__(self, stub):
        self.stub, self.index = stub, len(stub.captured) + 1  # the first run of a shape is not a capture

    def pool(self):
        return None

    def replay(self):
        self.stub.replays += 1
        x, result = self.stub.captured[self.index]
        result.copy_(self.stub.function(x))


def test_graphs_of_shapes(monkeypatch):
    stub = _Stub(lambda x: x.float().flatten(1).sum(1))
    monkeypatch.setattr(cuda_graphs, "torch", stub)
    monkeypatch.setattr(cuda_graphs, "SHAPES", 2)
    graphs = CudaGraphs()

    def function(x):
        result = stub.function(x)
        stub.captured.append((x, result))
        return result

    def call(x):
        with torch.inference_mode():
            return graphs(function, x, torch.bfloat16)

    first, second = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    results = [call(first), call(second), call(torch.ones(1, 3, 4, 4)), call(first)]
    assert [r.tolist() for r in results] == [[48, 48], [96, 96], [48], [48, 48]]
    assert (len(stub.captured), stub.replays) == (4, 4)
    x, _ = stub.captured[1]
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert call(torch.ones(5, 3, 4, 4)).tolist() == [48] * 5  # there is no graph for a third shape
    assert graphs(function, first.clone().requires_grad_(), torch.bfloat16).requires_grad
    assert call(first[:0]).shape == (0,)
    assert stub.replays == 4
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert not other._captured
    graphs.clear()
    assert not graphs._captured


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph takes a network on a CUDA GPU, but it is on cpu"):
        mobilemamba.optimize_for_inference(create_small(), cuda_graph=True)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu(dtype, cuda_graph):
    model = filled(create_small()).cuda()
    found = mobilemamba.optimize_for_inference(model, dtype, cuda_graph=cuda_graph)
    for shape in ((2, 3, 70, 45), (0, 3, 64, 64), (5, 3, 64, 64), (2, 3, 70, 45), (1, 3, 1, 1)):
        with torch.backends.cudnn.flags(allow_tf32=False):  # which PyTorch has for float32 unless told
            compare(model, found, torch.randn(shape, device="cuda"), TOLERANCE[dtype])
    with pytest.raises(ValueError, match="images must be on cuda:0"):
        found(torch.randn(2, 3, 70, 45))
    copied = copy.deepcopy(found)
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        assert torch.equal(found(x), copied(x))


@on_gpu
def test_graphs_on_other_streams_and_threads():
    model = mobilemamba.optimize_for_inference(filled(create_small()).cuda(), torch.float16, cuda_graph=True)
    images = torch.randn(8, 2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        wanted = [model._forward(x) for x in images]
        streams = [torch.cuda.Stream() for _ in images]
        torch.cuda.synchronize()
        found = []
        for x, stream in zip(images, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(x))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@on_gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_launches_on_a_gpu(dtype):
    model = mobilemamba.optimize_for_inference(mobilemamba.create_model("mobilemamba_s6").cuda(), dtype)
    x = torch.randn(256, 3, 224, 224, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode():
        model(x)
        with torch.profiler.profile(activities=activities) as profile:
            model(x)
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= 100, Counter(e.name for e in kernels)
