"""The rules of the house: which module may import which, what is loaded how, that every config
parses.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
MODULES = {
    ".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): p
    for p in SRC.rglob("*.py")
    if SRC / "savepoint/build" not in p.parents  # pip leaves it when it builds the wheel
}
SAVEPOINT = sorted(m for m in MODULES if m.split(".")[0] == "savepoint")

# From the top down: each module stands on one floor, and imports what stands below it or beside it,
# by whatever way.
FLOORS = [
    ["__main__", "testing", "prove"],
    ["commands.*"],
    ["commands", "commands.output", "commands.mirrored", "sweep", "report.page", "replay.*"],
    ["resume.start"],
    ["federated.server_app"],
    ["federated.runtime"],
    ["federated.summary", "federated.ray_runtime"],
    ["federated.server"],
    ["federated.*"],
    ["resume.*", "evaluate", "export", "export_pieces", "report.*", "sweep_file"],
    ["rebuilding"],
    ["training.execute", "training.summary"],
    ["training.build"],
    ["config.typed"],
    ["config.mistakes"],
    ["config.classes"],
    ["config.quick", "find", "comparing", "weights", "layouts", "mirror.fetch", "mirror.shadow"],
    [
        "run",
        "resume.overrides",
        "resume.reschedule",
        "config.compose",
        "entry",
        "monitors",
        "trackers",
        "template.*",
        "training.*",
    ],
    ["checkpoint.callback", "resume.reschedule"],
    ["checkpoint.trainer_saver"],
    ["sharded.strategy"],
    [
        "checkpoint.saver",
        "checkpoint.ckpt_path",
        "checkpoint.io",
        "checkpoint.finite",
        "checkpoint.scores",
        "checkpoint.watched",
        "checkpoint.foreign",
        "checkpoint.arrays",
        "checkpoint.facts",
    ],
    ["federated.listing"],
    ["federated.clients"],
    ["mirror.uploader", "mirror.held", "sharded.saving"],
    ["checkpoint.store", "checkpoint.canary", "mirror.lease", "mirror.settings"],
    ["sharded.pieces"],
    ["checkpoint.state.*", "checkpoint.state", "checkpoint.format", "checkpoint.retention"],
    ["checkpoint.archive"],
    ["look.*", "look", "checkpoint.manifest", "loaders.*", "loaders"],
    [
        "checkpoint.diagnosis",
        "checkpoint.seal",
        "checkpoint.claims",
        "checkpoint.crc",
        "lock",
        "record",
        "schedules",
    ],
    ["mirror.remote", "federated.partition"],
    ["federated.federation", "federated"],
    ["files", "preemption", "tail", "elastic_ddp", "leaving", "sharded.together", "sharded"],
    ["errors", "job", "words", "workspace", "checkpoint.promises"],
]


def floor(module: str) -> int:
    """Counted from the top; the packages themselves hold no code."""
    name = module.removeprefix("savepoint.")
    exact = [number for number, names in enumerate(FLOORS) if name in names]
    wide = [
        number for number, names in enumerate(FLOORS) if f"{name.rpartition('.')[0]}.*" in names
    ]
    return (exact or wide)[0]


@cache
def tree(module: str) -> ast.Module:
    found = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found.body = [node for node in found.body if not _is_for_types(node)]
    return found


def _is_for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, which nothing runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def nodes(module: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(module)))


@cache
def imported(module: str, *, when_loaded: bool = False) -> frozenset[str]:
    """Dotted names a module imports, also inside functions: `from a import b` gives a and a.b."""
    found = set()
    for node in tree(module).body if when_loaded else nodes(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write it in full"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def direct(module: str, *, when_loaded: bool = False) -> set[str]:
    """The modules of ours that a module names, without the packages on the way to them."""
    ours = imported(module, when_loaded=when_loaded) & set(MODULES)
    return {m for m in ours if not any(other.startswith(f"{m}.") for other in ours)} - {module}


@cache
def reached(module: str, *, when_loaded: bool = False) -> frozenset[str]:
    """The modules of ours that are imported with a module, the packages they lie in included."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
        new = (direct(name, when_loaded=when_loaded) | parents) & set(MODULES) - found
        found |= new
        todo += new
    return frozenset(found)


def libraries(module: str, *, when_loaded: bool = False) -> set[str]:
    """Top-level names of what is not ours and not of the standard library."""
    modules = reached(module, when_loaded=when_loaded) | {module}
    names = {name.split(".")[0] for m in modules for name in imported(m, when_loaded=when_loaded)}
    return names - sys.stdlib_module_names - {"savepoint", "project"}


def test_savepoint_never_imports_project() -> None:
    for module in SAVEPOINT:
        assert not [name for name in imported(module) if name.split(".")[0] == "project"], module


def test_no_module_needs_itself_to_be_loaded() -> None:
    for module in SAVEPOINT:
        found, todo = set(), [module]
        while todo:
            new = direct(todo.pop(), when_loaded=True) - found
            found |= new
            todo += new
        assert module not in found, module


PACKAGES = {
    "savepoint",
    *(
        f"savepoint.{name}"
        for name in (
            "checkpoint",
            "config",
            "federated",
            "mirror",
            "report",
            "resume",
            "sharded",
            "template",
            "training",
        )
    ),
}


def test_each_module_has_a_floor_and_imports_point_down() -> None:
    for module in sorted(set(SAVEPOINT) - PACKAGES):
        above = {
            other
            for other in direct(module) - PACKAGES
            if other.startswith("savepoint.") and floor(other) < floor(module)
        }
        assert above == set(), module


# -- how dense a line may be ----------------------------------------------------------------------

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def own_expressions(node: ast.stmt) -> Iterator[ast.AST]:
    """Everything in a statement but the statements that stand in its block."""
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        part = waiting.pop()
        if not isinstance(part, ast.stmt | ast.ExceptHandler):
            yield part
            waiting += ast.iter_child_nodes(part)


def is_crowded(node: ast.stmt) -> str:
    parts = list(own_expressions(node))
    inner = [x for part in parts if isinstance(part, COMPREHENSIONS) for x in ast.walk(part)]
    if sum(isinstance(part, ast.IfExp) for part in parts) > 1:
        return "two conditional expressions"
    if any(isinstance(part, ast.NamedExpr) for part in inner):
        return "a walrus in a comprehension"
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return ""
    [target, *_] = node.targets
    if not isinstance(target, ast.Tuple):
        return ""
    read = {ast.unparse(part) for part in ast.walk(node.value)}
    swaps = any(ast.unparse(name) in read for name in target.elts)
    return "" if swaps else "a parallel assignment"


def test_no_line_is_longer_than_100_columns() -> None:
    for module in MODULES:
        lines = MODULES[module].read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line.partition("  # ")[0]) > 100] == [], module


def test_a_statement_says_one_thing() -> None:
    for module in SAVEPOINT:
        crowded = {
            f"line {node.lineno}: {is_crowded(node)}"
            for node in nodes(module)
            if isinstance(node, ast.stmt) and is_crowded(node)
        }
        assert crowded == set(), module


# -- what is private -----------------------------------------------------------------------------

# The one package that knows Lightning from inside, the two files that read objects of any kind, and
# Python's own.
INSIDERS = {
    *(module for module in MODULES if module.startswith("savepoint.look")),
    *(module for module in MODULES if module.startswith("savepoint.checkpoint.state")),
}
NAMED_TUPLES = {"_fields", "_asdict", "_replace"}
OTHERS = {
    "_last_lr": "torch", "_step_count": "torch", "_values": "torch", "_indices": "torch", "_metadata": "torch",
    "_orig_mod": "torch", "_getframe": "sys", "_current_frames": "sys", "_buffers": "torch",
    "_parameters": "torch", "_exit": "os", "_ncallbacks": "atexit", "_actions": "argparse", "_trial_id": "optuna",
}  # fmt: skip


@cache
def own_names() -> set[str]:
    found = set()
    for module in SAVEPOINT:
        for node in nodes(module):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def test_what_is_private_to_lightning_stands_in_one_package() -> None:
    for module in [module for module in SAVEPOINT if module not in INSIDERS]:
        known = own_names() | NAMED_TUPLES | set(OTHERS)
        reached_for = {
            f"{ast.unparse(node)}, line {node.lineno}"
            for node in nodes(module)
            if isinstance(node, ast.Attribute)
            and re.match("_[a-z]", node.attr)
            and node.attr not in known
            if ast.unparse(node.value) not in ("self", "super()", "cls")
        }
        assert reached_for == set(), module


def test_checkpoints_know_nothing_of_command_lines_and_runs() -> None:
    for module in [m for m in SAVEPOINT if m.startswith("savepoint.checkpoint.")]:
        forbidden = {
            f"savepoint.{name}"
            for name in (
                "config.typed",
                "config.compose",
                "config.quick",
                "run",
                "training.build",
                "resume.start",
            )
        }
        assert reached(module) & forbidden == set(), module


@pytest.mark.parametrize("name", ["format", "store", "retention"])
def test_storage_knows_no_lightning(name: str) -> None:
    assert (
        libraries(f"savepoint.checkpoint.{name}")
        & {"lightning", "pytorch_lightning", "torchmetrics"}
        == set()
    )


@pytest.mark.parametrize(
    "module", ["errors", "entry", "checkpoint.manifest", "checkpoint.retention"]
)
def test_what_must_start_at_once_needs_the_standard_library_only(module: str) -> None:
    assert libraries(f"savepoint.{module}", when_loaded=True) == set()
    assert libraries(f"savepoint.{module}") <= {"isal"}, "for what looks at every byte"


@pytest.mark.parametrize("module", ["config.compose", "config.quick"])
def test_the_check_before_lightning_needs_yaml_only(module: str) -> None:
    assert libraries(f"savepoint.{module}", when_loaded=True) == {"yaml"}


def test_flower_and_ray_are_named_below_one_package_alone() -> None:
    for module in sorted(set(MODULES) - {"project.flower"}):
        names = {name.split(".")[0] for name in imported(module)}
        assert module.startswith("savepoint.federated.") or not names & {"flwr", "ray"}, module


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("federation", set()),
        ("partition", {"numpy"}),
        ("clients", set()),
        ("listing", set()),
    ],
)
def test_what_commands_ask_of_federated_runs_needs_neither_torch_nor_flower(
    module: str, allowed: set[str]
) -> None:
    assert libraries(f"savepoint.federated.{module}", when_loaded=True) == allowed


def test_what_is_loaded_without_a_federated_config_does_not_load_flower() -> None:
    for module in [m for m in SAVEPOINT if "federated" not in m]:
        assert not libraries(module, when_loaded=True) & {"flwr", "ray"}, module


FILE_SYSTEMS = ("fsspec", "s3fs", "gcsfs", "adlfs", "boto", "aiobotocore")


def test_one_file_knows_the_file_systems_behind_urls() -> None:
    for module in sorted(set(MODULES) - {"savepoint.mirror.remote"}):
        strings = {
            node.value
            for node in nodes(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = imported(module) | strings  # `importlib.import_module("fsspec.core")`
        assert not [name for name in named if name.split(".")[0] in FILE_SYSTEMS], module


KNOW_JSONARGPARSE = {"savepoint.config.typed", "savepoint.config.classes"}


def test_two_files_know_jsonargparse_and_lightning_cli() -> None:
    for module in sorted(set(MODULES) - KNOW_JSONARGPARSE):
        known = {
            name
            for name in imported(module)
            if "jsonargparse" in name or name.startswith("lightning.pytorch.cli")
        }
        assert known == set(), module
        assert "LightningCLI" not in {
            node.id for node in nodes(module) if isinstance(node, ast.Name)
        }


SOURCES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*MODULES.values(), *ROOT.glob("*.py"), *ROOT.glob("[bt]*/**/*.py")]
)
UNPICKLERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "torch.jit.load",
    "torch.export.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all",
}  # fmt: skip
# On what this very process has just written.
ALLOWED = {
    ("src/savepoint/export.py", "torch.export.load"),
    ("tests/commands/test_export.py", "torch.export.load"),
}
INTERPRETERS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
}


@cache
def calls_in(source: str) -> tuple[tuple[str, ast.Call], ...]:
    """The calls of a file, each with the name of what is called."""
    every = ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8")))
    calls = [node for node in every if isinstance(node, ast.Call)]
    return tuple((ast.unparse(call.func), call) for call in calls)


def given_as(call: ast.Call, name: str) -> list[str]:
    return [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name]


def test_every_load_is_a_safe_load() -> None:
    for source in SOURCES:
        for name, call in calls_in(source):
            line = f"{source}, line {call.lineno}: {name}"
            assert name not in UNPICKLERS or (source, name) in ALLOWED, line
            assert name != "torch.load" or given_as(call, "weights_only") == ["True"], line
            assert given_as(call, "allow_pickle") in ([], ["False"]), line
            assert name != "yaml.load" or given_as(call, "Loader") == ["_Loader"], line


def test_no_text_becomes_a_program() -> None:
    for source in SOURCES:
        for name, call in calls_in(source) if source.startswith("src/") else ():
            assert name not in INTERPRETERS, f"{source}, line {call.lineno}: {name}"
            assert given_as(call, "shell") in ([], ["False"]), (
                f"{source}, line {call.lineno}: {name}"
            )


def test_the_reader_of_configs_builds_plain_values_alone() -> None:
    import yaml

    from savepoint.config.compose import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert _Loader.yaml_constructors == yaml.SafeLoader.yaml_constructors
    assert _Loader.yaml_multi_constructors == yaml.SafeLoader.yaml_multi_constructors


def test_there_is_no_utils() -> None:
    assert list(SRC.rglob("*util*.py")) == []


CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
RUNS = [config for config in CONFIGS if "/sweep/" not in config]  # those have test_sweep.py


def arguments(config: str) -> list[str]:
    group = Path(config).parent.name
    return [
        f"--{group}" if group in ("model", "data", "checkpoint") else "--config",
        str(ROOT / config),
    ]


@pytest.mark.parametrize("config", RUNS)
def test_every_config_parses_with_the_classes_of_the_project(config: str) -> None:
    import project  # noqa: F401
    from savepoint.config import typed

    dumped = typed.dump(typed.parse(arguments(config)))
    assert typed.dump(typed.parse([], base=dumped)) == dumped


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_says_how_to_run_it_and_what_to_expect(config: str) -> None:
    header = [line for line in (ROOT / config).read_text().splitlines() if line.startswith("#")]
    said = {line.split(":")[0].removeprefix("# ") for line in header}
    assert {"command", "hardware", "time", "expect"} <= said
    assert config in next(line for line in header if line.startswith("# command:"))
    assert "TODO" not in (ROOT / config).read_text()


@pytest.mark.parametrize("config", [c for c in CONFIGS if "/checkpoint/" in c])
def test_a_checkpoint_preset_names_every_key_so_that_none_of_another_preset_stays(
    config: str,
) -> None:
    from savepoint.checkpoint.callback import CheckpointCallback
    from savepoint.config import compose

    # What ranks them depends on the model, whether they are in parts on the strategy; where they are mirrored, on
    # the place: a preset of its own.
    keys = set(inspect.signature(CheckpointCallback).parameters) - {"monitor", "mode", "sharded"}
    of_a_mirror = {key for key in keys if key.startswith("mirror")}
    assert of_a_mirror
    is_mirror = Path(config).name == "mirror.yaml"
    assert set(compose.read(ROOT / config)) == (of_a_mirror if is_mirror else keys - of_a_mirror)


def test_the_time_limits_of_tests_are_there_to_end_a_hang() -> None:
    """Each is HANG_SECS: under load a start alone takes minutes."""
    own = re.compile(r"(?:\btimeout=|monotonic\(\) \+ )\d")
    tests = ROOT.joinpath("tests").rglob("*.py")
    assert [path.name for path in tests if own.search(path.read_text(encoding="utf-8"))] == []
