"""The runs that several modules look at."""

import importlib.util
import warnings

if importlib.util.find_spec("flwr") is not None:
    with warnings.catch_warnings(action="ignore"):  # Flower's own imports warn of what they use
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp.strategy  # noqa: F401
    from support.rounds import straight  # noqa: F401
