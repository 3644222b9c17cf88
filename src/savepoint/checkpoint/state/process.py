"""This process: its random states, versions, threads, processor and device."""

import hashlib
import json
import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning
import numpy as np
import torch

import savepoint


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The random states of this process: python, numpy, torch on the CPU and, where there is one,
    on the accelerator.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        # One tensor: as 625 numbers they would take longer to pickle than all the rest of a small
        # checkpoint.
        "python": [version, torch.from_numpy(np.array(words)), gauss],
        # Seen as int32: torch.save takes uint32, but plain pickle, with which ranks exchange this,
        # does not.
        "numpy": [
            name,
            torch.from_numpy(np.array(keys).view(np.int32)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
        "accelerator": None
        if device.type == "cpu"
        else torch.get_device_module(device).get_rng_state(),
    }


def restore_rng(rng: Mapping[str, Any], device: torch.device) -> None:
    """Puts `capture_rng`'s result back. A state of an accelerator that is not there is left out."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(torch.as_tensor(words).tolist()), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.cpu().numpy().view(np.uint32), *rest))
    torch.set_rng_state(rng["torch"].cpu())
    if rng["accelerator"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(rng["accelerator"].cpu())


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Keeps what draws inside from being noticed outside: a save disturbs no training."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    before = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    on_device = accelerator and accelerator.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if accelerator:
            accelerator.set_rng_state(on_device)


@cache
def processor() -> str:
    """The processor's name and what it can do: its instruction sets and the sizes of its caches
    choose the kernels, and another kernel adds in another order.
    """
    able = torch.cpu.get_capabilities()
    name = able.get("cpu_name", platform.machine())
    kernels = {key: value for key, value in able.items() if not key.startswith("num_")}
    digest = hashlib.sha256(json.dumps(kernels, sort_keys=True).encode()).hexdigest()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {digest[:8]})"


def environment(device: torch.device) -> dict[str, Any]:
    """What a resume says when it differs, and never refuses: bit equality needs the same."""
    return {
        "versions": {
            "savepoint": savepoint.__version__,
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "device": device.type
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_name(device),
    }
