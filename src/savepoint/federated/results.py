"""What other programs read of a federated run, as JSON: derived from its newest checkpoint, and
written after it.

    results.json    a row a round, with the keys of Flower's advanced PyTorch example, then ours:
                    `clients`, those that trained, and `failures`;
                    a NaN is the text "nan"
    config.json     what that example calls the run config
    clients.json    each client: its samples, how many of each label, and its newest metrics
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from savepoint import files
from savepoint.federated.federation import Federation
from savepoint.words import plain

NAMES = ("results.json", "config.json", "clients.json")


def write(
    directory: Path,
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    clients: Mapping[str, Any],
) -> None:
    """Raises OSError. A crash in here costs nothing: the next start writes them again."""
    rows = ",\n".join(json.dumps(row) for row in plain(history))
    texts = (f"[\n{rows}\n]", json.dumps(config, indent=2), json.dumps(plain(clients)))
    for name, text in zip(NAMES, texts, strict=True):
        with files.rewriting(directory / name) as file:
            file.write((text + "\n").encode())


def run_config(federation: Federation, lr: float, batch_size: int | None) -> dict[str, Any]:
    return {
        "num-server-rounds": federation.num_server_rounds,
        "fraction-train": federation.fraction_train,
        "fraction-evaluate": federation.fraction_evaluate,
        "local-epochs": federation.local_epochs,
        "lr": lr,
        "lr-decay": federation.lr_decay,
        "batch-size": batch_size,
        "num-clients": federation.num_clients,
        "strategy": federation.strategy,
        "partitioner": federation.partitioner,
        "personal": federation.personal,
    }


def described_clients(
    counts: Any, names: Sequence[str], measured: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """`labels`: their names; `clients`: a row each."""
    rows = [
        {
            "client": client,
            "samples": int(row.sum()),
            "labels": row.tolist(),
            **measured.get(client, {"round": None, "metrics": {}}),
        }
        for client, row in enumerate(counts)
    ]
    return {"labels": list(names), "clients": rows}
