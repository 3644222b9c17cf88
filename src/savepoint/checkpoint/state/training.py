"""One training from its start to its end: what it changes beside Lightning's own checkpoint goes
into its files, and is put back at the very point where it was.
"""

import copy
import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from savepoint.checkpoint.state import (
    capture,
    elastic,
    exactness,
    loops,
    making,
    merging,
    ranks,
    reenter,
    start,
    validation,
)
from savepoint.checkpoint.state.points import Point
from savepoint.checkpoint.state.roots import by_worker, held, kept, look
from savepoint.look.baseline import Baseline, changed_since, sums_of_numbers
from savepoint.look.places import in_words, path_of
from savepoint.look.walk import Before, Look

_DRAWN_ANEW = "other numbers than when the training began: seed_everything before they are made"


class TrainingState:
    """The state of one `Trainer.fit`, made in the callback's `setup`; `release` ends it.

    Attributes:
        rates_are_overridden: By the user, on this resume: the optimizers keep their new rates.
        ranks_changed: Why the epoch that now runs, begun by another number of processes, is not
            what they would have made of it.
        captured: The state at the start of the running validation, or at the end of the training.

    Args:
        in_parts: Whether each rank writes its own part of a checkpoint.
    """

    def __init__(self, trainer: Trainer, *, in_parts: bool = False) -> None:
        self.trainer = trainer
        self.in_parts = in_parts
        self.rates_are_overridden = False
        self.ranks_changed: list[str] = []
        self.captured: dict[str, Any] | None = None
        self._before = Before()  # of the newest look
        self._baseline: Baseline | None = Baseline(self._look())
        self._pending: dict[str, Any] | None = None  # until the point of the checkpoint is reached
        self._versions: dict[str, Any] = {}
        # At the start, to be compared with: these may change, and Lightning does not save them.
        self._bounds: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}
        self._groups: list[int] = []
        self._shared: list[tuple[Any, Any, str]] = []
        self._accepted = False
        self._reads_gradients = (False, False)
        self._metric_defaults: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}
        self._drawn_anew: list[str] = []
        self._held: dict[Any, Any] = {}  # what the running epoch goes by
        self._making = making.Making(trainer, lambda: self._looked_at)
        self._loader_states: list[Any] | None = None  # before the batch that was fetched in advance
        self._before_validation: dict[str, Any] = {}
        self._last_weights: dict[str, Tensor] | None = None

    @property
    def is_resuming(self) -> bool:
        """Whether the point of the checkpoint is still ahead."""
        return self._pending is not None

    # -- the start --------------------------------------------------------------------------------

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Takes what the callback's `on_load_checkpoint` is given."""
        trainer = self.trainer
        rank = trainer.global_rank
        others = checkpoint.get("other_ranks", [])
        was = len(others) + 1
        promised = checkpoint.get("elastic")
        if was != trainer.world_size and promised is None:
            # Until an epoch begins anew by (seed, epoch) alone, nobody can make this training
            # again, from no file of it.
            self.ranks_changed = [ranks.OTHER_SAMPLES]
            if trainer.is_global_zero:
                print(ranks.ranks_changed(was, trainer.world_size), flush=True)
            return
        own = others[rank - 1] if 0 < rank < was else {}
        if promised is not None:
            reasons = elastic.reasons(trainer, checkpoint, was)
            if was != trainer.world_size:
                owns = [checkpoint, *others]
                own, unmerged = merging.merged(
                    owns, trainer.lightning_module, rank, trainer.world_size
                )
                reasons += unmerged
                merging.scale_loops(checkpoint["loops"]["fit_loop"], was, trainer.world_size)
            self.add_reasons(reasons)
            if was != trainer.world_size and trainer.is_global_zero:
                print(ranks.shared_anew(was, trainer.world_size, reasons), flush=True)
        self._pending = checkpoint | own
        self._pending["versions"] = exactness.versions(trainer.lightning_module)
        own_loaders = self._pending.get("loaders")
        if own_loaders is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = own_loaders
        self._making.as_then = making.of_file(self._pending)
        start.skip_finders(trainer, self._pending.get("found", {}))
        # Up to the point of the checkpoint, whatever is logged stands in the log of the start
        # before.
        self._mute()

    def add_reasons(self, reasons: list[str] | bool) -> None:
        """`ranks_changed` of an older file is true or false."""
        if isinstance(reasons, bool):
            reasons = [ranks.OTHER_SAMPLES] * reasons
        self.ranks_changed += [one for one in reasons if one not in self.ranks_changed]

    def prepare(self) -> None:
        """In `on_fit_start`: what the hooks before have made belongs to the start."""
        trainer = self.trainer
        self._bounds = loops.bounds(trainer)
        self._groups = capture.group_counts(trainer)
        self._shared = reenter.shared_groups(trainer)
        if self._pending:
            start.prepare(trainer, self._pending)
            start.add_groups(trainer, self._pending.get("groups", {}))
        start.wake_finders(trainer)
        self._looked_at.begin(self._look())

    def prepare_late(self) -> None:
        """Where the strategy loads after `on_fit_start`: what `prepare` did not do there."""
        if self._pending:
            start.prepare(self.trainer, self._pending)
            start.add_groups(self.trainer, self._pending.get("groups", {}))

    def begin(self) -> None:
        """In `on_train_start`."""
        self._versions = exactness.versions(self.trainer.lightning_module)
        ranks.lay_buckets(self.trainer)
        if self._pending:
            reenter.load_waiting_states(self.trainer)
        loops.run_in_order(self.trainer)
        elastic.stretch_schedules(self.trainer)
        self._accepted = False

    def release(self) -> None:
        self._baseline = None
        self._before = Before()
        self._making.remove()
        self._unmute()

    # -- the points -------------------------------------------------------------------------------

    def begin_epoch(self) -> bool:
        """Whether this is the point of the checkpoint; then everything was put back."""
        if not self.trainer.fit_loop.restarted_mid_epoch:
            self.ranks_changed = []
        self._accept()
        return self.arrive("epoch")

    def arrive(self, at: Point) -> bool:
        """Puts everything back, if this is the very point of the checkpoint."""
        if not self._pending or self._pending["at"] != at:
            return False
        saved = self._pending
        self._pending = None
        if "validation" in saved.get("loaders_made", {"validation": None}):
            loops.set_up_validation(self.trainer)
        failed = reenter.reenter(self.trainer, saved, self._looked_at, self.see())
        if not self.rates_are_overridden:
            reenter.put_groups_back(self.trainer, saved)
        reenter.share_again(self._shared)
        if at != "batch":  # hooks run before the loader is asked
            loops.keep_workers(self.trainer)
        self._unmute()
        if failed and self.trainer.is_global_zero:
            print(
                f"Not restored: {', '.join(failed)}. The code that made the checkpoint kept "
                "another kind of value there.",
                file=sys.stderr,
                flush=True,
            )
        return True

    def begin_pass(self) -> None:
        """Before the first batch of an epoch, or of what a resume has left of it."""
        self._held = held(self.trainer, self._held)

    def fetch_next(self) -> None:
        self._loader_states = loops.states_before_prefetching(self.trainer)

    def begin_validation(self) -> None:
        self.set_up_validation()
        # A copy: the validation that begins here changes it.
        self.captured = copy.deepcopy(self.capture("validation"))
        self._before_validation = validation.before_validation(self.trainer)
        if self._loader_states is not None:
            of_loop = self._before_validation["fit_loop"]["state_dict"]
            of_loop["combined_loader"] = self._loader_states

    def set_up_validation(self) -> None:
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        validation.seed_validation(self.trainer)

    def keep_end(self) -> None:
        """Before the hooks of others at the end of the training: one that goes on longer never had
        them here.
        """
        self.captured = copy.deepcopy(self.capture("epoch"))
        if loops.averaging(self.trainer):  # which overwrites them for good
            self._last_weights = validation.copied_weights(self.trainer.lightning_module)

    # -- the file ---------------------------------------------------------------------------------

    def fill(self, checkpoint: dict[str, Any], at: Point | None, ended: str | None) -> list[str]:
        """Puts into Lightning's checkpoint what it leaves out.

        Args:
            at: The point; None where there is none.
            ended: Which limit ended the training.

        Returns:
            Words for what makes a resume inexact.
        """
        trainer = self.trainer
        fit_loop = checkpoint["loops"]["fit_loop"]
        if self.captured is not None and (at == "validation" or ended):
            own = {**self.captured, "unsaved": list(self.captured["unsaved"])}
        else:
            own = self.capture(at)
        if at == "validation":
            own["unsaved"] += validation.as_before_validation(
                trainer, checkpoint, self._before_validation
            )
        elif at == "batch" and self._loader_states is not None:
            fit_loop["state_dict"]["combined_loader"] = self._loader_states
        if ended and not loops.at_end_of_epoch(trainer):
            own["unsaved"].append(f"ended by {ended} inside an epoch, which counts as done")
        if ended and self._last_weights is not None:
            checkpoint["current_model_state"] = self._last_weights
        reasons = [own.pop("unsaved")]
        if trainer.world_size > 1:
            reasons = ranks.gathered(trainer, reasons[0])
            reasons.append(ranks.unequal_weights(trainer))
            if not self.in_parts:
                own, *checkpoint["other_ranks"] = ranks.gathered(trainer, own)
            elif trainer.global_rank:
                checkpoint["own"] = own  # for its shard
            if not (self.in_parts and trainer.global_rank):
                own = {key: value for key, value in own.items() if key != "buffers"}
                # those of the first rank stand in its state_dict
        unsaved = dict.fromkeys(reason for of_rank in reasons for reason in of_rank)
        checkpoint.update(own)
        checkpoint["at"] = at
        promised = elastic.promise(trainer)
        if promised is not None:
            checkpoint["elastic"] = promised
        # Lightning logs every step while it is set. Of a run that has ended it is no state: it may
        # be asked to go on.
        checkpoint["should_stop"] = trainer.should_stop and not ended
        return list(unsaved)

    def left_out(self, weights: Mapping[str, Any]) -> list[str]:
        """Words for changed weights that are not in the file's `weights`."""
        return exactness.left_out(self.trainer.lightning_module, weights, self._versions)

    def capture(self, at: Point | None) -> dict[str, Any]:
        trainer = self.trainer
        module = trainer.lightning_module
        own = capture.capture(trainer, module, self._reads_gradients, self._metric_defaults)
        own |= self._logged()
        own["unsaved"] = exactness.inexact(trainer, at)
        own["unsaved"] += self.ranks_changed
        own["unsaved"] += self._drawn_anew
        own["unsaved"] += capture.changed_defaults(module, self._metric_defaults)
        own["numbers"] = self._numbers
        own["attributes"] = []
        own["settings"] = {}
        if self._baseline is not None:
            now = self.see()
            own["attributes"], named = self._baseline.changes(now)
            marks = kept(trainer, now, self._held) if at == "epoch" else self._held
            own["unsaved"] += [*named, *changed_since(marks, now)]
            if at != "epoch":
                own["unsaved"] += by_worker(trainer, now)
            if self._accepted:
                own["unsaved"] += capture.other_kinds(trainer, now, self._kinds)
            own["settings"] = self._changed_settings()
        if trainer.world_size > 1:
            ahead = at != "epoch" and self._loader_states is not None
            own["loaders"] = self._loader_states if ahead else loops.loader_states(trainer)
            own |= capture.own_rank(trainer)
        own["found"] = capture.found(trainer)
        own["loaders_made"] = dict(self._making.made)
        own["groups"] = capture.grown_groups(trainer, self._groups)
        return own

    def _changed_settings(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in loops.settings(self.trainer).items()
            if value != self._settings.get(name, value)
        }

    # -- the look ---------------------------------------------------------------------------------

    @property
    def _looked_at(self) -> Baseline:
        assert self._baseline is not None  # until `release`
        return self._baseline

    def see(self) -> Look:
        """Looks; what is seen for the first time is as it was at the start."""
        now = self._look()
        self._looked_at.meet(now)
        return now

    def _look(self) -> Look:
        now = look(self.trainer, self._before)
        self._before = now.for_next
        return now

    def _accept(self) -> None:
        """All hooks that run before the first batch have run: what they have made, a resumed
        process makes too.
        """
        if self._accepted:
            return
        self._accepted = True
        self._settings = loops.settings(self.trainer) | self._bounds
        now = self.see()
        self._kinds = capture.kinds(self.trainer, now)
        self._metric_defaults = capture.metric_defaults(self.trainer.lightning_module)
        self._reads_gradients = capture.reads_gradients(now)
        self._looked_at.accept(now)
        self._compare_numbers(now)

    def _compare_numbers(self, now: Look) -> None:
        """Without a seed a start draws splits, data or random features anew: a resume says so."""
        self._numbers = sums_of_numbers(now)
        then = (self._pending or {}).get("numbers")
        if self._pending is None or then is None:
            return
        made = making.of_file(self._pending).get("training", {"of": []})
        captured = [*self._pending.get("attributes", []), *made["of"]]
        restored = {in_words(path_of(packed)) for packed, _ in captured}
        names = [name for name in then.keys() & self._numbers.keys() if name not in restored]
        other = sorted(name for name in names if then[name] != self._numbers[name])
        self._numbers = then
        self._drawn_anew = [f"{name} ({_DRAWN_ANEW})" for name in other]
        if other and self.trainer.is_global_zero:
            print(f"Not exact: {'; '.join(self._drawn_anew[:5])}.", flush=True)

    # -- the log ----------------------------------------------------------------------------------

    def _logged(self) -> dict[str, Any]:
        """How much stands in the logs of a run."""
        loggers = self.trainer.loggers if self.trainer.is_global_zero else []
        rows = (logger.rows for logger in loggers if hasattr(logger, "rows"))
        events = (logger.counted() for logger in loggers if hasattr(logger, "counted"))
        return {"logged_rows": next(rows, None), "events": next(events, None)}

    def _mute(self) -> None:
        for logger in self.trainer.loggers:
            vars(logger)["log_metrics"] = _log_nothing
            if hasattr(logger, "muted"):
                logger.muted = True

    def _unmute(self) -> None:
        for logger in self.trainer.loggers:
            vars(logger).pop("log_metrics", None)
            if hasattr(logger, "muted"):
                logger.muted = False


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In a logger's place until a resume has reached the point of its checkpoint."""
