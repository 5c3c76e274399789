"""The drop-ins against what the published code computed (data/interop.py), and how they are put in place."""

from collections.abc import Callable

import pytest
import torch
from data import interop as published
from torch import Tensor

from mobilemamba_kernels import use_backend
from mobilemamba_kernels.interop import causal_conv1d, mamba_ssm, vim, vmamba, wtconv

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
