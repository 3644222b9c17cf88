"""Federated training with Flower: a run whose config has a group `federated`.

Flower is optional and imported below this package alone. `federation`, `partition` and `clients`
need neither Flower nor torch.
"""
