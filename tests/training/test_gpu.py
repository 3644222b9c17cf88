"""A checkpoint made on a GPU goes on without one, and back. Needs an accelerator: `make test
ARGS="-m gpu"`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import EveryPoint, SmallModel, fit, resume_differs

from savepoint.checkpoint import store

pytestmark = pytest.mark.gpu


def check_canary(file: Path, device: str) -> None:
    state, _ = store.load(file)
    model = SmallModel().to(device).eval()
    model.load_state_dict(state["state_dict"])
    with torch.no_grad():
        output = model(state["canary"]["input"].to(device)).cpu()
    torch.testing.assert_close(output, state["canary"]["output"], rtol=1e-4, atol=1e-5)


def test_a_run_goes_from_gpu_to_cpu_and_back(tmp_path: Path) -> None:
    last = None
    for epochs, accelerator in ((1, "gpu"), (2, "cpu"), (3, "gpu")):
        work = tmp_path / f"{epochs}"
        fit(work, accelerator=accelerator, devices=1, max_epochs=epochs, ckpt_path=last)
        last = work / "checkpoints" / "last.ckpt"
        for device in ("cpu", "cuda"):
            check_canary(last, device)
    assert last is not None
    assert store.load(last)[0]["global_step"] == 18


@pytest.mark.parametrize("arguments", [{}, {"precision": "16-mixed"}, {"precision": "bf16-mixed"}])
def test_resumes_on_a_gpu_are_exact_with_deterministic_algorithms(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    case = {"accelerator": "gpu", "devices": 1, "deterministic": True, **arguments}
    keep = EveryPoint(tmp_path / "kept", mode="min", monitor="val/loss", async_save=bool(arguments))
    fit(tmp_path / "straight", checkpointing=keep, **case)
    for file in keep.kept[:-1:4]:
        assert resume_differs(tmp_path / "straight", file, tmp_path / "resumed", **case) == [], (
            file.name
        )
