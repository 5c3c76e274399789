"""The drop-ins against what the published code computed (data/interop.py), and how they are put in place."""

import contextlib
import importlib
import inspect
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from data import interop as published
from torch import Tensor

from mobilemamba_kernels import patch, patched, unpatch, use_backend
from mobilemamba_kernels.interop import causal_conv1d, mamba_ssm, vim, vmamba, wtconv
from mobilemamba_kernels.testing import wtconv_with_convolutions

FUNCTIONS: dict[str, Callable] = {
    **{f"mamba_ssm.{name}": getattr(mamba_ssm, name) for name in mamba_ssm.__all__},
    **{f"causal_conv1d.{name}": getattr(causal_conv1d, name) for name in causal_conv1d.__all__},
    **{f"vim.{name}": getattr(vim, name) for name in vim.__all__},
    **{f"vmamba.{name}": getattr(vmamba, name) for name in vmamba.__all__},
}
OF_FUNCTIONS = [name for name, case in published.CASES.items() if f"{case.project}.{case.function}" in FUNCTIONS]


def call(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results by the names under which they are stored, what was changed in place among them."""
    case = published.CASES[name]
    found = FUNCTIONS[f"{case.project}.{case.function}"](**tensors, **case.options)
    if isinstance(found, tuple):
        second = "final_states" if case.options.get("return_final_states") else "last_state"
        results = {"out": found[0], second: found[1]}
    else:
        results = {"out": found}
    changed = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}.get(case.function)
    return results | ({changed: tensors[changed]} if changed else {})


def check(name: str, results: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Compare results, and the gradients of the stored ones' start, with what is stored."""
    case, stored = published.CASES[name], published.outputs(name)
    expected = {key: value for key, value in stored.items() if not key.startswith("grad_")}
    assert results.keys() == expected.keys()
    if case.gradients:
        ends = [results[key] for key in ("out", "final_states") if key in results]
        inputs = [tensors[key] for key in case.gradients]
        found = torch.autograd.grad(ends, inputs, published.output_gradients(name, *ends))
        results = results | dict(zip((f"grad_{key}" for key in case.gradients), found, strict=True))
    assert results.keys() == stored.keys()
    for key, value in stored.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            results[key], value, rtol=0, atol=3e-5 * scale + 1e-6, msg=lambda text, key=key: f"{name} {key}: {text}"
        )


def inputs(name: str) -> dict[str, Tensor]:
    tensors = published.inputs(name)
    for key in published.CASES[name].gradients:
        tensors[key].requires_grad_()
    return tensors


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_function_computes_what_was_published(name, backend):
    tensors = inputs(name)
    if backend is None:
        results = call(name, tensors)
    else:
        with use_backend(backend):
            results = call(name, tensors)
    check(name, results, tensors)


@pytest.mark.parametrize("name", [n for n, c in published.CASES.items() if c.function == "WTConv2d"])
def test_wtconv_loads_and_computes_what_was_published(name):
    tensors = published.inputs(name)
    x = tensors.pop("x").requires_grad_()
    module = wtconv.WTConv2d(**published.CASES[name].options)
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    module.load_state_dict(tensors)
    check(name, {"out": module(x)}, {"x": x} | dict(module.named_parameters()))


def vim_mamba(hidden_states: Tensor, t: dict[str, Tensor], divide: bool) -> Tensor:
    """Vim's block, by the names that it imports."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    xz = F.linear(hidden_states, t["in_proj.weight"], t.get("in_proj.bias")).mT

    def way(xz: Tensor, b: str) -> Tensor:
        return interface.mamba_inner_fn_no_out_proj(
            xz, t[f"conv1d{b}.weight"], t[f"conv1d{b}.bias"], t[f"x_proj{b}.weight"], t[f"dt_proj{b}.weight"],
            -torch.exp(t[f"A{b}_log"]), None, None, t[f"D{b}"], delta_bias=t[f"dt_proj{b}.bias"], delta_softplus=True,
        )  # fmt: skip

    y = (way(xz, "") + way(xz.flip(-1), "_b").flip(-1)).mT
    return F.linear(y / 2 if divide else y, t["out_proj.weight"], t.get("out_proj.bias"))


@pytest.mark.parametrize("name", [n for n in published.CASES if n.startswith("vim.Mamba")])
def test_vims_block_computes_what_was_published(name):
    tensors = inputs(name)
    parameters = {key: value for key, value in tensors.items() if key != "hidden_states"}
    with patched("vim"):
        out = vim_mamba(tensors["hidden_states"], parameters, published.CASES[name].options["if_divide_out"])
    check(name, {"out": out}, tensors)


def scan_paths(xs: Tensor, t: dict[str, Tensor], paths: slice = slice(None)) -> Tensor:
    """Project sequences (batch, K, dim, L) and scan them, with the parameters of some of VMamba's four paths."""
    rank = t["dt_projs_weight"].shape[2]
    N, dim = t["A_logs"].shape[1], xs.shape[2]
    projected = torch.einsum("bkdl,kcd->bkcl", xs, t["x_proj_weight"][paths])
    dts, Bs, Cs = projected.split([rank, N, N], dim=2)
    dts = torch.einsum("bkrl,kdr->bkdl", dts, t["dt_projs_weight"][paths])
    A, D = -torch.exp(t["A_logs"]).view(4, dim, N)[paths].flatten(0, 1), t["Ds"].view(4, dim)[paths].flatten()
    bias = t["dt_projs_bias"][paths].flatten()
    ys = vmamba.selective_scan_fn(xs.flatten(1, 2), dts.flatten(1, 2), A, Bs.contiguous(), Cs.contiguous(), D, bias)
    return ys.view(xs.shape)


def ss2d_core(x: Tensor, t: dict[str, Tensor], mode: str) -> Tensor:
    """SS2D's forward_corev2 of x, (batch, dim, H, W): the normalized result, channels last."""
    batch, dim, height, width = x.shape
    if mode == "cascade2d":
        for paths, side in ((slice(2), "rows"), (slice(2, 4), "columns")):
            x = F.layer_norm(x.permute(0, 2, 3, 1), (dim,)).permute(0, 3, 1, 2)
            lines = (x.permute(0, 2, 1, 3) if side == "rows" else x.permute(0, 3, 1, 2)).flatten(0, 1)
            ys = scan_paths(torch.stack([lines, lines.flip(-1)], 1), t, paths).sum(1).unflatten(0, (batch, -1))
            x = ys.permute(0, 2, 1, 3) if side == "rows" else ys.permute(0, 2, 3, 1)
        y = x
    else:
        scans = {"cross2d": 0, "unidi": 1, "bidi": 2}[mode]
        ys = scan_paths(vmamba.cross_scan_fn(x, scans=scans), t).view(batch, 4, dim, height, width)
        y = vmamba.cross_merge_fn(ys, scans=scans).view(x.shape)
    return F.layer_norm(y.permute(0, 2, 3, 1), (dim,), t["out_norm.weight"], t["out_norm.bias"])


@pytest.mark.parametrize("name", [n for n in published.CASES if n.startswith("vmamba.forward_corev2")])
def test_vmambas_core_computes_what_was_published(name):
    tensors, options = inputs(name), published.CASES[name].options
    out = ss2d_core(tensors["x"], tensors, options["scan_mode"])
    check(name, {"out": out.permute(0, 3, 1, 2) if options.get("channel_first") else out}, tensors)


@pytest.mark.parametrize("name", [n for n in published.CASES if n.startswith("vmamba.SS2D")])
def test_vmambas_block_computes_what_was_published(name):
    t = inputs(name)
    gated = t["in_proj.weight"].shape[0] == 16
    x, *z = F.linear(t["x"], t["in_proj.weight"]).split(8, dim=-1)
    x = F.silu(F.conv2d(x.permute(0, 3, 1, 2), t["conv2d.weight"], t["conv2d.bias"], padding=1, groups=8))
    y = ss2d_core(x, t, "cross2d")
    check(name, {"out": F.linear(y * F.silu(z[0]) if gated else y, t["out_proj.weight"])}, t)


# --- putting them in place ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    before = set(sys.modules)
    yield
    unpatch()
    assert not {name for name in set(sys.modules) - before if (sys.modules[name].__doc__ or "").startswith("Made by")}


def imported(monkeypatch, name: str, source: str) -> ModuleType:
    """A module as if it had been imported from a file."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


SCAN = """
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    return "theirs"
def mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
                   A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True):
    return "theirs"
"""
STEP = """
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return "theirs"
"""


VIM = """
def mamba_inner_fn_no_out_proj(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A): pass
def bimamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
                     A, A_b): pass
"""


@pytest.fixture
def installed(monkeypatch) -> dict[str, ModuleType]:
    """A mamba_ssm, and a network that took a function from it by name."""
    names = {"mamba_ssm": "", "mamba_ssm.ops": "", "mamba_ssm.ops.triton": ""}
    names |= {"mamba_ssm.ops.selective_scan_interface": SCAN, "mamba_ssm.ops.triton.selective_state_update": STEP}
    modules = {name: imported(monkeypatch, name, source) for name, source in names.items()}
    source = "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan"
    return modules | {"network": imported(monkeypatch, "network", source)}


ARGUMENTS = (torch.ones(1, 2, 3), torch.ones(1, 2, 3), -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3))


def test_who_took_a_function_by_name_gets_the_replacement(installed):
    network, interface = installed["network"], installed["mamba_ssm.ops.selective_scan_interface"]
    theirs = interface.selective_scan_fn
    replaced = patch("mamba_ssm")
    assert replaced["network.scan"] is theirs
    assert replaced["mamba_ssm.ops.selective_scan_interface.selective_scan_fn"] is theirs
    assert replaced["sys.modules['causal_conv1d']"] is None
    torch.testing.assert_close(network.scan(*ARGUMENTS), mamba_ssm.selective_scan_fn(*ARGUMENTS))
    assert inspect.signature(network.scan) == inspect.signature(theirs)
    unpatch("mamba_ssm")
    assert network.scan is interface.selective_scan_fn is theirs
    assert "causal_conv1d" not in sys.modules


def test_patching_twice_is_patching_once(installed):
    theirs = installed["network"].scan
    assert patch("mamba_ssm") == patch("mamba_ssm")
    unpatch()
    unpatch()
    assert installed["network"].scan is theirs


def test_patched_keeps_what_was_patched_before(installed):
    network = installed["network"]
    theirs = network.scan
    with patched("mamba_ssm"):
        with patched("mamba_ssm"):
            pass
        assert network.scan is not theirs
    assert network.scan is theirs


def test_layers_and_classes_that_keep_a_function_are_patched_too(installed):
    theirs = installed["network"].scan

    class Block(torch.nn.Module):
        of_class = staticmethod(theirs)

        def __init__(self):
            super().__init__()
            self.scan = installed["network"].scan

    before = Block()
    with patched("mamba_ssm"):
        within = Block()
        for block in (before, within):
            torch.testing.assert_close(block.scan(*ARGUMENTS), mamba_ssm.selective_scan_fn(*ARGUMENTS))
            torch.testing.assert_close(block.of_class(*ARGUMENTS), mamba_ssm.selective_scan_fn(*ARGUMENTS))
    assert before.scan is within.scan is before.of_class is theirs


def test_who_keeps_a_replacement_calls_the_original_again(installed):
    with patched("mamba_ssm"):
        kept = partial(installed["network"].scan, *ARGUMENTS)
        assert kept() != "theirs"
    assert kept() == "theirs"
    with patched("mamba_ssm"):
        assert kept() != "theirs"


@pytest.mark.parametrize("first_out", [0, 1])
def test_a_function_stays_replaced_while_a_target_wants_it(installed, first_out):
    interface = installed["mamba_ssm.ops.selective_scan_interface"]
    exec(VIM, vars(interface))
    theirs, targets = interface.selective_scan_fn, ["mamba_ssm", "vim"]
    replaced = [patch(target) for target in targets]
    assert all(names["network.scan"] is theirs for names in replaced)
    unpatch(targets[first_out])
    assert interface.selective_scan_fn(*ARGUMENTS) != "theirs"
    unpatch(targets[1 - first_out])
    assert interface.selective_scan_fn is theirs


def test_a_module_that_was_loaded_again_gets_its_new_functions_back(installed):
    interface = installed["mamba_ssm.ops.selective_scan_interface"]
    patch("mamba_ssm")
    exec(SCAN, vars(interface))
    again = interface.selective_scan_fn
    patch("mamba_ssm")
    assert interface.selective_scan_fn is not again
    unpatch()
    assert interface.selective_scan_fn is again


def test_a_module_imported_meanwhile_gets_the_original_back(installed, monkeypatch):
    theirs = installed["network"].scan
    with patched("mamba_ssm"):
        later = imported(monkeypatch, "later", "from network import scan")
        assert later.scan is installed["network"].scan is not theirs
    assert later.scan is theirs


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def selective_state_update(state, x, dt, A, C, B): pass", "takes (state, x, dt, A, C, B), this package's"),
        ("selective_state_update = None", "has no selective_state_update"),
    ],
)
def test_another_signature_is_refused_and_nothing_changes(installed, monkeypatch, source, sentence):
    step = imported(monkeypatch, "mamba_ssm.ops.triton.selective_state_update", source)
    before = step.selective_state_update, installed["network"].scan, set(sys.modules)
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        patch("mamba_ssm")
    assert (step.selective_state_update, installed["network"].scan, set(sys.modules)) == before


@pytest.mark.parametrize("call", [patch, unpatch])
def test_an_unknown_target_is_refused(call):
    with pytest.raises(ValueError, match="one of transformers, mamba_ssm, vmamba, vim, wtconv; got 'mamba'"):
        call("mamba")


@pytest.mark.parametrize(("target", "name"), [("mamba_ssm", "selective_scan_fn"), ("vim", "bimamba_inner_fn")])
def test_a_package_that_is_not_installed_is_made(target, name):
    interface = "mamba_ssm.ops.selective_scan_interface"
    with patched(target):
        module = importlib.import_module(interface)
        assert callable(getattr(module, name))
        assert importlib.util.find_spec("mamba_ssm") is not None
        assert importlib.import_module("selective_scan_cuda") is vmamba.selective_scan_cuda
    assert importlib.util.find_spec("mamba_ssm") is None
    with pytest.raises(ImportError):
        importlib.import_module(interface)


def test_what_a_package_lacks_is_made(installed, tmp_path, monkeypatch):
    """Vim's copy of mamba-ssm has a step that imports what is not there; a causal-conv1d may lack its extension."""
    name = "mamba_ssm.ops.triton.selective_state_update"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["mamba_ssm.ops.triton"], "__path__", [str(tmp_path)])
    (tmp_path / "selective_state_update.py").write_text("import not_there")
    (tmp_path / "causal_conv1d.py").write_text("import causal_conv1d_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    with patched("mamba_ssm"):
        assert importlib.import_module(name).selective_state_update is mamba_ssm.selective_state_update
        assert importlib.import_module("causal_conv1d").causal_conv1d_fn is causal_conv1d.causal_conv1d_fn
    assert not {name, "causal_conv1d"} & set(sys.modules)


def test_a_package_that_cannot_be_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with pytest.raises(ImportError, match=r"is installed but cannot be imported \(No module named 'not_there'"):
        patch("mamba_ssm")
    assert set(sys.modules) == before


def test_networks_find_the_plain_versions_too():
    with patched("mamba_ssm"):
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        conv = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    torch.testing.assert_close(interface.selective_scan_ref(*ARGUMENTS), mamba_ssm.selective_scan_fn(*ARGUMENTS))
    x, weight, state = torch.randn(1, 2, 6), torch.randn(2, 3), torch.randn(1, 2, 2)
    y, _ = conv.causal_conv1d_ref(x, weight, None, state, True)
    torch.testing.assert_close(y, F.conv1d(torch.cat([state, x], 2), weight.unsqueeze(1), groups=2))
    step = conv.causal_conv1d_update_ref(x[..., 0], torch.cat([torch.zeros(1, 2, 1), state], 2), weight)
    torch.testing.assert_close(step, y[..., 0])


def test_targets_share_what_is_made():
    for first, second in (("mamba_ssm", "vmamba"), ("vim", "mamba_ssm")):
        patch(first)
        patch(second)
        assert importlib.import_module("mamba_ssm.ops.selective_scan_interface").mamba_inner_fn_no_out_proj
        unpatch(first)
        assert importlib.import_module("selective_scan_cuda") is vmamba.selective_scan_cuda
        unpatch(second)
        assert importlib.util.find_spec("selective_scan_cuda") is None


def test_threads_that_patch_and_unpatch_leave_nothing(installed):
    theirs = installed["network"].scan

    def repeat():
        for _ in range(20):
            with patched("mamba_ssm"):
                pass

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unpatch()
    assert installed["network"].scan is theirs


CROSS = """
def cross_scan_fn(x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False): pass
def cross_merge_fn(y, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False): pass
"""


def test_vmamba_functions_and_extensions(monkeypatch):
    csm = imported(monkeypatch, "csm_triton", CROSS)
    network = imported(monkeypatch, "vmamba_network", "from csm_triton import cross_scan_fn")
    other = imported(monkeypatch, "other", SCAN).selective_scan_fn  # mamba-ssm's, of the same name
    x = torch.randn(1, 3, 4, 5)
    with patched("vmamba"):
        torch.testing.assert_close(network.cross_scan_fn(x), vmamba.cross_scan_fn(x))
        assert csm.cross_scan_fn is network.cross_scan_fn
        assert sys.modules["other"].selective_scan_fn is other
        assert importlib.import_module("selective_scan_cuda_oflex").fwd
        assert network.cross_scan_fn(x, scans=3) is None
        assert network.cross_scan_fn(x, True, True, False, 3) is None
    assert network.cross_scan_fn(x) is None
    assert "selective_scan_cuda_oflex" not in sys.modules


def scan_arguments(dtype: torch.dtype = torch.float32, gate: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(0)
    u, delta, z = torch.randn(3, 2, 8, 11, generator=generator).to(dtype)
    B, C = torch.randn(2, 2, 4, 3, 11, generator=generator).to(dtype)
    A, D, bias = -torch.rand(8, 3, generator=generator), torch.randn(8), torch.randn(8)
    return (u, delta, A, B, C, D, z, bias) if gate else (u, delta, A, B, C, D, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["oflex", "core"])
def test_extensions_of_vmamba(kind, dtype):
    extension = getattr(vmamba, f"selective_scan_cuda_{kind}")
    arguments = scan_arguments(dtype)
    wide = kind == "oflex"
    out, x = extension.fwd(*arguments, True, 1, *([True] if wide else []))
    inputs = [t.clone().requires_grad_() for t in arguments]
    expected = vmamba.selective_scan_fn(*inputs, True, oflex=wide)
    assert out.dtype == expected.dtype == (torch.float32 if wide else dtype)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    found = extension.bwd(*arguments, dout, x, True, 1)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_extension_of_mamba_ssm(gate, recompute):
    arguments = scan_arguments(gate=True)
    arguments = arguments if gate else (*arguments[:6], None, arguments[7])
    out, x, *gated = vmamba.selective_scan_cuda.fwd(*arguments, True)
    inputs = [t if t is None else t.clone().requires_grad_() for t in arguments]
    expected, last = mamba_ssm.selective_scan_fn(*inputs, True, True)
    torch.testing.assert_close(gated[0] if gate else out, expected)
    torch.testing.assert_close(x[:, :, -1, 1::2], last)
    dout = torch.randn_like(out)
    place = torch.empty_like(arguments[6]) if gate else None
    found = vmamba.selective_scan_cuda.bwd(*arguments, dout, x, out, place, True, recompute)
    given = [t for t in (*inputs[:6], inputs[7], inputs[6]) if t is not None]
    for ours, theirs in zip(found, torch.autograd.grad(expected, given, dout), strict=False):
        torch.testing.assert_close(ours, theirs)
    assert len(found) == len(given) + (gate and recompute)
    if gate:
        assert found[7] is place
    if gate and recompute:
        torch.testing.assert_close(found[-1], gated[0])


def test_fewer_channels_of_steps_serve_several():
    u, delta, A, B, C, D, bias = scan_arguments()
    few, few_bias = delta[:, :4], bias[:4]
    expected = vmamba.selective_scan_fn(u, few.repeat_interleave(2, 1), A, B, C, D, few_bias.repeat_interleave(2))
    torch.testing.assert_close(vmamba.selective_scan_fn(u, few, A, B, C, D, few_bias), expected)
    torch.testing.assert_close(
        vmamba.selective_scan_cuda_oflex.fwd(u, few, A, B, C, D, few_bias, True, 1, True)[0], expected
    )


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("channel_first", [True, False])
def test_sequences_are_added_in_float32(backend, channel_first):
    y = torch.tensor([6e4, -6e4, 6e4, 1], dtype=torch.float16).view(1, 4, 1, 1, 1).repeat(1, 1, 2, 3, 4)
    y = y if channel_first else y.permute(0, 3, 4, 1, 2)
    with use_backend(backend) if backend else contextlib.nullcontext():
        merged = vmamba.cross_merge_fn(y, out_channel_first=channel_first)
    assert merged.is_contiguous()
    assert torch.equal(merged, torch.full((1, 2, 12), 6e4, dtype=torch.float16))


def test_wtconv_layers_that_exist(monkeypatch):
    class Original(wtconv.WTConv2d):
        def forward(self, x):
            return "theirs"

    class Inherited(Original):
        pass

    module = imported(monkeypatch, "wtconv", "")
    module.WTConv2d = Original
    imported(monkeypatch, "another_wtconv", "").WTConv2d = Inherited
    layer = Original(3, 3)
    x = torch.randn(1, 3, 9, 8)
    with patched("wtconv"):
        torch.testing.assert_close(layer(x), wtconv.WTConv2d.forward(layer, x))
        layer.wt_filter.data = torch.zeros(12, 1, 4, 4)  # of a longer wavelet
        assert layer(x) == "theirs"
    assert layer(x) == "theirs"


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.wt_filter.requires_grad_(),
        lambda layer: layer.load_state_dict({"iwt_filter": torch.ones(12, 1, 2, 2)}, strict=False),
        lambda layer: setattr(layer.base_conv, "padding_mode", "circular"),
        lambda layer: layer.base_conv.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer, "base_conv", torch.nn.Sequential(layer.base_conv)),
        lambda layer: delattr(layer, "wavelet_scale"),  # another class of the same name
    ],
)
def test_wtconv_layers_that_compute_something_else_stay_theirs(monkeypatch, change):
    class Original(wtconv.WTConv2d):
        forward = lambda self, x: "theirs"  # noqa: E731
        _load_from_state_dict = torch.nn.Module._load_from_state_dict

    imported(monkeypatch, "wtconv", "").WTConv2d = Original
    layer, x = Original(3, 3), torch.randn(1, 3, 9, 8)
    with patched("wtconv"):
        assert layer(x) != "theirs"
        change(layer)
        assert layer(x) == "theirs"


def test_wtconv_has_the_originals_type_under_autocast():
    layer, x = wtconv.WTConv2d(3, 3), torch.randn(1, 3, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (33, 37)])
def test_wtconv_is_the_cascade_of_convolutions(levels, size):
    torch.manual_seed(0)
    layer = wtconv.WTConv2d(3, 3, kernel_size=3, wt_levels=levels).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), wtconv_with_convolutions(layer, x))
    torch.testing.assert_close(layer.float()(x.float()).double(), layer.double()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"out_channels": 4}, "must agree; got 3 and 4"),
        ({"kernel_size": 4}, "kernel_size must be odd; got 4"),
        ({"wt_levels": 0}, "wt_levels and stride must be at least 1"),
        ({"in_channels": 0, "out_channels": 0}, "in_channels must be at least 1; got 0"),
        ({"wt_type": "db2"}, "wt_type must be db1 or haar"),
    ],
)
def test_wtconv_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        wtconv.WTConv2d(**{"in_channels": 3, "out_channels": 3} | options)


def test_wtconv_refuses_the_filters_of_another_wavelet():
    state = wtconv.WTConv2d(3, 3).state_dict()
    state["wt_filter"] = state["wt_filter"] + 0.1
    with pytest.raises(ValueError, match="wt_filter is not the Haar wavelet's"):
        wtconv.WTConv2d(3, 3).load_state_dict(state)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vmamba.cross_scan_fn(torch.ones(2, 3, 4)), r"cross_scan_fn: x must have shape \(batch, C, H, W\)"),
        (lambda: vmamba.cross_scan_fn(torch.ones(2, 3, 4, 5), scans=3), "scans must be 0 .* got 3"),
        (lambda: vmamba.cross_scan_fn(torch.ones(2, 3, 4, 5, 6), one_by_one=True), "x must hold 4 images.* got 3"),
        (lambda: vmamba.cross_scan_fn(torch.ones(2, 3, 4, 5), scans=torch.ones(2)), "scans must be 0"),
        (lambda: vmamba.cross_merge_fn(torch.ones(2, 3, 4, 5, 6)), "y must hold 4 sequences; got 3"),
        (lambda: vmamba.selective_scan_fn(*scan_arguments(), backend="triton"), "backend must be None, oflex"),
        (
            lambda: vmamba.selective_scan_fn(torch.ones(1, 7, 3), torch.ones(1, 2, 3), *scan_arguments()[2:]),
            "u's channels must be a multiple of delta's; got 7 and 2",
        ),
        (
            lambda: mamba_ssm.mamba_inner_fn(torch.ones(1, 7, 3), torch.ones(4, 1, 4), None, torch.ones(9, 4),
                                             torch.ones(4, 1), torch.ones(4, 4), None, torch.ones(4, 4)),
            r"mamba_inner_fn: xz must have shape \(batch, 2 dim, L\) = \(1, 8, 3\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


INNER = {
    "xz": torch.ones(1, 8, 3),
    "conv1d_weight": torch.ones(4, 1, 4),
    "conv1d_bias": torch.ones(4),
    "x_proj_weight": torch.ones(8, 4),
    "delta_proj_weight": torch.ones(4, 2),
    "out_proj_weight": torch.ones(5, 4),
    "out_proj_bias": torch.ones(5),
    "A": -torch.ones(4, 3),
}


@pytest.mark.parametrize("function", [mamba_ssm.mamba_inner_fn, vim.bimamba_inner_fn])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"xz": torch.ones(8, 3)}, r"xz must have shape \(batch, 2 dim, L\); got \(8, 3\)"),
        ({"conv1d_weight": torch.ones(())}, r"conv1d_weight must have shape \(dim, 1, W\); got \(\)"),
        ({"conv1d_bias": torch.ones(3)}, r"conv1d_bias must have shape \(dim\) = \(4,\); got \(3,\)"),
        ({"x_proj_weight": torch.ones(8, 4).bfloat16()}, "x_proj_weight must have the dtype of xz, torch.float32"),
        ({"out_proj_weight": torch.ones(5, 3)}, r"out_proj_weight must have shape \(out, dim\) = \(5, 4\)"),
        ({"out_proj_weight": None}, "out_proj_weight must be a tensor; got NoneType"),
        ({"B_proj_bias": torch.ones(2)}, r"B_proj_bias must have shape \(N\) = \(3,\); got \(2,\)"),
        ({"D": torch.ones(4, 1)}, r"D must have shape \(.*\) = \(4,\); got \(4, 1\)"),
    ],
)
def test_blocks_refuse_bad_input(function, change, sentence):
    more = {"A_b": INNER["A"]} if function is vim.bimamba_inner_fn else {}
    assert function(**INNER, **more).shape == (1, 3, 5)
    with pytest.raises((TypeError, ValueError), match=sentence):
        function(**INNER | more | change)
    if more:
        with pytest.raises(TypeError, match="A_b must be a tensor; got NoneType"):
            function(**INNER, A_b=None)
