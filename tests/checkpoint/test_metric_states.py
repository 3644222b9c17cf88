"""Metrics that are as after a reset are not in a file; what they reset to is watched."""

import torch
from lightning.pytorch import LightningModule
from torchmetrics import MeanMetric

from savepoint.checkpoint.state.capture import changed_defaults, metric_defaults
from savepoint.checkpoint.state.reenter import restore_metric_states


class Measured(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()


def test_a_metric_that_is_not_in_a_file_is_as_after_its_reset() -> None:
    module = Measured()
    module.mean.update(3.0)
    restore_metric_states(module, {"metric_states": {}})
    assert module.mean._update_count == 0
    assert torch.equal(module.mean.mean_value, torch.tensor(0.0))
    module.mean.update(5.0)
    module.mean.reset()
    assert torch.equal(module.mean.mean_value, torch.tensor(0.0))


def test_another_state_to_reset_to_is_named() -> None:
    module = Measured()
    start = metric_defaults(module)
    module.mean.update(3.0)
    module.mean.reset()
    assert changed_defaults(module, start) == []
    module.mean._defaults["mean_value"].add_(1)
    assert "model.mean (another state to reset to" in changed_defaults(module, start)[0]
