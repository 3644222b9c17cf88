"""A checkpoint's model in formats that need no Savepoint. A file is compared with the checkpoint
before it gets its name.

    safetensors, npz, state_dict    the weights, bit for bit, under the names of the LightningModule
    pt2, onnx                       weights and `forward` in eval mode, for batches of any size

The input is that of `forward`: what a model does to its input there (normalising, say) is part of
pt2 and ONNX files.
"""

import importlib
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

import savepoint
from savepoint import files
from savepoint.checkpoint import canary
from savepoint.checkpoint.format import fingerprint
from savepoint.errors import ConfigError, SavepointError
from savepoint.rebuilding import Rebuilt
from savepoint.resume.overrides import plain_name, under_names_of

OPSET = 18
"""Of ONNX: the one torch translates to by itself; a newer one would be converted from it."""
TOLERANCE = 1e-4
"""Of the largest output, for the formats that another engine runs; of a model in half precision ten
of its last digits.
"""


class ParityError(SavepointError, ArithmeticError):
    """The exported file is not the checkpoint's model. It was not kept."""

    exit_code = 1


@dataclass(frozen=True)
class Parity:
    """How far the outputs of the file, for the canary's input, are from those of the checkpoint's
    weights here.

    Attributes:
        saved: How far the latter are from the output in the checkpoint: 0 but for the arithmetic of
            another device.
    """

    largest: float
    allowed: float
    saved: float


def export(made: Rebuilt, path: Path, kind: str) -> Parity | None:
    """Write `path` in the format `kind`; None where the checkpoint has no canary to compare with.

    Raises:
        ParityError: the file does not give what the checkpoint gives; nothing was changed under
            `path`.
        ConfigError: the model cannot be written in this format.
        CheckpointSaveError: the file cannot be written.
    """
    write, read, exact = _FORMATS[kind]
    saved = made.state.get("canary")
    if saved and "seed" in saved and not exact:
        saved = None  # another engine draws other numbers
    here = _outputs(made, saved["input"]) if saved else None
    # It has its name only after it was compared: a crash or a mismatch before that leaves what was
    # there.
    with files.replacing(path) as file:
        with _explained(made, kind):
            write(made, file)
            file.seek(0)
            run = read(made, file)
            there = run(saved["input"]) if saved and here is not None else None
        if saved is None or here is None or there is None:
            return None
        parity = Parity(
            largest=canary.distance(there, here),
            allowed=0.0 if exact else _tolerance(made) * canary.largest(here),
            saved=canary.distance(here, saved["output"]),
        )
        if not parity.largest <= parity.allowed:
            raise ParityError(
                f"The exported file computes something else than the checkpoint: {path}, largest "
                f"difference {parity.largest:.3g}. Expected {parity.allowed:.3g} at most. It was "
                "not kept; try another --format."
            )
    return parity


def _tolerance(made: Rebuilt) -> float:
    kinds = {value.dtype for value in made.model.parameters() if value.is_floating_point()}
    return max([TOLERANCE, *(10 * torch.finfo(kind).eps for kind in kinds)])


@contextmanager
def _explained(made: Rebuilt, kind: str) -> Iterator[None]:
    """Tracing a model and running it in another engine can fail in any way: what a user can mend is
    the model or the format.
    """
    try:
        yield
    except (SavepointError, OSError):
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            f"Not possible as {kind}: {type(made.model).__name__} ({first}). Expected a forward, "
            "and types of weights, that this format knows. Give another --format: state_dict "
            "takes all."
        ) from error


def describe(made: Rebuilt) -> dict[str, Any]:
    """What goes into a file that has room for it: where it comes from, its input, its classes, the
    arguments of its model.
    """
    facts = made.manifest
    described = {
        "savepoint": savepoint.__version__,
        "run_id": facts.get("run_id"),
        "digest": facts["digest"],
        "step": facts["step"],
        "epoch": facts.get("epoch"),
        "metrics": {
            name: metric["value"]
            for name, metric in facts.get("metrics", {}).items()
            if metric["step"] == facts["step"]
        },
        "dataset": (facts.get("dataset") or {}).get("name"),
        "classes": made.classes,
        "input": _input(made),
        "model": made.config.model.as_dict(),
    }
    return {key: value for key, value in described.items() if value is not None}


def _input(made: Rebuilt) -> str | None:
    example = _example(made)
    if example is None:
        return None
    return f"{str(example.dtype).removeprefix('torch.')} {['batch', *example.shape[1:]]}".replace(
        "'", ""
    )


def _example(made: Rebuilt) -> Tensor | None:
    saved = made.state.get("canary")
    example = saved["input"] if saved else made.model.example_input_array
    return example if isinstance(example, Tensor) else None


def _outputs(made: Rebuilt, example: Any) -> Any:
    """None for a forward that cannot be repeated."""
    found = canary.canary(made.model, made.model.state_dict(), example)
    return found and found["output"]


def _texts(made: Rebuilt) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in describe(made).items()
    }


# -- weights -------------------------------------------------------------------------------------

Run = Callable[[Any], Any]


def _weights(made: Rebuilt) -> dict[str, Tensor]:
    """A copy of each, whole and by itself: views of a larger tensor, or two of one, are not for
    every format.
    """
    state: Mapping[str, Any] = made.state["state_dict"]
    return {
        plain_name(name): _alone(value)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _alone(value: Tensor) -> Tensor:
    whole = value.layout is torch.strided and not value.is_quantized
    return value.detach().clone(
        memory_format=torch.contiguous_format if whole else torch.preserve_format
    )


def _write_safetensors(made: Rebuilt, file: BinaryIO) -> None:
    # "format" is what the readers of other libraries ask for.
    file.write(safetensors.torch.save(_weights(made), metadata={"format": "pt", **_texts(made)}))


def _write_npz(made: Rebuilt, file: BinaryIO) -> None:
    weights = _weights(made)
    if strange := {
        name: value.dtype for name, value in weights.items() if not _known_to_numpy(value)
    }:
        name, kind = next(iter(strange.items()))
        raise ConfigError(
            f"npz has no {str(kind).removeprefix('torch.')}: {name} and {len(strange) - 1} more. "
            "Expected types that numpy knows. Give --format safetensors"
        )
    with zipfile.ZipFile(file, "w") as archive:  # as np.savez writes it, whatever the names are
        for name, value in weights.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as record:
                np.lib.format.write_array(record, value.numpy(), allow_pickle=False)


def _known_to_numpy(value: Tensor) -> bool:
    floats = (torch.float16, torch.float32, torch.float64)
    return not value.is_quantized and (not value.is_floating_point() or value.dtype in floats)


def _write_state_dict(made: Rebuilt, file: BinaryIO) -> None:
    torch.save(_weights(made), file)


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    return safetensors.torch.load(file.read())


def _read_npz(file: BinaryIO) -> dict[str, Tensor]:
    with NpzFile(file, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _read_state_dict(file: BinaryIO) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


def _with(read: Callable[[BinaryIO], dict[str, Tensor]]) -> Callable[[Rebuilt, BinaryIO], Run]:
    def run(made: Rebuilt, file: BinaryIO) -> Run:
        found = read(file)
        saved = made.state["state_dict"]
        wanted = {
            plain_name(name): value for name, value in saved.items() if isinstance(value, Tensor)
        }
        other = [
            name for name in {**found, **wanted} if not _equal(found.get(name), wanted.get(name))
        ]
        if other:
            raise ParityError(
                f"The exported file holds other weights than the checkpoint: {other[0]} and "
                f"{len(other) - 1} more. Expected the same bits. It was not kept; try another "
                "--format."
            )
        target = made.model.state_dict()
        loaded = under_names_of(saved, target) | under_names_of(found, target)
        made.model.load_state_dict(loaded, strict=made.model.strict_loading)
        return lambda example: _outputs(made, example)

    return run


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and fingerprint(one) == fingerprint(other)


# -- weights and forward -------------------------------------------------------------------------


def _traced(made: Rebuilt) -> torch.export.ExportedProgram:
    example = _example(made)
    if example is None:
        raise ConfigError(
            f"No example input: {type(made.model).__name__} has no example_input_array that is a "
            "tensor. Expected one to trace `forward` with. Set it in the model's __init__, or "
            "give --format safetensors"
        )
    twice = torch.cat([example, example])  # a batch of one would be taken for a constant
    return torch.export.export(
        made.model, (twice,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )


def _write_pt2(made: Rebuilt, file: BinaryIO) -> None:
    program = _traced(made)
    with warnings.catch_warnings():
        # Of weights in channels_last order, which are whole, and on the CPU.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(describe(made))})


def _read_pt2(made: Rebuilt, file: BinaryIO) -> Run:
    # torch.export.load may unpickle: it is called here on what this process has just written, never
    # on a file of others.
    program = torch.export.load(file).module()

    def run(example: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = program(example)
        return output.float()

    return run


def _write_onnx(made: Rebuilt, file: BinaryIO) -> None:
    program = torch.onnx.export(
        _traced(made), dynamo=True, opset_version=OPSET, input_names=["input"], output_names=["output"], verbose=False,
        # It would fold batch norms into convolutions: the runtime does so, and the file keeps the
        # weights.
        optimize=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(_texts(made))
    file.write(program.model_proto.SerializeToString())


def _read_onnx(made: Rebuilt, file: BinaryIO) -> Run:
    onnxruntime = importlib.import_module("onnxruntime")  # an extra
    session = onnxruntime.InferenceSession(file.read(), providers=["CPUExecutionProvider"])
    return lambda example: torch.from_numpy(
        session.run(None, {"input": example.numpy()})[0]
    ).float()


_Format = tuple[Callable[[Rebuilt, BinaryIO], None], Callable[[Rebuilt, BinaryIO], Run], bool]
_FORMATS: dict[str, _Format] = {
    "safetensors": (_write_safetensors, _with(_read_safetensors), True),
    "npz": (_write_npz, _with(_read_npz), True),
    "state_dict": (_write_state_dict, _with(_read_state_dict), True),
    "pt2": (_write_pt2, _read_pt2, False),
    "onnx": (_write_onnx, _read_onnx, False),
}
