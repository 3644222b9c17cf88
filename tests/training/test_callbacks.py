"""Each callback that a config switches on, in a whole run: stopped in its middle and resumed, it
equals the straight one.
"""

from pathlib import Path

import pytest
from support.programs import ROOT, call
from support.programs import SIX_AN_EPOCH as SMALL
from support.small import difference, final_state, one_thread, rows
from support.stopping import handlers  # noqa: F401  (handlers is a fixture)

CONFIGS = [
    *sorted((ROOT / "configs/callbacks").glob("*.yaml")),
    ROOT / "configs/debug/profile.yaml",
]
# lr_finder.yaml looks at 100 batches before the run, which has to be long enough for them.
MORE = [
    "--trainer.limit_train_batches",
    "40",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.max_epochs",
    "2",
]


@pytest.mark.slow  # a quick one of each config is in test_project.py
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_callback_that_a_config_switches_on_resumes_exactly(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    saving = ["--checkpoint.save_every_steps", "7", "--checkpoint.keep_every_n_steps", "1"]
    command = ["--config", str(config), *SMALL, *MORE, *saving, "--output_dir", str(tmp_path)]
    with one_thread():
        assert call("train.py", *command, "--run_name", "straight") == 0
        straight, logged = final_state(tmp_path / "straight"), rows(tmp_path / "straight")
        middle = tmp_path / "straight/checkpoints/step-00000049.ckpt"
        assert call("resume.py", str(middle), "--rewind") == 0
    assert list(difference(straight, final_state(tmp_path / "straight"))) == []
    assert logged == rows(tmp_path / "straight")
    assert list((tmp_path / "straight/rewound").glob("*/step-*.ckpt"))
