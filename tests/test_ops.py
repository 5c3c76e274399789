"""What every operator must do, on every case of the table."""

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mobilemamba_kernels
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.backends import forced_backend
from mobilemamba_kernels.ops.conv2d_act import filter_size
from mobilemamba_kernels.testing import (
    BUILDERS,
    CASES,
    LAYOUTS,
    Argument,
    Case,
    Numbers,
    assert_close,
    cases,
    mamba_ssm_tolerance,
    map_tensors,
    tensors,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = list(dict.fromkeys(case.op for case in CASES))
SMALL = cases(benchmark=False)
# One with every argument, odd sizes and more than one image, for what is about the operator and not about the shape.
TYPICAL = [
    next(c for c in cases(op) if max(len(tensors(d.make())) for d in cases(op)) == len(tensors(c.make())))
    if op != "wavelet_depthwise_conv2d"
    else next(c for c in cases(op) if c.name == "1x37x14x13-k7-sb")
    for op in OPS
]
BARE = [min((c for c in SMALL if c.op == op), key=lambda c: len(tensors(c.make()))) for op in OPS]  # no option given

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
small_cases = pytest.mark.parametrize("case", SMALL, ids=str)
one_level_cases = pytest.mark.parametrize("case", [c for c in SMALL if "levels" not in c.name], ids=str)
typical_cases = pytest.mark.parametrize("case", TYPICAL, ids=lambda c: c.op)


def differentiate(
    case: Case, arguments: dict, smooth: Tensor | float = 1, laid_out: bool = False
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Results, and the gradient of every tensor argument for a fixed random gradient (times ``smooth``) of them.

    That is contiguous or, if ``laid_out``, has its result's layout.
    """
    inputs = tensors(arguments)
    for tensor in inputs.values():
        tensor.requires_grad_()
    results = case.run(arguments)
    generator = torch.Generator().manual_seed(1)
    # Rounded as float16 does, so that each dtype gets (nearly) the same.
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).half().to(r) * smooth for r in results]
    grads = [torch.empty_like(r).copy_(g) for r, g in zip(results, grads, strict=True)] if laid_out else grads
    # The last state of an empty sequence is a constant.
    used = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
    found = torch.autograd.grad(
        [r for r, _ in used], list(inputs.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return tuple(r.detach() for r in results), dict(zip(inputs, found, strict=True))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For PyTorch's float64 convolutions, which start all threads once a group and wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference(case: Case, arguments: dict, exact: bool = False) -> tuple[Tensor, ...]:
    """Results of the plain operator, in float64 if ``exact``."""
    with use_backend("reference"), one_thread():
        return case.run(map_tensors(Tensor.double, arguments) if exact else arguments)


@functools.lru_cache(maxsize=64)
def truth(case: Case, dtype: torch.dtype, device: str = "cpu", packed_for: str = ""):
    """:func:`truth_of` a case's arguments, whatever their layout; and instruction set, but for packed weights."""
    return truth_of(case, case.make(dtype, device=device))


def truth_of(case: Case, arguments: dict, factor: Tensor | float = 1):
    """Results and gradients of the reference, in float64 and in the arguments' dtype, and ``smooth`` of them."""
    smooth = off_the_kink(case, arguments) * factor
    with use_backend("reference"), one_thread():
        plain = differentiate(case, map_tensors(Tensor.clone, arguments), smooth)
        exact = differentiate(case, map_tensors(Tensor.double, arguments), smooth)
    return exact, plain, smooth


def off_the_kink(case: Case, arguments: dict) -> Tensor | float:
    """False where the sum under a last ReLU is within float32's roundings of 0: its gradient there may be either."""
    if case.options.get("activation") != "relu" or case.op == "feed_forward":
        return 1
    without = {"activation": "none"} | dict.fromkeys({"residual", "scale", "shift"} & arguments.keys())
    (sums,) = reference(case, arguments | without, exact=True)
    return sums.abs() > 1e-5 * sums.abs().amax() if sums.numel() else 1


def check_against_truth(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    packed_for = _library.cpu_capability() if "packed" in case.name and not _library.COMPILED_ERROR else ""
    compare_with_truth(case, case.make(dtype, layout, device), truth(case, dtype, device, packed_for))


def compare_with_truth(case: Case, arguments: dict, found: tuple, laid_out: bool = False) -> None:
    (exact, exact_grads), (plain, plain_grads), smooth = found
    results, grads = differentiate(case, arguments, smooth, laid_out)
    for i, result in enumerate(results):
        assert_close(result, exact[i], plain[i], f"result {i}")
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], plain_grads[name], f"gradient of {name}")


# The last decorator changes least often, so that the truth of a case and dtype is computed once.
@all_layouts
@all_dtypes
@small_cases
def test_forward_and_gradients(case, dtype, layout, instruction_set):
    check_against_truth(case, dtype, layout)


@pytest.mark.parametrize("case", [c for c in SMALL if "haar" in c.op], ids=str)
@all_dtypes
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_gradient_with_channels_inside(case, dtype, layout):
    """As an operator writes it whose maps are channels-last; that of the result in other tests is contiguous."""
    (x,) = tensors(case.make(dtype, layout)).values()
    name = next(iter(case.arguments))
    found = []
    for backend in (None, "reference"):
        given = x.detach().double() if backend else x
        with use_backend(backend) if backend else contextlib.nullcontext():
            (result,) = case.run({name: given.requires_grad_()} | dict(case.options))
            grad = Argument(result.shape, positions=2).make(
                dtype, "channels_last", "cpu", torch.Generator().manual_seed(1)
            )
            found.append(torch.autograd.grad(result, given, grad.to(result.dtype))[0])
    assert_close(found[0], found[1], found[1].to(dtype))


@pytest.mark.parametrize("case", cases("causal_conv1d_fn"), ids=str)
@all_dtypes
def test_gradients_of_results_with_channels_last(case, dtype, instruction_set):
    """Those of the test above are contiguous."""
    compare_with_truth(case, case.make(dtype, "channels_last"), truth(case, dtype), laid_out=True)


@all_dtypes
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_directions_that_cancel(dtype, layout):
    """What a kernel keeps of one direction until the other comes has more digits than the result."""
    case = BUILDERS["bidirectional_selective_scan"](2, 8, 16, 1, has="D")
    arguments = case.make(dtype, layout)
    arguments["D"][0], arguments["D"][1] = 100, -100
    (exact,), (plain,) = reference(case, arguments, exact=True), reference(case, arguments)
    assert_close(case.run(arguments)[0], exact, plain)


# Images that are one in memory, or what both directions of a scan read.
@pytest.mark.parametrize(
    ("case", "dimension"),
    [*((c, 0) for c in TYPICAL), *((c, 1) for c in cases("bidirectional_selective_scan") if "-two" in c.name)],
    ids=str,
)
def test_expanded(case, dimension, instruction_set):
    arguments = case.make()
    for name, argument in case.arguments.items():
        if isinstance(argument, Argument) and argument.positions and 0 not in argument.shape:
            arguments[name] = arguments[name].narrow(dimension, 0, 1).expand(argument.shape)
    compare_with_truth(case, arguments, truth_of(case, arguments))


@pytest.mark.parametrize("case", cases(benchmark=True), ids=str)
def test_benchmark_shapes(case):
    check_against_truth(case, torch.float32, "channels_last")


@pytest.mark.full
@all_layouts
@all_dtypes
@pytest.mark.parametrize("case", cases(benchmark=True), ids=str)
def test_benchmark_shapes_everywhere(case, dtype, layout, instruction_set):
    check_against_truth(case, dtype, layout)


@pytest.mark.parametrize(
    "case",
    [c for c in cases("wavelet_depthwise_conv2d") if "levels" not in c.name]
    + [c for c in cases("causal_conv1d_fn") if not set("qif") & set(c.name.rpartition("-")[2])],
    ids=str,
)
def test_peer_computes_the_same(case):
    arguments = map_tensors(Tensor.double, case.make())
    if 0 in arguments["x"].shape:
        pytest.skip("PyTorch's convolutions refuse empty maps")
    torch.testing.assert_close(case.peer(arguments), case.run(arguments))


@typical_cases
def test_parameters_in_sixteen_bits(case):
    """Parameters may have the dtype of the activations."""
    arguments = map_tensors(Tensor.bfloat16, case.make())
    plain, exact = reference(case, arguments), reference(case, arguments, exact=True)
    for i, result in enumerate(case.run(arguments)):
        assert_close(result, exact[i], plain[i])


def positional(case: Case, arguments: dict) -> tuple:
    """The arguments of the operator below the public function."""
    public = getattr(mobilemamba_kernels, case.op)
    given = {name: p.default for name, p in inspect.signature(public).parameters.items()} | arguments
    if case.op in ("conv2d_act", "depthwise_conv2d_act") and given["padding"] is None:
        packed = given["weight"].ndim == 3
        given["padding"] = (filter_size(given["x"], given["weight"]) if packed else given["weight"].shape[-1]) // 2
    if case.op == "pointwise_conv2d_act":
        maps = [given["x"]] if isinstance(given["x"], Tensor) else given["x"]
        given["x"], given["second"], given["third"] = (*maps, None, None)[:3]
    if case.op == "wavelet_depthwise_conv2d" and given["scale"] is not None:
        given["scale"] = given["scale"].flatten()
    if case.op == "causal_conv1d_fn":
        given["silu"] = given["activation"] is not None
    if case.op == "haar_idwt2d":
        given["height"], given["width"] = given["size"]
    if case.op == "cross_scan_fn":
        given["images"] = given["x"] if given["in_channel_first"] else given["x"].movedim((1, 2), (-2, -1))
        given["channels_last"] = not given["out_channel_first"]
    if case.op == "cross_merge_fn":
        paths = given["y"] if given["out_channel_first"] else given["y"].movedim((1, 2), (-2, -1))
        given["sequences"], (given["height"], given["width"]) = paths.flatten(3), paths.shape[3:]
        given["channels_last"] = not given["in_channel_first"]
    return tuple(given[a.name] for a in operator(case, "fwd")._schema.arguments)


def operator(case: Case, suffix: str):
    namespace = torch.ops.mobilemamba_triton if forced_backend() == "triton" else torch.ops.mobilemamba
    return getattr(getattr(namespace, f"{case.operator}_{suffix}"), "default")  # noqa: B009


def run_opcheck(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    arguments = positional(case, case.make(dtype, layout, device))
    results = operator(case, "fwd")(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    grads = tuple(torch.ones_like(r) for r in results)
    torch.library.opcheck(operator(case, "bwd"), (*grads, *arguments))
    differentiable = map_tensors(Tensor.requires_grad_, arguments)
    torch.library.opcheck(operator(case, "fwd"), differentiable)


@pytest.mark.parametrize("case", list(dict.fromkeys(TYPICAL + BARE)), ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_opcheck(case, layout):
    run_opcheck(case, torch.float32, layout)


@one_level_cases
@all_dtypes
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_strides_are_those_of_the_fake(case, dtype, layout):
    """Those of dimensions of size 1 too, which opcheck ignores and by which the next operator chooses its layout."""
    compare_strides(case, dtype, layout)


def compare_strides(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    arguments = positional(case, case.make(dtype, layout, device))
    real = operator(case, "fwd")(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = operator(case, "fwd")(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    for r, f in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True):
        if r.numel():
            assert (r.dtype, r.stride()) == (f.dtype, f.stride())


def test_conv2d_act_below_the_public_function_ignores_autocast():
    x, weight = torch.ones(1, 3, 8, 8, dtype=torch.bfloat16), torch.ones(4, 3, 3, 3)
    with torch.autocast("cpu", torch.float16):
        assert torch.ops.mobilemamba.conv2d_act_fwd(x, weight, None, 2, 1, "none").dtype == torch.bfloat16


@pytest.mark.full
@one_level_cases
@all_dtypes
@all_layouts
def test_opcheck_everywhere(case, dtype, layout):
    if layout == "strided" and not all(t.numel() for t in tensors(case.make()).values()):
        pytest.skip("opcheck cannot copy an empty tensor of such strides")
    run_opcheck(case, dtype, layout)


@small_cases
def test_reference_is_differentiable_twice(case):
    check_derivatives_of_reference(case)


def check_derivatives_of_reference(case: Case, device: str = "cpu") -> None:
    if max((t.numel() for t in tensors(case.make()).values()), default=0) > 2000:
        pytest.skip("too large for finite differences; a smaller case has every argument")
    arguments = case.make(torch.float64, device=device)
    leaves = tensors(arguments)
    names = [name for name, value in arguments.items() if name in leaves or isinstance(value, list)]

    def run(*values: Tensor):
        given = dict(zip(leaves, values, strict=True))
        rebuilt = {
            name: [given[f"{name}.{i}"] for i in range(len(arguments[name]))]
            if isinstance(arguments[name], list)
            else given[name]
            for name in names
        }
        return tuple(r for r in case.run(arguments | rebuilt) if r.requires_grad)

    inputs = tuple(tensor.requires_grad_() for tensor in leaves.values())
    # An empty result has no direction to differentiate in.
    if all(r.numel() for r in run(*inputs)):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@typical_cases
def test_second_derivative_of_a_kernel_is_refused(case):
    arguments = map_tensors(Tensor.requires_grad_, positional(case, case.make()))
    result = operator(case, "fwd")(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    (first,) = torch.autograd.grad((result**2).sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
        torch.autograd.grad(first.sum(), arguments[0])


@small_cases
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_non_finite_values_propagate(case, layout, instruction_set):
    check_non_finite_values(case, layout)


def check_non_finite_values(case: Case, layout: str, device: str = "cpu") -> None:
    for name, argument in case.arguments.items():
        if not isinstance(argument, Argument) or not argument.positions or 0 in argument.shape:
            continue  # a parameter: whether a zero of the padding meets it is the implementation's choice
        for value in (math.nan, math.inf, -math.inf):
            arguments = case.make(torch.float32, layout, device)
            arguments[name].select(0, 0).select(-1, argument.shape[-1] // 2).fill_(value)
            plain, exact = reference(case, arguments), reference(case, arguments, exact=True)
            for i, result in enumerate(case.run(arguments)):
                assert_close(result, exact[i], plain[i], f"result {i} with {value} in {name}")


# Of many states infinities meet in sums whose order is the implementation's choice.
@pytest.mark.parametrize(
    "case",
    [
        c
        for c in SMALL
        if "selective_scan" in c.op
        and c.arguments["A"].shape[-1] == 1
        and 0 not in c.arguments["u"].shape
        and not c.options.get("return_last_state")
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["u", "the gradient"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_gradients_of_an_infinite_element(case, where, layout, instruction_set):
    """Of the last channel: others, and lanes beside it, are as without."""
    arguments = case.make(layout=layout)
    factor = torch.ones(arguments["u"].shape[-2:])
    changed = arguments["u"][0] if where == "u" else factor
    changed[..., -1, changed.shape[-1] // 2] = math.inf
    compare_with_truth(case, arguments, truth_of(case, arguments, factor))


@pytest.mark.parametrize(
    "case", [c for c in TYPICAL if c.op.endswith(("selective_scan", "selective_scan_fn"))], ids=lambda c: c.op
)
def test_softplus_is_the_identity_above_20(case, instruction_set):
    arguments = case.make()
    arguments["delta_bias"] = torch.linspace(15, 25, arguments["delta_bias"].numel()).view_as(arguments["delta_bias"])
    plain, exact = reference(case, arguments), reference(case, arguments, exact=True)
    for i, result in enumerate(case.run(arguments)):
        assert_close(result, exact[i], plain[i])


@typical_cases
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_same_bits_at_any_number_of_threads(case, layout, restore_threads):
    gradients = "scan" in case.op or "ss2d" in case.op or "wavelet" in case.op or "haar" in case.op or "1d" in case.op
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results, grads = differentiate(case, case.make(layout=layout))
        found.append([*results, *(grads.values() if gradients else ())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@small_cases
def test_every_element_is_written(case, instruction_set):
    """With memory that PyTorch fills with NaN before use."""
    torch.use_deterministic_algorithms(True)
    try:
        results, grads = differentiate(case, case.make())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (*results, *grads.values()))


@pytest.mark.parametrize(
    "case",
    [c for c in cases("depthwise_conv2d_act", benchmark=False) if c.arguments.get("residual") == c.arguments["x"]],
    ids=str,
)
@all_dtypes
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_every_element_where_the_input_is_the_residual(case, dtype, layout):
    arguments = case.make(dtype, layout)
    copied, itself = ({**arguments, "residual": r} for r in (arguments["x"].clone(), arguments["x"]))
    assert torch.equal(case.run(itself)[0], case.run(copied)[0])


@small_cases
def test_arguments_are_left_alone(case):
    arguments = case.make(layout="channels_last")
    before = map_tensors(Tensor.clone, arguments)
    differentiate(case, arguments)
    for name, tensor in tensors(before).items():
        assert torch.equal(tensors(arguments)[name], tensor)


class AsModule(torch.nn.Module):
    """A case as a module of a dictionary of arguments, for export."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.run = functools.partial(getattr(mobilemamba_kernels, case.op), **case.options)

    def forward(self, arguments):
        return self.run(**arguments)


def compare_compiled(case: Case, backend: str, device: str = "cpu") -> None:
    torch.compiler.reset()
    function = functools.partial(getattr(mobilemamba_kernels, case.op), **case.options)
    arguments = {k: v for k, v in case.make(device=device).items() if k not in case.options}
    inputs = list(tensors(arguments).values())
    for tensor in inputs:
        tensor.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for run in (function, compiled):
        found = run(**arguments)
        found = found if isinstance(found, tuple) else (found,)
        results.append([*found, *torch.autograd.grad([f.square().sum() for f in found], inputs)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@typical_cases
def test_compiles_without_a_graph_break(case):
    compare_compiled(case, "aot_eager")


@pytest.mark.parametrize("op", ["bidirectional_selective_scan", "wavelet_depthwise_conv2d"])
def test_compiles_with_inductor(op):
    compare_compiled(cases(op, benchmark=False)[1], "inductor")


@typical_cases
def test_exports_with_a_dynamic_batch(case):
    arguments = {k: v for k, v in case.make().items() if k not in case.options}
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: case.arguments[name] for name in arguments}
    dynamic = pytree.tree_map_only((Argument, Numbers), lambda a: {0: batch} if a.positions else None, shapes)

    def repeat(*parts) -> dict:
        return pytree.tree_map(lambda t, a: torch.cat([p(t) for p in parts]) if a.positions else t, arguments, shapes)

    example, larger = repeat(Tensor.clone, Tensor.clone), repeat(Tensor.clone, Tensor.clone, lambda t: t.flip(0))
    program = torch.export.export(AsModule(case), (example,), dynamic_shapes=(dynamic,))
    found = program.module()(larger)
    expected = case.run(larger | dict(case.options))
    torch.testing.assert_close(found if isinstance(found, tuple) else (found,), expected, rtol=1e-4, atol=1e-4)


@typical_cases
def test_autocast(case):
    """Convolutions run in autocast's dtype, as PyTorch's do; operators of sequences follow their input."""
    arguments = case.make()
    with torch.autocast("cpu", torch.bfloat16):
        results = case.run(arguments)
    follows = any(kind in case.op for kind in ("selective_scan", "cross", "haar", "1d"))
    assert results[0].dtype == (torch.float32 if follows else torch.bfloat16)
    torch.testing.assert_close(results[0].float(), case.run(arguments)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [8, 128, 372])
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("has", ["", "Dzb"])
def test_mamba_ssm_tolerances(dtype, length, groups, has, instruction_set):
    """The check of mamba-ssm's tests/ops/test_selective_scan.py: its distributions, its tolerances."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, state = 2, 4, 8

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    variable = (batch, state, length) if groups is None else (batch, groups, state, length)
    arguments = {
        "u": normal(batch, dim, length),
        "delta": (0.5 * torch.rand(batch, dim, length, generator=generator)).to(dtype),
        "A": -0.5 * torch.rand(dim, state, generator=generator),
        "B": normal(*variable),
        "C": normal(*variable),
        "D": normal(dim, dtype=torch.float32) if "D" in has else None,
        "z": normal(batch, dim, length) if "z" in has else None,
        "delta_bias": 0.5 * torch.rand(dim, generator=generator) if "b" in has else None,
    }
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    for tensor in given.values():
        tensor.requires_grad_()
    found = []
    for function in (mobilemamba_kernels.selective_scan_fn, mobilemamba_kernels.selective_scan_ref):
        result, state_ = function(**given, delta_softplus=True, return_last_state=True)
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append((result, state_, torch.autograd.grad(result, list(given.values()), grad)))
    (result, state_, grads), (plain, plain_state, plain_grads) = found
    torch.testing.assert_close(result, plain, **mamba_ssm_tolerance(dtype))
    torch.testing.assert_close(state_, plain_state, **mamba_ssm_tolerance(dtype))
    for name, grad, plain_grad in zip(given, grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain_grad, **mamba_ssm_tolerance(dtype, name))


def test_selective_scan_ref_is_the_reference():
    case = cases("selective_scan_fn")[1]
    arguments = case.make()
    assert all(map(torch.equal, mobilemamba_kernels.selective_scan_ref(**arguments), reference(case, arguments)))


@pytest.mark.parametrize("has", ["", "Dzbsl"])
@pytest.mark.parametrize("state", [1, 3])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_long_sequences_of_few_channels_are_divided_among_threads(state, has, layout, restore_threads, instruction_set):
    """With a state that reaches across the seams: each step forgets a ten-thousandth."""
    case = BUILDERS["selective_scan_fn"](1, 3, 20000, state, has=has)
    arguments = case.make(layout=layout)
    arguments["A"] = arguments["A"] * 1e-3
    exact, plain = reference(case, arguments, exact=True), reference(case, arguments)
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        for i, result in enumerate(case.run(arguments)):
            assert_close(result, exact[i], plain[i], f"result {i} of {threads} threads")


def test_a_product_of_decays_may_overflow(restore_threads):
    """Where no state passes it."""
    torch.set_num_threads(2)
    case = BUILDERS["selective_scan_fn"](1, 3, 20000, 1)
    arguments = case.make()
    arguments["A"] = arguments["A"].abs()
    arguments["u"][..., :6000] = 0
    arguments["delta"][..., 6000:] = 0
    for result, expected in zip(case.run(arguments), reference(case, arguments), strict=True):
        torch.testing.assert_close(result, expected)


def test_an_infinite_state_crosses_the_seams(restore_threads):
    torch.set_num_threads(2)
    case = BUILDERS["selective_scan_fn"](1, 3, 20000, 1)
    arguments = case.make()
    arguments["u"][0, 0, 5000] = math.inf
    for result, expected in zip(case.run(arguments), reference(case, arguments), strict=True):
        assert torch.equal(result.isfinite(), expected.isfinite())
        assert torch.equal(result.isnan(), expected.isnan())
