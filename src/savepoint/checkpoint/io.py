"""The Lightning plugin that makes `trainer.save_checkpoint` as durable as the store's saves, at
once or in a thread.
"""

import contextlib
import copy
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO as LightningCheckpointIO
from torch import Tensor

from savepoint import files
from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import CheckpointContentError, CheckpointForeignError, ConfigError


class CheckpointIO(LightningCheckpointIO):
    """Saves and loads Savepoint's checkpoints; a drop-in for Lightning's own `TorchCheckpointIO`.

    A checkpoint's key `manifest` holds its facts and is taken out; without it they are made from
    what Lightning counts.

    Args:
        async_save: copy the state to the CPU and write it in one thread while training goes on. A
            second save waits for the first. What fails in the thread is raised in the caller's by
            `raise_pending`, `wait`, or the next save.

    Attributes:
        store: set by the callback: a save under one of its names makes room on a full disk by its
            retention.
        finish: called once, with the next checkpoint as it is to be written.
        preloaded: path and state of a checkpoint that was read and verified already; the next load
            of that path takes it.
    """

    def __init__(self, async_save: bool = False) -> None:
        self.async_save = async_save
        self.store: CheckpointStore | None = None
        self.preloaded: tuple[Path, dict[str, Any]] | None = None
        self.finish: Callable[[dict[str, Any]], None] | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._save: Future[None] | None = None
        self._queued: list[Future[None]] = []
        self._snapshot = _Snapshot()

    def ready(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None
    ) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
        """Where a checkpoint of Lightning's goes, its state and its facts."""
        if storage_options is not None:
            raise TypeError(
                "`Trainer.save_checkpoint(..., storage_options=...)` is not supported by "
                f"{type(self).__name__}: {storage_options}. None was expected. Save to a local "
                "path."
            )
        finish = self.finish
        self.finish = None
        if finish and "manifest" in checkpoint:
            finish(checkpoint)
        facts = checkpoint.get("manifest") or _facts(checkpoint)
        state = {key: value for key, value in checkpoint.items() if key != "manifest"}
        files.refuse_url(path, "the file to save")
        return manifest.local_path(path), state, facts

    def store_of(self, path: Path, facts: Mapping[str, Any]) -> CheckpointStore | None:
        """The store, for a save under one of its names."""
        return self.store if self.store and path == self.store.path(facts["step"]) else None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None
    ) -> None:
        path, state, facts = self.ready(checkpoint, path, storage_options)
        if not self.async_save:
            self._write(path, state, facts)
            return
        copied = self.copied(state)
        self.write_later(lambda: self._write(path, copied, facts))

    def copied(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """`state` as it is now, for a thread to write. It overwrites the copy before it, once that
        is written.

        Raises:
            CheckpointContentError: a value that could not be read back.
        """
        self.settle()
        format.check_readable(state)  # here, where the caller can see the error
        return self._snapshot.take(state)

    def settle(self) -> None:
        """Returns once the save before is written, or has failed.

        Its error stays pending: a save that failed must not keep the next from being made. Any
        other error is raised, such as that of a rank which is gone: what the ranks do next together
        would wait for it.
        """
        if self._save is None:
            return
        error = self._save.exception()
        if error is not None and not isinstance(error, OSError | CheckpointContentError):
            raise error

    def write_later(self, save: Callable[[], None]) -> None:
        """Calls `save` in the writer's thread; raises what failed there before."""
        self._save = self._enqueue(save)
        self.raise_pending()

    def load_checkpoint(
        self,
        path: Path | str,
        map_location: Any | None = None,
        weights_only: bool | None = None,
        *,
        whole: bool = True,
    ) -> dict[str, Any]:
        """A checkpoint of ours after a look at every byte; a file of stock Lightning as it is, by
        the safe loader.

        Args:
            whole: See `store.load`.
        """
        if weights_only is False:
            raise ConfigError(
                f"An unsafe load was asked for: {path} with weights_only=False. Files are loaded "
                "as plain values and tensors only, as a file could run any program otherwise. "
                "Leave weights_only out."
            )
        if self._queued:
            wait(self._queued)
        location = "cpu" if map_location is None else map_location
        preloaded = self.preloaded
        self.preloaded = None
        if preloaded and preloaded[0] == Path(path) and location == "cpu":
            return self._filled(*preloaded) if whole else preloaded[1]
        try:
            return store.load(path, map_location=location, whole=whole)[0]
        except CheckpointForeignError:
            from savepoint.checkpoint import foreign

            return foreign.load_plain(path, map_location=location)

    @staticmethod
    def _filled(path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """The whole of what was read already: of a checkpoint in parts, this was not its shards."""
        if not manifest.has_parts(path):
            return state
        from savepoint.sharded import pieces

        return pieces.assembled(path, manifest.read(path), state)

    def remove_checkpoint(self, path: Path | str) -> None:
        target = manifest.local_path(path)
        self.submit(lambda: files.remove(target))

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` now or, where saves are asynchronous, in the writer's thread after the saves
        before it.

        It is left out if the save just before it failed: what relies on the new checkpoint must not
        happen without it.
        """
        if not self.async_save:
            job()
            return
        save = self._save
        self._enqueue(lambda: job() if save is None or save.exception() is None else None)

    def raise_pending(self) -> None:
        """Raise the first error of the writer's thread that no one has seen. Does not wait."""
        while self._queued and self._queued[0].done():
            self._queued.pop(0).result()

    def wait(self) -> None:
        """Return when all is written; raise the first error that no one has seen."""
        wait(self._queued)
        self.raise_pending()

    def teardown(self) -> None:
        if self._writer:
            self._writer.shutdown(wait=True)
            self._writer = None
        self.raise_pending()

    def _enqueue(self, job: Callable[[], None]) -> Future[None]:
        # The pool's thread is no daemon: the interpreter waits for it before it ends, so no save is
        # cut off.
        self._writer = self._writer or ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint-writer", initializer=_step_back
        )
        future = self._writer.submit(job)
        self._queued.append(future)
        return future

    def _write(self, path: Path, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if own := self.store_of(path, facts):
            own.write(state, facts)
        else:
            store.write(path, state, facts)


def _step_back() -> None:
    """The thread of this call takes the time that training leaves: on two cores a step would wait
    for it otherwise.
    """
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class _Snapshot:
    """Copies of states in CPU memory, in buffers that are kept from one copy to the next."""

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []

    def take(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """`state` as it is now; overwrites the copy before it. Tensors that share memory share it
        in the copy too.
        """
        used: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}
        # deepcopy takes what its memo holds as copied already: our tensors. It copies the rest,
        # shared parts once.
        memo = {
            id(leaf): self._copy(leaf, used)
            for _, leaf in format.leaves(state)
            if isinstance(leaf, Tensor) and not leaf.is_meta  # it has no bytes
        }
        copied = copy.deepcopy(state, memo)
        if any(device.type == "cuda" for device, *_ in used):
            torch.cuda.synchronize()  # the copies from the GPU were only started
        self._buffers = list(used.values())
        return copied

    def _copy(
        self, tensor: Tensor, used: dict[tuple[torch.device, int, int], torch.UntypedStorage]
    ) -> Tensor:
        plain = tensor.detach()
        if (
            plain.layout is not torch.strided
            or plain.is_quantized
            or plain.is_conj()
            or plain.is_neg()
        ):
            return plain.clone().cpu()
        source = plain.untyped_storage()
        key = (source.device, source.data_ptr(), source.nbytes())
        if key not in used:
            used[key] = self._buffer(len(used), source)
            used[key].copy_(source, non_blocking=source.is_cuda)
        view = torch.empty(0, dtype=plain.dtype)
        view.set_(used[key], plain.storage_offset(), plain.shape, plain.stride())
        result = torch.nn.Parameter(view) if isinstance(tensor, torch.nn.Parameter) else view
        result.__dict__.update(vars(tensor))
        return result.requires_grad_(tensor.requires_grad)

    def _buffer(self, place: int, source: torch.UntypedStorage) -> torch.UntypedStorage:
        if place < len(self._buffers) and self._buffers[place].nbytes() == source.nbytes():
            return self._buffers[place]
        # Pinned memory is what a GPU can copy to while it computes.
        return torch.empty(
            source.nbytes(), dtype=torch.uint8, pin_memory=source.is_cuda
        ).untyped_storage()


def _facts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """For a checkpoint that no callback of ours has seen: what Lightning counts, and that it is not
    exact.
    """
    return {
        "step": checkpoint.get("global_step", 0),
        "epoch": checkpoint.get("epoch", 0),
        "at": None,
        "exact": False,
        "metrics": {},
        "monitor": None,
        "score": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
    }
