"""What a mirror is told to do: the keys `checkpoint.mirror*` of a config."""

from dataclasses import dataclass, field

from savepoint.checkpoint.retention import Retention
from savepoint.errors import ConfigError


@dataclass(frozen=True)
class Mirroring:
    """Attributes: as `CheckpointCallback` takes them, without `mirror_`."""

    url: str
    every: int = 1
    keep_last: int = 2
    keep_best: int = 1
    grace_secs: float = 90
    retention: Retention = field(init=False)

    def __post_init__(self) -> None:
        if self.every < 1 or self.grace_secs < 0:
            name = "mirror_every" if self.every < 1 else "mirror_grace_secs"
            value = self.every if self.every < 1 else self.grace_secs
            raise ConfigError(
                f"checkpoint.{name} is {value}. Expected 1 or more uploads, or 0 or more seconds."
            )
        kept = Retention(keep_last=self.keep_last, keep_best=self.keep_best)
        object.__setattr__(self, "retention", kept)
