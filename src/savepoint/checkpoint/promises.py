"""What a resume promises, by the processes it has: the same sentences in the plan, in `show` and in
docs/clusters.md. Standard library only.
"""

from collections.abc import Iterator, Mapping
from typing import Any

SAME_SAMPLES = "same samples"
SAME_BITS = "same bits"

AS_MANY = "on as many processes: the same bits"
ELSEWHERE = {
    None: "on another number of processes: refused, as they would see other samples",
    SAME_SAMPLES: (
        "on another number of processes: the same samples and rates at each step, not the same bits"
    ),
    SAME_BITS: "on another number of processes: the same bits of weights and optimizers",
}
"""By what a manifest says under `elastic`."""


def promises(facts: Mapping[str, Any]) -> Iterator[str]:
    """What holds for a resume from the checkpoint of these facts."""
    if facts["exact"]:
        yield AS_MANY
    yield ELSEWHERE.get(facts.get("elastic"), ELSEWHERE[None])
