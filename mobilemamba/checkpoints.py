"""Reading and writing checkpoints. A checkpoint is data from a stranger: it is read without running code, checked
whole, and only then applied."""

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mobilemamba.layers import haar_filters
from mobilemamba.model import MobileMamba
from mobilemamba.variants import Options

# What a checkpoint says besides the weights, under this key (in safetensors: as JSON in the file's metadata).
_KEY = "mobilemamba"
_PREPARATION = ("input_size", "crop_pct", "interpolation", "mean", "std", "label_names")


def load_checkpoint(
    model: MobileMamba, path: str | os.PathLike[str], *, ema: bool = False, adapt_head: bool = False
) -> None:
    """Load the weights of a file into ``model``, all of them or none.

    The file is PyTorch's or safetensors' and holds a bare state dict, or one under ``net``, ``net_E`` or
    ``state_dict``. What the file says of classes and of preparing images goes into ``model.default_cfg``.

    Args:
        model: the network, not fused.
        path: the file.
        ema: take the averaged weights, ``net_E``.
        adapt_head: where the number of classes differs, keep the model's own classifier.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no checkpoint, is truncated or holds code, or its weights are not the model's; names every
            missing, unexpected and misshapen one. The model is unchanged.
    """
    state, about = _read(path, ema)
    _apply(model, path, state, about, adapt_head)


def model_from_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> MobileMamba:
    """The network that :func:`save_checkpoint` wrote, in eval mode, with what it says in ``default_cfg``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: as in :func:`load_checkpoint`, or the file does not say what network it holds.
    """
    state, about = _read(path, ema)
    if not about:
        raise ValueError(
            f"{path} does not say what network it holds: build it by name, create_model(name, checkpoint=…)"
        )
    try:
        options = Options(**about["options"])
        if sum(options.depths) > len(state):
            raise ValueError(f"it has fewer weights than its {sum(options.depths)} blocks")
        arguments = {name: about[name] for name in ("num_classes", "in_chans", "distillation")}
        # Without memory until the weights are known to fit, so that a file cannot ask for more than it holds.
        with torch.device("meta"):
            model = MobileMamba(options, **arguments, variant=str(about["variant"]))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} describes no MobileMamba network: {error}") from error
    _check(model, path, state)
    model = model.to_empty(device="cpu")
    _apply(model, path, state, about, adapt_head=False)
    return model.eval()


def save_checkpoint(model: MobileMamba, path: str | os.PathLike[str]) -> None:
    """Write weights, options, classes and image preparation, so that the file alone suffices to rebuild and predict.

    The file appears whole or not at all. A name ending in ``.safetensors`` gives that format.

    Args:
        model: the network, not fused: fused weights cannot be loaded, and fusing again is quick.
        path: the file; an existing one is replaced.

    Raises:
        OSError: the file cannot be written.
        ValueError: the network is fused, or ``default_cfg`` does not fit it.
    """
    if model.fused:
        raise ValueError("a fused network is not saved: save the network it was made from, and fuse that after loading")
    about = {
        "variant": model.default_cfg["architecture"],
        "options": dataclasses.asdict(model.options),
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "distillation": model.distillation,
        **{name: model.default_cfg.get(name) for name in _PREPARATION},
    }
    about = json.loads(json.dumps(about))  # plain lists and numbers in both formats
    _preparation(model, path, about)  # what could not be loaded is not written
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save

        data = save(state, {_KEY: json.dumps(about)})
        write_file(Path(path), lambda file: file.write(data))
    else:
        write_file(Path(path), lambda file: torch.save({"state_dict": state, _KEY: about}, file))


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace a file by what ``write`` puts into it, whole or not at all."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # os.open and not tempfile: the file gets the permissions of the umask, not the owner's alone.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: str | os.PathLike[str], ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file, and what it says besides ({} if nothing)."""
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        # A safetensors file starts with the length of its JSON header.
        content, about = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
    except ImportError as error:
        raise ValueError(f"{path} is a safetensors file: install safetensors to read it") from error
    except Exception as error:  # readers fail in many ways on files that are not theirs
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}): "
            "it is truncated, is of another kind, or holds code"
        ) from error

    keys = ["net_E"] if ema else ["net", "state_dict", "net_E"]
    nested = [key for key in keys if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    if ema and not nested:
        raise ValueError(f"{path} holds no averaged weights (net_E): load it with ema=False")
    state = content[nested[0]] if nested else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no network weights: expected a state dict, bare or under net, net_E or state_dict"
        )
    return dict(state), about if isinstance(about, dict) else {}


def _read_torch(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content, content.get(_KEY) if isinstance(content, Mapping) else None


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get(_KEY)
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about) if about else None  # noqa: SIM118


def _apply(
    model: MobileMamba, path: str | os.PathLike[str], state: dict[str, Tensor], about: dict[str, Any], adapt_head: bool
) -> None:
    if model.fused:
        raise ValueError("a fused network takes no checkpoint: load it into the unfused network, then fuse that")
    own = model.state_dict()
    other_classes = "head.l.weight" in own.keys() & state.keys() and len(own["head.l.weight"]) != len(
        state["head.l.weight"]
    )
    if adapt_head and other_classes:
        classifier = [name for name in own if name.startswith(("head.l.", "head_dist.l."))]
        state = {**state, **{name: own[name] for name in classifier}}
        about = {**about, "label_names": None}
    _check(model, path, state)
    cfg = _preparation(model, path, about)
    model.load_state_dict(state)
    model.default_cfg.update(cfg)


def _check(model: MobileMamba, path: str | os.PathLike[str], state: dict[str, Tensor]) -> None:
    """Raise ValueError, naming every tensor in the way, unless ``state`` can be copied into ``model`` whole."""
    own = model.state_dict()
    shared = [name for name in own if name in state]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [str(name) for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in shared
            if state[name].shape != own[name].shape
        ],
        "of another kind of number": [
            f"{name} {state[name].dtype}"
            for name in shared
            if state[name].layout != torch.strided
            or state[name].is_meta
            or state[name].is_floating_point() != own[name].is_floating_point()
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        remedy = ""
        if any(name.startswith("head.l") for name in faults["of another shape"]):
            remedy = "; give the number of classes of the checkpoint, or load it with adapt_head=True"
        raise ValueError(f"{path} does not fit the model: {listed}{remedy}")
    for name in shared:
        # The operators have the Haar wavelet built in, so weights trained with another one would go wrong in silence.
        if name.endswith("wt_filter") and not torch.allclose(
            state[name].float(), haar_filters(len(own[name]) // 4).to("cpu"), atol=1e-2
        ):
            raise ValueError(f"{path} was made with another wavelet than Haar's: {name} differs")


def _preparation(model: MobileMamba, path: str | os.PathLike[str], about: dict[str, Any]) -> dict[str, Any]:
    """The entries for ``default_cfg`` in what a checkpoint says; ValueError if they cannot be right."""
    given = {name: about[name] for name in _PREPARATION if name in about}
    channels = model.in_chans
    right: dict[str, Callable[[Any], bool]] = {
        "input_size": lambda v: _numbers(v, 3) and v[0] == channels and all(isinstance(n, int) for n in v),
        "crop_pct": lambda v: _numbers([v], 1),
        "interpolation": lambda v: isinstance(v, str),
        "mean": lambda v: _numbers(v, channels, positive=False),
        "std": lambda v: _numbers(v, channels),
        "label_names": lambda v: (
            v is None
            or (isinstance(v, list) and len(v) == model.num_classes and all(isinstance(name, str) for name in v))
        ),
    }
    for name, value in given.items():
        if not right[name](value):
            raise ValueError(
                f"{path} gives {name} as {value!r}, which does not fit the model: correct default_cfg before saving"
            )
    return {name: tuple(v) if isinstance(v, list) and name != "label_names" else v for name, v in given.items()}


def _numbers(value: Any, length: int, positive: bool = True) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(n, (int, float)) and abs(n) < 1e6 and (n > 0 or not positive) for n in value)
    )
