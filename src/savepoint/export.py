"""A checkpoint's model in formats that need no Savepoint. Each file is compared with the checkpoint
before it gets its name.

    safetensors, npz, state_dict    the weights, bit for bit, under the names of the LightningModule
    pt2, onnx                       weights and `forward` in eval mode, for batches of any size

The input is that of `forward`: what the model does there (normalising, say) is part of pt2 and
ONNX files.
"""

import importlib
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from savepoint.federated import clients, listing
from savepoint.rebuilding import Rebuilt
from savepoint.resume.overrides import plain_name, under_names_of

OPSET = 18
"""The ONNX operator set that torch writes by itself; it converts to any newer one."""
TOLERANCE = 1e-4
"""Allowed difference for formats that another engine runs, as a share of the largest output. A
model in half precision is allowed ten units of its last digit.
"""


class ParityError(SavepointError, ArithmeticError):
    """The exported file is not the checkpoint's model. It was not kept."""

    exit_code = 1


@dataclass(frozen=True)
class Parity:
    """The distance between the outputs of the exported file and of the checkpoint's weights here,
    both for the input of the canary.

    Attributes:
        saved: The distance between the weights' output here and the one in the checkpoint: 0, or
            the arithmetic of another device.
    """

    largest: float
    allowed: float
    saved: float


def export(rebuilt: Rebuilt, path: Path, kind: str) -> Parity | None:
    """Write `path` in the format `kind`; None where the checkpoint has no canary to compare with.

    Raises:
        ParityError: the file and the checkpoint differ; `path` is as it was.
        ConfigError: the model cannot be written in this format.
        CheckpointSaveError: the file cannot be written.
    """
    write, read, exact = _FORMATS[kind]
    saved = rebuilt.state.get("canary")
    if saved and "seed" in saved and not exact:
        saved = None  # another engine draws other numbers
    here = _outputs(rebuilt, saved["input"]) if saved else None
    # The file gets its name after the comparison: a crash or a mismatch before that leaves the old
    # file.
    with files.replacing(path) as file:
        with _explained(rebuilt, kind):
            write(rebuilt, file)
            file.seek(0)
            run = read(rebuilt, file)
            there = run(saved["input"]) if saved and here is not None else None
        if saved is None or here is None or there is None:
            return None
        parity = Parity(
            largest=canary.distance(there, here),
            allowed=0.0 if exact else _tolerance(rebuilt) * canary.largest(here),
            saved=canary.distance(here, saved["output"]),
        )
        if not parity.largest <= parity.allowed:
            raise ParityError(
                f"The exported file computes something else than the checkpoint: {path}, largest "
                f"difference {parity.largest:.3g}. Expected {parity.allowed:.3g} at most. The file "
                "was not kept; try another --format."
            )
    return parity


def _tolerance(rebuilt: Rebuilt) -> float:
    kinds = {value.dtype for value in rebuilt.model.parameters() if value.is_floating_point()}
    return max([TOLERANCE, *(10 * torch.finfo(kind).eps for kind in kinds)])


@contextmanager
def _explained(rebuilt: Rebuilt, kind: str) -> Iterator[None]:
    """Makes a ConfigError of any failure to trace the model or to run it in another engine: the
    user can change the model or the format.

    Warnings of the tracers are left out: they are about their own insides, and the comparison tells
    what became of the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SavepointError, OSError):
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            f"Not possible as {kind}: {type(rebuilt.model).__name__} ({first}). The format must "
            "know every operation in forward and every type of a weight. Give another --format: "
            "state_dict takes all."
        ) from error


def describe(rebuilt: Rebuilt) -> dict[str, Any]:
    """The metadata for formats that have room for it: the checkpoint, the input, the classes, the
    arguments of the model.
    """
    facts = rebuilt.manifest
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
        "classes": rebuilt.classes,
        "input": _input(rebuilt),
        "model": rebuilt.config.model.as_dict(),
    }
    return {key: value for key, value in described.items() if value is not None}


def write_facts(rebuilt: Rebuilt, path: Path) -> None:
    """What is known of a checkpoint beside its weights, as JSON: of a federated run also the rounds
    and what each client's state is.
    """
    saved = rebuilt.state.get("federated") or {}
    keys = ("round", "history", "partition", "clients", "measured")
    facts = describe(rebuilt) | {key: saved[key] for key in keys if key in saved}
    facts["hyper_parameters"] = rebuilt.config.as_dict()
    with files.replacing(path) as file:
        file.write((json.dumps(facts, indent=2, default=str) + "\n").encode())


def clients_of(rebuilt: Rebuilt) -> Iterator[tuple[str, Rebuilt]]:
    """`global` and its model, then `clients/00012` and the model of each client that keeps weights:
    the global one with what is the client's own in it.

    Raises:
        ConfigError: No client keeps weights, or their states are elsewhere.
        ClientStateError: A state is not the one that the checkpoint names.
    """
    yield "global", rebuilt
    root = rebuilt.path.absolute().parent.parent / clients.FOLDER
    found = False
    for client, version in listing.versions_of(rebuilt.state).items():
        own = clients.ClientStates([root], client).load(version).get("state_dict")
        if own is not None:
            found = True
            # Without the canary, which is the global model's.
            state = {"state_dict": {**rebuilt.state["state_dict"], **own}}
            yield f"clients/{client:05d}", replace(rebuilt, state=state)
    if not found:
        raise ConfigError(
            f"No client's weights: {rebuilt.path}. Clients keep some where federated.personal "
            "names them; whole models are in clients/ where federated.save_client_models asks for "
            "them. Leave --clients out for the global model."
        )


def _input(rebuilt: Rebuilt) -> str | None:
    example = _example(rebuilt)
    if example is None:
        return None
    kind = str(example.dtype).removeprefix("torch.")
    return f"{kind} [{', '.join(['batch', *map(str, example.shape[1:])])}]"


def _example(rebuilt: Rebuilt) -> Tensor | None:
    saved = rebuilt.state.get("canary")
    example = saved["input"] if saved else rebuilt.model.example_input_array
    return example if isinstance(example, Tensor) else None


def _outputs(rebuilt: Rebuilt, example: Any) -> Any:
    """None for a forward that cannot be repeated."""
    sample = canary.canary(rebuilt.model, rebuilt.model.state_dict(), example)
    return sample and sample["output"]


def _texts(rebuilt: Rebuilt) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in describe(rebuilt).items()
    }


# -- weights -------------------------------------------------------------------------------------

Run = Callable[[Any], Any]


def _weights(rebuilt: Rebuilt) -> dict[str, Tensor]:
    """A copy of each weight with storage of its own: not every format takes views."""
    state: Mapping[str, Any] = rebuilt.state["state_dict"]
    return {
        plain_name(name): _copied(value)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _copied(value: Tensor) -> Tensor:
    whole = value.layout is torch.strided and not value.is_quantized
    return value.detach().clone(
        memory_format=torch.contiguous_format if whole else torch.preserve_format
    )


def _write_safetensors(rebuilt: Rebuilt, file: BinaryIO) -> None:
    # Other libraries read "format".
    file.write(
        safetensors.torch.save(_weights(rebuilt), metadata={"format": "pt", **_texts(rebuilt)})
    )


def _write_npz(rebuilt: Rebuilt, file: BinaryIO) -> None:
    weights = _weights(rebuilt)
    strange = [(name, one.dtype) for name, one in weights.items() if not _known_to_numpy(one)]
    if strange:
        name, kind = strange[0]
        raise ConfigError(
            f"npz has no {str(kind).removeprefix('torch.')}: {name} and {len(strange) - 1} more. "
            "The format holds arrays of numpy. Give --format safetensors"
        )
    with zipfile.ZipFile(file, "w") as archive:  # np.savez would refuse some names
        for name, value in weights.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as record:
                np.lib.format.write_array(record, value.numpy(), allow_pickle=False)


def _known_to_numpy(value: Tensor) -> bool:
    floats = (torch.float16, torch.float32, torch.float64)
    return not value.is_quantized and (not value.is_floating_point() or value.dtype in floats)


def _write_state_dict(rebuilt: Rebuilt, file: BinaryIO) -> None:
    torch.save(_weights(rebuilt), file)


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    return safetensors.torch.load(file.read())


def _read_npz(file: BinaryIO) -> dict[str, Tensor]:
    with NpzFile(file, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _read_state_dict(file: BinaryIO) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


def _with(read: Callable[[BinaryIO], dict[str, Tensor]]) -> Callable[[Rebuilt, BinaryIO], Run]:
    def run(rebuilt: Rebuilt, file: BinaryIO) -> Run:
        weights = read(file)
        saved = rebuilt.state["state_dict"]
        wanted = {
            plain_name(name): value for name, value in saved.items() if isinstance(value, Tensor)
        }
        names = list({**weights, **wanted})
        other = [name for name in names if not _equal(weights.get(name), wanted.get(name))]
        if other:
            raise ParityError(
                f"The exported file holds other weights than the checkpoint: {other[0]} and "
                f"{len(other) - 1} more. This format keeps every bit. The file was not kept; try "
                "another --format."
            )
        target = rebuilt.model.state_dict()
        loaded = under_names_of(saved, target) | under_names_of(weights, target)
        rebuilt.model.load_state_dict(loaded, strict=rebuilt.model.strict_loading)
        return lambda example: _outputs(rebuilt, example)

    return run


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and fingerprint(one) == fingerprint(other)


# -- weights and forward -------------------------------------------------------------------------


def _traced(rebuilt: Rebuilt) -> torch.export.ExportedProgram:
    example = _example(rebuilt)
    if example is None:
        raise ConfigError(
            f"No example input: {type(rebuilt.model).__name__} has no example_input_array that is "
            "a tensor. `forward` is traced with it. Set it in the model's __init__, or give "
            "--format safetensors"
        )
    twice = torch.cat([example, example])  # torch would take a batch of one for a constant
    return torch.export.export(
        rebuilt.model, (twice,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )


def _write_pt2(rebuilt: Rebuilt, file: BinaryIO) -> None:
    facts = {"metadata.json": json.dumps(describe(rebuilt))}
    torch.export.save(_traced(rebuilt), file, extra_files=facts)


def _read_pt2(rebuilt: Rebuilt, file: BinaryIO) -> Run:
    # torch.export.load may unpickle: this process has just written the file.
    program = torch.export.load(file).module()

    def run(example: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = program(example)
        return output.float()

    return run


def _write_onnx(rebuilt: Rebuilt, file: BinaryIO) -> None:
    program = torch.onnx.export(
        _traced(rebuilt),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["output"],
        verbose=False,
        # Optimizing folds batch norms into convolutions, which changes the weights; the runtime
        # does it anyway.
        optimize=False,
    )
    assert program is not None
    program.model.metadata_props.update(_texts(rebuilt))
    file.write(program.model_proto.SerializeToString())


def _read_onnx(rebuilt: Rebuilt, file: BinaryIO) -> Run:
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
