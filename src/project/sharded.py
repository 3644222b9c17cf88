"""The images' model, spread over several processes: each holds a part of every weight and of the
optimizer's state (FSDP2), and `configs/sharded.yaml` is its run.
"""

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from project.model import ImageClassifier


class ShardedClassifier(ImageClassifier):
    """As `ImageClassifier`; one process holds all of it, whatever the training was spread over."""

    def configure_model(self) -> None:
        # Lightning calls it again before a test.
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        self.net.to(memory_format=torch.contiguous_format)  # other layouts cannot be cut into parts
        for layer in self.net.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
