"""The operators that change a state in place: causal_conv1d_update and selective_state_update."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_ops import all_dtypes
from torch import Tensor

import mobilemamba_kernels
from mobilemamba_kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    selective_scan_fn,
    selective_state_update,
    use_backend,
)
from mobilemamba_kernels.backends import forced_backend
from mobilemamba_kernels.testing import LAYOUTS, Argument, assert_close, map_tensors


@dataclass(frozen=True)
class Step:
    """A call: the operator, the argument that it changes, the others."""

    op: str
    changed: str
    name: str
    arguments: dict[str, Argument]
    indices: dict[str, list[int]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"

    def make(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "channels_first",
        wide: bool = False,
        device: str = "cpu",
    ) -> dict:
        generator = torch.Generator().manual_seed(0)
        made: dict = {name: a.make(dtype, layout, device, generator) for name, a in self.arguments.items()}
        kind = torch.int64 if wide else torch.int32
        made |= {name: torch.tensor(index, dtype=kind, device=device) for name, index in self.indices.items()}
        return made | self.options

    def run(self, arguments: dict) -> tuple[Tensor, Tensor]:
        """The result, and what was changed."""
        return getattr(mobilemamba_kernels, self.op)(**arguments), arguments[self.changed]


def conv(batch, dim, steps, width, kept, *, has="", rows=None, seqlens=None) -> Step:
    """``steps`` 0: x without a dimension of them; ``has``: b(ias), s(ilu)."""
    arguments = {
        "x": Argument((batch, dim, steps) if steps else (batch, dim), positions=1),
        "conv_state": Argument((batch if rows is None else max([*rows, 0]) + 2, dim, kept), positions=1),
        "weight": Argument((dim, width)),
    }
    arguments |= {"bias": Argument((dim,))} if "b" in has else {}
    indices = {} if rows is None else {"conv_state_indices": rows}
    indices |= {} if seqlens is None else {"cache_seqlens": seqlens}
    name = f"{batch}x{dim}x{steps}-w{width}-S{kept}-{has}{'-rows' if rows else ''}{'-circular' if seqlens else ''}"
    options = {"activation": "silu"} if "s" in has else {}
    return Step("causal_conv1d_update", "conv_state", name, arguments, indices, options)


def scan(batch, dim, N, *, heads=(), groups=(), has="", rows=None) -> Step:
    """``has``: D, z, b(ias), s(oftplus)."""
    arguments = {
        "state": Argument((batch if rows is None else max([*rows, 0]) + 2, *heads, dim, N), positions=1),
        "x": Argument((batch, *heads, dim), positions=1),
        "dt": Argument((batch, *heads, dim), mean=-1.0 if "s" in has else 0.3, spread=0.1, positions=1),
        "A": Argument((*heads, dim, N), -0.75, 0.25),
        "B": Argument((batch, *groups, N), positions=1),
        "C": Argument((batch, *groups, N), positions=1),
    }
    arguments |= {"D": Argument((*heads, dim))} if "D" in has else {}
    arguments |= {"z": Argument((batch, *heads, dim), positions=1)} if "z" in has else {}
    arguments |= {"dt_bias": Argument((*heads, dim), spread=0.05)} if "b" in has else {}
    name = "x".join(map(str, (batch, *heads, dim))) + f"-N{N}-G{'x'.join(map(str, groups))}-{has}"
    indices = {} if rows is None else {"state_batch_indices": rows}
    options = {"dt_softplus": "s" in has}
    return Step("selective_state_update", "state", name + ("-rows" if rows else ""), arguments, indices, options)


STEPS = [
    conv(1, 1, 0, 2, 1),
    conv(2, 37, 0, 4, 3, has="bs"),
    conv(2, 5, 1, 4, 4, has="s"),
    conv(2, 5, 3, 3, 7, has="b"),
    conv(2, 5, 9, 4, 5, has="bs"),
    conv(3, 5, 0, 4, 4, has="bs", rows=[4, -1, 1]),
    conv(3, 5, 2, 2, 3, has="bs", seqlens=[0, 5, 100]),
    conv(3, 5, 9, 4, 5, rows=[-1, 2, 0], seqlens=[7, 1, 4]),
    conv(0, 5, 0, 4, 4, has="bs"),
    conv(2, 0, 1, 4, 4, has="bs"),
    scan(1, 1, 1),
    scan(2, 37, 16, has="Dzbs"),
    scan(2, 5, 3, has="Db"),
    scan(1, 3, 256, has="zs"),
    scan(2, 5, 16, heads=(4,), groups=(2,), has="Dzbs"),
    scan(2, 9, 3, heads=(3,), groups=(3,), has="s"),
    scan(2, 5, 4, heads=(2,), has="Dzbs"),
    scan(3, 5, 16, has="Dzbs", rows=[3, -1, 0]),
    scan(2, 4, 8, heads=(2,), groups=(1,), has="zs", rows=[0, 5]),
    scan(0, 5, 16, has="Dzbs"),
    scan(2, 0, 16, has="Dzbs"),
]
all_steps = pytest.mark.parametrize("step", STEPS, ids=str)
TYPICAL = [STEPS[1], STEPS[14]]
typical_steps = pytest.mark.parametrize("step", TYPICAL, ids=lambda s: s.op)


def reference(step: Step, arguments: dict, exact: bool) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return step.run(map_tensors(Tensor.double if exact else Tensor.clone, arguments))


@all_steps
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_result_and_state(step, dtype, layout, wide, instruction_set):
    if wide and not step.indices:
        pytest.skip("has no indices")
    check_step(step, dtype, layout, wide)


def check_step(step: Step, dtype: torch.dtype, layout: str, wide: bool = False, device: str = "cpu") -> None:
    arguments = step.make(dtype, layout, wide, device)
    exact, plain = reference(step, arguments, True), reference(step, arguments, False)
    before = map_tensors(Tensor.clone, arguments)
    actual = step.run(arguments)
    assert actual[0].dtype == dtype
    assert_close(actual[0], exact[0], plain[0])
    assert_close(actual[1], exact[1], plain[1], "state")
    for name in arguments.keys() - {step.changed}:
        assert arguments[name] is before[name] or torch.equal(arguments[name], before[name])


@all_steps
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_state_is_written(step, layout):
    arguments = step.make(layout=layout)
    state = arguments[step.changed]
    room = torch.empty(0).set_(state.untyped_storage())
    inside = torch.zeros_like(room, dtype=torch.bool).as_strided(state.shape, state.stride(), state.storage_offset())
    inside.fill_(True)
    outside = ~torch.empty(0, dtype=torch.bool).set_(inside.untyped_storage())
    room[outside] = 7
    step.run(arguments)
    assert (room[outside] == 7).all()


@pytest.mark.skipif(forced_backend() not in (None, "reference"), reason="a step's kernels have no gradient")
@typical_steps
def test_gradients(step):
    """Where they are wanted the reference runs, through the change of the state too."""
    arguments = step.make(torch.float64)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = arguments | dict(zip(names, values, strict=True))
        given[step.changed] = given[step.changed].clone()
        return step.run(given)

    inputs = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    with torch.no_grad():
        expected = run(*inputs)
    torch.testing.assert_close(run(*inputs), expected)


@typical_steps
def test_opcheck(step):
    arguments = step.make()
    namespace = torch.ops.mobilemamba_triton if forced_backend() == "triton" else torch.ops.mobilemamba
    operator = getattr(namespace, step.op).default
    arguments["silu"] = arguments.get("activation") is not None
    torch.library.opcheck(operator, tuple(arguments.get(a.name) for a in operator._schema.arguments))


@typical_steps
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(step, backend):
    torch.compiler.reset()
    function = getattr(mobilemamba_kernels, step.op)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, arguments = step.make(), step.make()
    result, state = step.run(expected)
    torch.testing.assert_close(compiled(**arguments), result)
    torch.testing.assert_close(arguments[step.changed], state)


@typical_steps
def test_same_bits_at_any_number_of_threads(step, restore_threads):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(step.run(step.make()))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("circular", [False, True])
def test_steps_of_the_convolution_are_the_convolution(width, circular):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 19, 11), (19, width), (19,)))
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    state = torch.zeros(2, 19, 5)
    found = []
    for i, step in enumerate(x.unbind(-1)):
        seqlens = torch.full((2,), i, dtype=torch.int32) if circular else None
        found.append(causal_conv1d_update(step, state, weight, bias, "silu", seqlens))
    torch.testing.assert_close(torch.stack(found, -1), expected)


def test_steps_of_the_scan_are_the_scan():
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(2, 19, 11, generator=generator) for _ in range(3))
    A = -torch.rand(19, 16, generator=generator)
    B, C = (torch.randn(2, 16, 11, generator=generator) for _ in range(2))
    D, bias = torch.randn(2, 19, generator=generator)
    expected, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, return_last_state=True)
    state = torch.zeros(2, 19, 16)
    found = [
        selective_state_update(state, *step, D, z_step, bias, True)
        for *step, z_step in ((u[..., i], delta[..., i], A, B[..., i], C[..., i], z[..., i]) for i in range(11))
    ]
    torch.testing.assert_close(torch.stack(found, -1), expected)
    torch.testing.assert_close(state, last)


def test_final_states_begin_the_steps():
    x, weight = torch.randn(2, 5, 9), torch.randn(5, 4)
    _, state = causal_conv1d_fn(x[..., :6], weight, return_final_states=True)
    found = causal_conv1d_update(x[..., 6:], state, weight)
    torch.testing.assert_close(found, causal_conv1d_fn(x, weight)[..., 6:])


def test_mamba_2_shares_the_decay():
    """A, dt and dt_bias expanded over the channels of a head, as Mamba-2 calls it."""
    generator = torch.Generator().manual_seed(0)
    A = -torch.rand(4, generator=generator).view(4, 1, 1).expand(4, 6, 16)
    dt, bias = torch.randn(2, 4, 1, generator=generator).expand(2, 4, 6), torch.randn(4, 1).expand(4, 6)
    x, B = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 2, 16, generator=generator)
    state = torch.randn(2, 4, 6, 16, generator=generator)
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": B.flip(0), "dt_bias": bias, "dt_softplus": True}
    dense = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    other = state.clone()
    torch.testing.assert_close(selective_state_update(state, **arguments), selective_state_update(other, **dense))
    torch.testing.assert_close(state, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_channel(value):
    for step in (*TYPICAL, scan(2, 9, 1, has="Db"), scan(1, 5, 3), scan(1, 5, 17, has="z")):
        arguments = step.make()
        arguments["x"][0, ..., 0] = value
        exact, plain = reference(step, arguments, True), reference(step, arguments, False)
        for a, e, p in zip(step.run(arguments), exact, plain, strict=True):
            assert_close(a, e, p)


def test_an_absent_D_is_not_zero():
    arguments = STEPS[11].make()
    del arguments["D"]
    arguments["x"][0, 0] = math.inf
    arguments["B"].fill_(0)
    exact, plain = reference(STEPS[11], arguments, True), reference(STEPS[11], arguments, False)
    assert_close(STEPS[11].run(arguments)[0], exact[0], plain[0])


CONV, SCAN, HEADS = STEPS[1], STEPS[11], STEPS[14]


@pytest.mark.parametrize(
    ("step", "changes", "error", "sentence"),
    [
        (CONV, {"weight": torch.ones(37, 5)}, ValueError, "width W must be 2, 3 or 4; got 5"),
        (CONV, {"weight": torch.ones(36, 4)}, ValueError, r"weight must have shape \(dim, W\) = \(37, 4\)"),
        (CONV, {"conv_state": torch.ones(2, 37, 2)}, ValueError, "must keep at least W - 1 = 3 positions; got 2"),
        (CONV, {"conv_state": torch.ones(3, 37, 3)}, ValueError, r"conv_state must have shape .* = \(2, 37, 3\)"),
        (CONV, {"x": torch.ones(37)}, ValueError, r"x must have shape \(batch, dim\) or \(batch, dim, T\)"),
        (CONV, {"activation": "gelu"}, ValueError, 'activation must be None, "silu" or "swish"; got \'gelu\''),
        (CONV, {"cache_seqlens": torch.ones(2)}, TypeError, "cache_seqlens must be int32 or int64; got torch.float32"),
        (CONV, {"cache_seqlens": torch.ones(3).int()}, ValueError, r"cache_seqlens must have shape \(batch\) = \(2,\)"),
        (CONV, {"conv_state_indices": torch.tensor([0, 2])}, ValueError, "must be below 2, the number of rows; got 2"),
        (CONV, {"conv_state": torch.ones(2, 37, 3).int()}, TypeError, "conv_state must be float16"),
        (SCAN, {"x": torch.ones(2, 36)}, ValueError, r"x must have shape \(batch, dim\) = \(2, 37\)"),
        (SCAN, {"state": torch.ones(2, 37)}, ValueError, "state must have shape"),
        (SCAN, {"A": torch.ones(37, 15)}, ValueError, r"A must have shape \(dim, N\) = \(37, 16\)"),
        (SCAN, {"B": torch.ones(2, 2, 16)}, ValueError, r"B must have shape \(batch, N\) = \(2, 16\)"),
        (SCAN, {"state_batch_indices": torch.tensor([0, 9])}, ValueError, "must be below 2, the number of rows; got 9"),
        (SCAN, {"state_batch_indices": [0, 1]}, TypeError, "state_batch_indices must be a tensor; got list"),
        (SCAN, {"dt": torch.ones(2, 37, device="meta")}, ValueError, "dt is on meta but x is on cpu"),
        (HEADS, {"B": torch.ones(2, 3, 16), "C": torch.ones(2, 3, 16)}, ValueError, "4 heads, 3 groups"),
        (CONV, {"bias": torch.ones(37, 2)}, ValueError, r"bias must have shape \(dim\) = \(37,\)"),
        (CONV, {"conv_state": torch.ones(1, 37, 3).expand(2, 37, 3)}, ValueError, "conv_state is expanded"),
        (SCAN, {"state": torch.ones(37, 1).expand(2, 37, 16)}, ValueError, "state is expanded"),
        (SCAN, {"C": None}, TypeError, "C must be a tensor; got NoneType"),
        (HEADS, {"D": torch.ones(5)}, ValueError, r"D must have shape \(heads, dim\) = \(4, 5\)"),
    ],
)
def test_bad_input_gets_a_sentence_and_changes_nothing(step, changes, error, sentence):
    arguments = step.make() | changes
    state = arguments[step.changed].clone()
    with pytest.raises(error, match=sentence) as caught:
        step.run(arguments)
    assert str(caught.value).startswith(step.op)
    assert "\n" not in str(caught.value)
    assert torch.equal(arguments[step.changed], state)


@typical_steps
def test_autograd_notices_the_change(step):
    arguments = step.make()
    weight = torch.ones_like(arguments[step.changed], requires_grad=True)
    product = (arguments[step.changed] * weight).sum()
    step.run(arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.skipif(forced_backend() is not None, reason="forces one itself")
@typical_steps
def test_a_forced_kernel_refuses_to_be_differentiated(step):
    arguments = step.make()
    arguments["x"].requires_grad_()
    state = arguments[step.changed].clone()
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"the kernels of a step have no gradient.*no_grad"):
        step.run(arguments)
    assert torch.equal(arguments[step.changed], state)


def test_one_group_of_no_heads():
    arguments = SCAN.make()
    expected = SCAN.run(map_tensors(Tensor.clone, arguments))
    for found, right in zip(SCAN.run(arguments | {n: arguments[n].unsqueeze(1) for n in "BC"}), expected, strict=True):
        assert torch.equal(found, right)
