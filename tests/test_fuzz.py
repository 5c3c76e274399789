"""Random good and bad calls of every operator; `make sanitize` runs them under AddressSanitizer and UBSan."""

import pytest
import torch
from conftest import BEST, INSTRUCTION_SETS
from hypothesis import given
from hypothesis import strategies as st
from test_ops import differentiate, operator, positional, reference
from torch import Tensor

import mobilemamba_kernels
from mobilemamba_kernels.testing import BUILDERS, LAYOUTS, Case, assert_close, map_tensors

OPS = list(BUILDERS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFUSALS = (ValueError, TypeError, RuntimeError)

batch, channels, size = st.integers(0, 3), st.integers(0, 40), st.integers(0, 12)
positive = st.integers(1, 12)
activation = st.sampled_from(["none", "relu", "silu"])
packed = st.sampled_from([None, torch.float32, torch.bfloat16])


def flags(letters: str) -> st.SearchStrategy[str]:
    """Any subset of the optional arguments that the letters stand for."""
    return st.tuples(*(st.sampled_from(["", letter]) for letter in letters)).map("".join)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, str]:
    """A number of channels and what B and C are shared by."""
    groups = draw(st.integers(1, 4))
    dim = draw(st.integers(0, 12)) * groups
    return dim, draw(st.sampled_from(["DN", "BNL", str(groups)]))


@st.composite
def convolution(draw: st.DrawFn, op: str) -> Case:
    k, padding = draw(st.integers(1, 7)), draw(st.none() | st.integers(0, 4))
    least = max(0, k - 2 * (k // 2 if padding is None else padding))
    height, width = draw(st.integers(least, 14)), draw(st.integers(least, 14))
    common = {"stride": draw(st.integers(1, 3)), "padding": padding, "activation": draw(activation)}
    if op == "depthwise_conv2d_act":
        return BUILDERS[op](draw(batch), draw(channels), height, width, k, has=draw(flags("brst")), **common)
    form = draw(packed)
    bias = form is not None or draw(st.booleans())
    return BUILDERS[op](draw(batch), draw(channels), draw(channels), height, width, k, bias=bias, packed=form, **common)


@st.composite
def product(draw: st.DrawFn, op: str, **options: st.SearchStrategy) -> Case:
    """A case with a weight that is packed, and then with its bias, or not."""
    form, has = draw(packed), draw(flags("br"))
    has = has if form is None or "b" in has else "b" + has
    drawn = {name: draw(option) for name, option in options.items()}
    return BUILDERS[op](
        draw(batch), draw(channels), draw(channels), draw(size), draw(size), has=has, packed=form, **drawn
    )


state = st.sampled_from([1, 1, 2, 3, 16])
length = st.integers(0, 40) | st.sampled_from([255, 256, 257, 1024, 1030])
maps = st.integers(0, 12) | st.sampled_from([16, 31, 32, 33, 40])
scan = BUILDERS["selective_scan_fn"]
CASE_OF = {
    "selective_scan_fn": st.builds(
        lambda b, dg, length, n, has: scan(b, dg[0], length, n, bc=dg[1], has=has),
        batch, grouped(), length, state, flags("Dzbsl"),
    ),
    "bidirectional_selective_scan": st.builds(
        BUILDERS["bidirectional_selective_scan"],
        batch, channels, length, state, two_inputs=st.booleans(), has=flags("Dzbs"),
    ),
    "ss2d_bidirectional": st.builds(
        BUILDERS["ss2d_bidirectional"], batch, st.integers(1, 40), size, size, st.integers(1, 5), state, st.booleans()
    ),
    "causal_conv1d_fn": st.builds(
        lambda b, c, length, width, has: BUILDERS["causal_conv1d_fn"](b, c, length, width, has=has),
        batch, channels, length, st.sampled_from([2, 3, 4]), flags("bs").flatmap(
            lambda has: st.sampled_from([has, has + "q", has + "i", has + "f", has + "if"])
        ),
    ),
    **{
        op: st.builds(BUILDERS[op], batch, channels, maps, maps, st.integers(0, 2), has=flags("io1"))
        for op in ("cross_scan_fn", "cross_merge_fn")
    },
    "haar_dwt2d": st.builds(BUILDERS["haar_dwt2d"], batch, channels, size, size),
    "haar_idwt2d": st.builds(BUILDERS["haar_idwt2d"], batch, channels, size, size),
    "wavelet_depthwise_conv2d": st.builds(
        BUILDERS["wavelet_depthwise_conv2d"], batch, channels, st.integers(0, 20), st.integers(0, 20),
        st.sampled_from([1, 3, 5, 7, 9]), levels=st.integers(1, 3), has=flags("sb"),
    ),
    "depthwise_conv2d_act": convolution("depthwise_conv2d_act"),
    "conv2d_act": convolution("conv2d_act"),
    "pointwise_conv2d_act": product(
        "pointwise_conv2d_act", activation=activation, input_activation=activation, maps=st.integers(1, 3)
    ),
    "feed_forward": product("feed_forward", activation=activation),
    "squeeze_excite": st.builds(
        BUILDERS["squeeze_excite"], batch, channels, channels, positive, positive, packed=packed
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def best_instruction_set_afterwards():
    yield
    use_instruction_set(BEST)


def use_instruction_set(name: str) -> None:
    if name != "none":
        mobilemamba_kernels._library._C.set_cpu_capability(name)


def atol(op: str, dtype: torch.dtype) -> float:
    """Some roundings of the terms, which are of scale 1: what is drawn may be one element, a difference of two.

    A LayerNorm with eps = 1e-5 multiplies such a difference by up to 316.
    """
    if op == "ss2d_bidirectional":
        return 6e-4
    return {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_good_calls_are_right(op, data):
    case = data.draw(CASE_OF[op], label="case")
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    chosen = data.draw(st.sampled_from(INSTRUCTION_SETS))
    use_instruction_set(chosen)
    arguments = case.make(dtype, layout, seed=data.draw(st.integers(0, 9)))
    plain, exact = reference(case, arguments), reference(case, arguments, exact=True)
    # The vendor's products of bfloat16 weights round their sums to bfloat16, as pack_weight's docstring says.
    vendor = chosen == "amx" and any(getattr(a, "packed", None) == torch.bfloat16 for a in case.arguments.values())
    allowed = atol(op, torch.bfloat16 if vendor else dtype)
    if vendor:  # four of those roundings
        allowed = max(
            allowed,
            2 * torch.finfo(torch.bfloat16).eps * max([t.abs().max().item() for t in exact if t.numel()], default=0.0),
        )
    if data.draw(st.booleans(), label="differentiate"):
        results, gradients = differentiate(case, arguments)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    else:
        results = case.run(arguments)
    for i, result in enumerate(results):
        assert_close(result, exact[i], plain[i], f"result {i}", atol=allowed)


def other_size(tensor: Tensor, data: st.DataObject) -> Tensor:
    if not tensor.ndim:
        return tensor.view(1)
    dim = data.draw(st.integers(0, tensor.ndim - 1))
    n = data.draw(st.sampled_from([0, 1, tensor.shape[dim] + 1, max(tensor.shape[dim] - 1, 0), 300]))
    return tensor.new_zeros((*tensor.shape[:dim], n, *tensor.shape[dim + 1 :]))


BREAKS = {
    "another size": other_size,
    "a dimension less": lambda t, data: t.sum(-1) if t.ndim else t,
    "a dimension more": lambda t, data: t.unsqueeze(data.draw(st.integers(0, t.ndim))),
    "integers": lambda t, data: t.to(torch.int64),
    "booleans": lambda t, data: t.bool(),
    "complex numbers": lambda t, data: t.to(torch.complex64),
    "another device": lambda t, data: t.to("meta"),
    "sparse": lambda t, data: t.to_sparse(),
    "no tensor": lambda t, data: data.draw(st.sampled_from([None, "x", 1.0, [t]])),
}


def broken(arguments: dict, data: st.DataObject) -> dict:
    """The arguments with one of them, or one option, made wrong (or, by chance, only different)."""
    names = [name for name, value in arguments.items() if isinstance(value, (Tensor, list))]
    options = [name for name, value in arguments.items() if isinstance(value, (str, int, type(None)))]
    if options and data.draw(st.booleans(), label="break an option"):
        wrong = data.draw(st.sampled_from(["", "gelu", -1, 0, 7.5, 2**40, None, object()]), label="option")
        return arguments | {data.draw(st.sampled_from(options)): wrong}
    name = data.draw(st.sampled_from(names), label="argument")
    kind = data.draw(st.sampled_from(list(BREAKS)), label="break")
    value = arguments[name]
    if isinstance(value, list):
        return arguments | {name: [*value[:-1], BREAKS[kind](value[-1], data)]}
    return arguments | {name: BREAKS[kind](value, data)}


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_bad_calls_are_refused_in_a_sentence(op, data):
    """Or, where what was changed is allowed, give a result (its steps may well explode)."""
    case = data.draw(CASE_OF[op], label="case")
    use_instruction_set(data.draw(st.sampled_from(INSTRUCTION_SETS)))
    arguments = broken(case.make(layout=data.draw(st.sampled_from(LAYOUTS))), data)
    try:
        results = case.run(arguments)
    except REFUSALS as error:
        sentence = str(error)
        if not sentence.startswith(op) or "\n" in sentence:
            raise AssertionError(f"not a sentence about {op}: {sentence}") from error
        return
    assert all(
        r.shape == p.shape and r.dtype == p.dtype for r, p in zip(results, reference(case, arguments), strict=True)
    )


@pytest.mark.parametrize("suffix", ["fwd", "bwd"])
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_kernels_stay_in_their_memory(op, suffix, data):
    """The operators below the public functions, past their checks: a wrong result is possible, a crash is not."""
    case = data.draw(CASE_OF[op], label="case")
    use_instruction_set(data.draw(st.sampled_from(INSTRUCTION_SETS)))
    arguments = case.make(data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS)))
    if any(isinstance(value, list) for value in arguments.values()):
        return  # several levels are several calls
    inputs = positional(case, arguments)
    if suffix == "bwd":
        results = operator(case, "fwd")(*inputs)
        inputs = (*(results if isinstance(results, tuple) else (results,)), *inputs)
    kind = data.draw(st.sampled_from(["another size", "a dimension less", "a dimension more"]), label="break")
    at = data.draw(st.sampled_from([i for i, value in enumerate(inputs) if isinstance(value, Tensor)]), label="at")
    inputs = (*inputs[:at], BREAKS[kind](inputs[at], data), *inputs[at + 1 :])
    try:
        operator(case, suffix)(*map_tensors(torch.clone, inputs))
    except (*REFUSALS, IndexError, NotImplementedError):
        pass
