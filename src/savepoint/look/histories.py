"""Whether a gradient can still go back from a tensor that is kept with its history."""

from typing import Any

from torch import Tensor

_MOST_NODES = 200


def is_spent(tensor: Tensor) -> bool:
    """Whether each way back ends where `backward` would raise: values that a backward pass has
    freed, or weights that a step has written to. Then only the numbers count.
    """
    return _is_cut(tensor.grad_fn, set())


def _is_cut(node: Any, met: set[Any]) -> bool:
    met.add(node)
    if len(met) > _MOST_NODES:
        return False
    if _raises(node):
        return True
    following = [one for one, _ in node.next_functions if one is not None]
    # A leaf has none: the gradient has arrived.
    return bool(following) and all(_is_cut(one, met) for one in following)


def _raises(node: Any) -> bool:
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        try:
            raw = getattr(node, name)
            # Hooks would compute anew, as those of activation checkpointing do.
            parts = raw if isinstance(raw, list | tuple) else [raw]
            if all(getattr(part, "unpack_hook", raw) is None for part in parts):
                getattr(node, "saved_tensors" if name == "_raw_saved_tensors" else name[4:])
        except RuntimeError:
            return True
    return False
