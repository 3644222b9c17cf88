"""Batches whose order is a function of (seed, epoch) and whose position is state.

Two loaders keep the same promises, `Batches` (tensors held whole) and `ResumableLoader` (a
DataLoader with workers):

- Nothing happens before the first `next()`. Lightning calls `iter()` before `set_epoch()` and not
  again on a resume, so an order fixed in `iter()` would replay epoch 0.
- `state_dict()` is the epoch and the number of batches handed out; `load_state_dict()` goes on
  behind them.
- No draw from a generator of the training, so that building an iterator anew after a resume shifts
  nothing. What a sampler, a sample or a collate function draws comes from generators that are
  seeded from (seed, epoch), (seed, epoch, index) and (seed, epoch, first index of the batch): the
  global ones, and those that they own.

`len()` is that of the whole epoch, also after a resume.
"""
