"""Checkpoints in parts, where a strategy spreads the state over the ranks: each rank writes and
reads its own, on any number of ranks.

pieces      which part of a tensor a rank holds, and a tensor from its parts
together    what all ranks do together: a failure of one is a failure of all
saving      the directory of a checkpoint, from its first shard to its name
strategy    Lightning's strategy that saves and loads in this way
"""
