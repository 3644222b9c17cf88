"""A file that version 0.1 of the library has written is resumed by the code of today."""

import shutil
from pathlib import Path

import torch
from support.programs import ROOT, go
from support.run_dirs import latest
from support.small import difference

import project  # noqa: F401
from savepoint.checkpoint import store

# One run of eight steps on the embedded digits, stopped inside its first epoch, and at its end.
OLD = ROOT / "tests" / "files" / "of-0.1"


def test_a_checkpoint_of_the_version_before_ends_as_that_version_ended(tmp_path: Path) -> None:
    file = shutil.copy(OLD / "step-00000003.ckpt", tmp_path)
    with_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert go(file, "--output_dir", str(tmp_path), "--fork", "again") == 0
    finally:
        torch.set_num_threads(with_threads)
    was, facts = store.load(OLD / "step-00000008.ckpt")
    now, _ = store.load(latest(tmp_path / "again").path)
    assert now["global_step"] == was["global_step"] == 8
    if facts["versions"]["torch"] != torch.__version__:
        return  # another torch may compute otherwise
    for part in ("lr_schedulers", "rng", "best_accuracy"):
        assert list(difference(was[part], now[part], part)) == []
    # The last bits of a sum are the processor's, and the file does not say which one it was.
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(now[part], was[part], rtol=1e-4, atol=1e-6)
