"""Random generators of any kind: their states, read, set and derived."""

import random
from typing import Any

import numpy as np
import torch

GENERATORS = (
    random.Random,
    np.random.Generator,
    np.random.BitGenerator,
    np.random.RandomState,
    torch.Generator,
)


def is_generator(value: Any) -> bool:
    return isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """The state as the generator's own module gives it."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.get_state()


def restore_generator(generator: Any, state: Any) -> None:
    """Takes back what `generator_state` gave."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)


def seed_generator(generator: Any, seed: int) -> None:
    """A state that is a function of `seed` alone, whatever the generator has drawn."""
    if isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = type(generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        generator.manual_seed(seed)


def seeds_of(generator: Any) -> Any:
    """What counts the children that NumPy's generators have spawned."""
    return getattr(getattr(generator, "bit_generator", generator), "seed_seq", None)
