"""Hugging Face's Mamba models on this package's operators, patched and through ``kernels``, against their own code."""

import copy
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import HAS_INSTRUCTION_SETS
from torch.utils._python_dispatch import TorchDispatchMode

from mobilemamba_kernels.interop import hub, patch, patched, unpatch
from mobilemamba_kernels.interop import transformers as ours
from mobilemamba_kernels.testing import assert_close

hf = pytest.importorskip("transformers")
if not HAS_INSTRUCTION_SETS:
    pytest.skip("counts calls of the compiled operators", allow_module_level=True)

FAMILIES = ("mamba", "falcon_mamba", "jamba", "zamba")
try:
    MODULES = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in FAMILIES]
except ImportError:
    MODULES = []
if not all(hasattr(module, name) for module in MODULES or [None] for name in ours.__all__):
    pytest.skip("these transformers have no functions to replace", allow_module_level=True)

SIZES = {"vocab_size": 100, "hidden_size": 32, "tie_word_embeddings": False}
MAMBA = {"num_hidden_layers": 2, "state_size": 16, "initializer_range": 0.2}
HYBRID = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
MODELS = {
    "Mamba": MAMBA,
    "FalconMamba": MAMBA,
    "Jamba": HYBRID | EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1, "experts_implementation": "eager"},
    "Zamba": HYBRID | {"n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
}
SCANS = {"Mamba": 2, "FalconMamba": 2, "Jamba": 2, "Zamba": 6}
"""The scans of one pass: Zamba's heads have one each."""

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, dtype: torch.dtype = torch.float32, kind: str = "ForCausalLM", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**(SIZES | MODELS[name] | options))
    return getattr(hf, name + kind)(config).to(dtype).eval()


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return build(name, dtype)


@functools.cache
def exact_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(model(name, dtype)).double()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(length))


class Recorder(TorchDispatchMode):
    """Counts the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mobilemamba":
            self.calls[func.name().removeprefix("mobilemamba::")] += 1
        return func(*args, **(kwargs or {}))


def check(found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: str) -> None:
    """The rule of testing.py, with some more roundings allowed than an operator has, as those of a model add up."""
    rounding = 64 if plain.dtype == torch.float32 else 12
    atol = rounding * torch.finfo(plain.dtype).eps * exact.abs().max().item()
    assert_close(found, exact, plain, what, atol)


def train(network: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    out = network(ids, labels=ids)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_training(name, dtype):
    network, exact, ids = model(name, dtype).train(), exact_model(name, dtype).train(), tokens(12)
    plain, truth = train(network, ids), train(exact, ids)
    with patched("transformers"), Recorder() as recorder:
        found = train(network, ids)
    network.eval(), exact.eval()
    assert found.keys() == plain.keys() == truth.keys()
    assert len(found) == 2 + len(list(network.parameters()))
    assert recorder.calls["selective_scan_fwd"] == recorder.calls["selective_scan_bwd"] == SCANS[name]
    assert recorder.calls["causal_conv1d_fwd"] == recorder.calls["causal_conv1d_bwd"] > 0
    loss, plain_loss = found.pop("loss"), plain.pop("loss")
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=0)
    errors = torch.zeros(2)
    for key in found:
        check(found[key], truth[key], plain[key], key)
        scale = truth[key].norm() * len(found) ** 0.5
        errors += torch.stack([((t[key] - truth[key]).norm() / scale) ** 2 for t in (found, plain)])
    assert errors[0].sqrt() <= 2 * errors[1].sqrt()


def generate(network: torch.nn.Module, ids: torch.Tensor, count: int = 64, **options) -> torch.Tensor:
    new = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return network.generate(ids, **new, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", MODELS)
def test_generation(name):
    network, ids = model(name), tokens(7, batch=1)
    expected = generate(network, ids)
    with patched("transformers"), Recorder() as recorder:
        found = generate(network, ids)
    assert found.tolist() == expected.tolist()
    assert found.shape == (1, 64)
    assert len(found.unique()) > 10
    assert recorder.calls["selective_scan_fwd"] == SCANS[name]
    assert recorder.calls["selective_state_update"] == 63 * SCANS[name]
    assert recorder.calls["causal_conv1d_update"] == 63 * recorder.calls["causal_conv1d_fwd"] > 0


@torch.no_grad()
def decode(network: torch.nn.Module, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """The logits of every position, the last ones a cached step each."""
    out = network(ids[:, :prefill], use_cache=True)
    logits = [out.logits]
    for step in range(prefill, ids.shape[1]):
        out = network(ids[:, step : step + 1], cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding(name, dtype):
    network, ids = model(name, dtype), tokens(17)
    plain, exact = decode(network, ids, 9), decode(exact_model(name, dtype), ids, 9)
    with patched("transformers"), Recorder() as recorder:
        found = decode(network, ids, 9)
        whole = network(ids).logits
    check(found[:, :9], exact[:, :9], plain[:, :9], "prefill")
    check(found[:, 9:], exact[:, 9:], plain[:, 9:], "steps")
    check(whole, exact, plain, "all at once")
    assert recorder.calls["selective_state_update"] == 8 * SCANS[name]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding(name, dtype):
    network, ids, mask = model(name, dtype), tokens(10), torch.ones(2, 10).long()
    mask[0, :4] = 0
    plain, exact = (m(ids, attention_mask=mask).logits for m in (network, exact_model(name, dtype)))
    continued = generate(network, ids, 8, attention_mask=mask)
    with patched("transformers"):
        found, alone = network(ids, attention_mask=mask).logits, network(ids[:1, 4:]).logits
        check(found[0, 4:], exact[0, 4:], plain[0, 4:], "padded")
        check(found[1], exact[1], plain[1], "full")
        check(alone[0], exact[0, 4:], plain[0, 4:], "alone")
        if dtype == torch.float32:
            assert generate(network, ids, 8, attention_mask=mask).tolist() == continued.tolist()
            assert generate(network, ids[:1, 4:], 8).tolist() == continued[:1].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    network, ids = build(name).train(), tokens(12)
    with patched("transformers"):
        expected = train(network, ids)
        network.gradient_checkpointing_enable()
        with Recorder() as recorder:
            found = train(network, ids)
    assert recorder.calls["selective_scan_fwd"] == 2 * recorder.calls["selective_scan_bwd"] == 2 * SCANS[name]
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "gradient"), [("aot_eager", True), ("inductor", False)])
def test_compiled(backend, gradient):
    network, ids, graphs = build("Mamba", kind="Model", num_hidden_layers=1), tokens(12), []
    network.requires_grad_(gradient)
    expected = network(ids, use_cache=False).last_hidden_state

    def compile(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    with patched("transformers"):
        found = torch.compile(network, backend=compile, fullgraph=True)(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if gradient:
        weights = list(network.parameters())
        gradients = (torch.autograd.grad(y.square().mean(), weights) for y in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    (graph,) = graphs
    assert "mobilemamba.selective_scan_fwd" in graph
    assert "mobilemamba.causal_conv1d_fwd" in graph
    torch._dynamo.reset()


def test_a_model_built_within():
    ids = tokens(12)
    expected = model("Mamba")(ids).logits
    with patched("transformers"), Recorder() as recorder:
        network = build("Mamba")
        found = network(ids).logits
    assert recorder.calls == {"causal_conv1d_fwd": 2, "selective_scan_fwd": 2}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"hidden_act": "gelu"}, {"conv_kernel": 6}, {"conv_kernel": 1}])
def test_convolutions_that_the_operators_lack_stay_theirs(options):
    network, ids = build("Mamba", **options), tokens(12)
    expected = decode(network, ids, 9)
    with patched("transformers"), Recorder() as recorder:
        found = decode(network, ids, 9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert recorder.calls == {"selective_scan_fwd": 2, "selective_state_update": 6}


@pytest.mark.parametrize("name", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_are_refused(name):
    x, weight = torch.ones(1, 8, 6), torch.ones(8, 4)
    with patched("transformers"), pytest.raises(ValueError, match=f"{name} is not supported, as the scan would mix"):
        MODULES[0].causal_conv1d_fn(x, weight, activation="silu", **{name: torch.tensor([[0, 0, 1, 1, 1, 1]])})


def functions() -> dict[str, object]:
    return {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in ours.__all__}


def test_unpatch_puts_every_function_back():
    before = functions()
    replaced = patch("transformers")
    assert replaced == before
    assert patch("transformers") == replaced
    now = functions()
    assert all(now[name] is not before[name] for name in before)
    assert all(inspect.signature(now[name]) == inspect.signature(before[name]) for name in before)
    with patched("transformers"):
        pass
    assert all(functions()[name] is now[name] for name in before)
    unpatch()
    unpatch("transformers")
    assert all(functions()[name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (
            lambda hidden_states, dt, B: None,
            "<lambda> takes (hidden_states, dt, B), this package's (hidden_states, dt, A",
        ),
        (None, "transformers.models.jamba.modeling_jamba has no mamba_selective_scan; nothing was replaced"),
    ],
)
def test_another_signature_is_refused_and_nothing_changes(monkeypatch, theirs, sentence):
    monkeypatch.setattr(MODULES[2], "mamba_selective_scan", theirs)
    before = functions()
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        patch("transformers")
    assert all(functions()[name] is before[name] for name in before)
    monkeypatch.undo()
    with patched("transformers") as replaced:
        assert len(replaced) == len(before)


def test_threads_that_patch_and_unpatch_leave_nothing():
    before = functions()
    barrier, errors = threading.Barrier(2), []

    def repeat():
        try:
            barrier.wait()
            for _ in range(5):
                patch("transformers")
                unpatch("transformers")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(functions()[name] is before[name] for name in before)


@pytest.fixture
def kernels():
    return pytest.importorskip("kernels")


@pytest.mark.parametrize("path", [hub.PATH, hub.PATH.parent])
def test_layers_have_the_signatures_of_transformers_functions(kernels, path):
    theirs = dict(zip(sorted(hub.LAYERS), sorted(ours.__all__), strict=True))
    for layer_name, name in theirs.items():
        layer = kernels.LocalLayerRepository(path, layer_name=layer_name).load()
        assert layer.__init__ is torch.nn.Module.__init__
        assert layer.has_backward
        assert layer.can_torch_compile
        parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
        for module in MODULES:
            expected = inspect.signature(getattr(module, name)).parameters.values()
            assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in expected]


def test_kernel_mapping(kernels, monkeypatch):
    assert {name: list(devices) for name, devices in hub.kernel_mapping().items()} == {n: ["cpu"] for n in hub.LAYERS}
    assert hub.kernel_mapping("cuda")["selective_scan_fn"].keys() == {"cuda"}
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="kernel_mapping: kernels is not installed"):
        hub.kernel_mapping()


KERNELIZED = """
import inspect, socket
import torch, kernels
import transformers.utils.import_utils as utils

def refuse(*args, **kwargs):
    raise RuntimeError("the network was asked")

socket.socket.connect = refuse
inspect.unwrap(utils.is_kernels_available).__defaults__ = ("0", "99")  # whatever version transformers wants

from mobilemamba_kernels.interop import hub, patch, patched
from test_transformers import MODELS, MODULES, SCANS, Recorder, build, decode, functions, tokens, train

torch.set_num_threads(1)
ids = tokens(12)
assert all(isinstance(f, torch.nn.Module) for f in functions().values())
gelu = build("Mamba", hidden_act="gelu")
networks = [*(build(name) for name in MODELS), gelu]
expected = [decode(network, ids, 9) for network in networks]
trained = train(networks[0].train(), ids)

before = functions()
with patched("transformers"), Recorder() as recorder:
    torch.testing.assert_close(decode(networks[0], ids, 9), expected[0], rtol=1e-4, atol=1e-5)
assert recorder.calls["selective_state_update"] == 6, recorder.calls
assert functions() == before

original = MODULES[0].mamba_selective_scan
MODULES[0].mamba_selective_scan = kernels.use_kernel_forward_from_hub("selective_scan_fn")(lambda u, dt, B: None)
try:
    patch("transformers")
except RuntimeError as error:
    assert "selective_scan_fn takes (u, dt, B)" in str(error), error
else:
    raise AssertionError("another signature was patched")
MODULES[0].mamba_selective_scan = original
assert functions() == before

for mode in (kernels.Mode.INFERENCE, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
    for network, logits in zip(networks, expected):
        with kernels.use_kernel_mapping(hub.kernel_mapping(), inherit_mapping=False):
            kernels.kernelize(network, mode=mode, device="cpu")
        with Recorder() as recorder:
            found = decode(network.eval(), ids, 9)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
        scans = SCANS[type(network).__name__.removesuffix("ForCausalLM")]
        calls = {"selective_scan_fwd": scans, "selective_state_update": 3 * scans}
        if network is not gelu:
            mambas = recorder.calls["causal_conv1d_fwd"]
            assert mambas > 1
            calls |= {"causal_conv1d_fwd": mambas, "causal_conv1d_update": 3 * mambas}
        assert recorder.calls == calls, recorder.calls
again = train(networks[0].train(), ids)
for key in trained:
    torch.testing.assert_close(again[key], trained[key], rtol=1e-3, atol=1e-5)
"""


def test_kernelized_models(kernels):
    done = subprocess.run(
        [sys.executable, "-c", KERNELIZED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
