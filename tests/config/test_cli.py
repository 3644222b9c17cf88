"""make test ARGS=tests/config/test_cli.py"""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from savepoint import workspace
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.config import compose, typed
from savepoint.errors import ConfigError


class WideNet(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.dropout = dropout


class DeepNet(nn.Module):
    def __init__(self, depth: int = 2, dropout: float = 0.25) -> None:
        super().__init__()
        self.layer = nn.Linear(depth, 1)


class Sorter(LightningModule):
    """Sorts things.

    Args:
        lr: How far a step goes.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.1,
        mode: Literal["up", "down"] = "up",
        tag: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.lr = net, lr


class Counter(LightningModule):
    def __init__(self, lr: float = 0.5, count: int = 3) -> None:
        super().__init__()
        self.count = count


class Pebbles(LightningDataModule):
    def __init__(self, root: str = "pebbles", batch_size: int = 4) -> None:
        super().__init__()


class Shells(LightningDataModule):
    def __init__(self, root: str = "shells", batch_size: int = 8) -> None:
        super().__init__()


SORTER = """
model:
  class_path: Sorter
  init_args:
    net: {class_path: WideNet, init_args: {width: 3, dropout: 0.5}}
    lr: 0.7
data: {class_path: Pebbles, init_args: {root: here}}
trainer: {max_epochs: 3, logger: false}
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configs, and the working directory in it."""
    for name, text in {
        "sorter.yaml": SORTER,
        "counter.yaml": "model: {class_path: Counter}\ndata: {class_path: Shells}",
        "trainer.yaml": "trainer: {max_epochs: 9, precision: 64-true}",
        "parts.yaml": "model: model/deep.yaml\ndata: Shells",
        "model/deep.yaml": "class_path: Sorter\ninit_args: {net: {class_path: DeepNet}}",
        "checkpoint/steps.yaml": "save_every_epochs: null\nsave_every_steps: 5",
        "half.yaml": "model: {init_args: {lr: 3}}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flat(*argv: str, base: str | None = None) -> dict[str, Any]:
    return compose.flatten(typed.dump(typed.parse(argv, base=base)))


def only(values: dict[str, Any], group: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.split(".")[0] == group}


# --- replace, never mix ---


def test_a_second_config_replaces_the_model_and_the_data_and_leaves_nothing_of_the_first(
    configs: Path,
) -> None:
    values = flat("--config", "sorter.yaml", "--config", "counter.yaml")
    assert only(values, "model") == {"model": "test_cli.Counter", "model.lr": 0.5, "model.count": 3}
    assert only(values, "data") == {
        "data": "test_cli.Shells",
        "data.root": "shells",
        "data.batch_size": 8,
    }


def test_a_group_that_is_a_file_replaces_the_one_before_it(configs: Path) -> None:
    values = flat("--config", "sorter.yaml", "--model", "model/deep.yaml")
    assert (values["model.lr"], values["model.net"], values["model.net.dropout"]) == (
        0.1,
        "test_cli.DeepNet",
        0.25,
    )
    assert values["data.root"] == "here"


def test_a_group_that_is_a_class_name_replaces_the_one_before_it(configs: Path) -> None:
    values = flat("--config", "sorter.yaml", "--data", "Shells", "--model", "Counter")
    assert only(values, "model") == {"model": "test_cli.Counter", "model.lr": 0.5, "model.count": 3}
    assert (values["data.root"], values["data.batch_size"]) == ("shells", 8)


def test_a_class_inside_a_group_is_replaced_alone(configs: Path) -> None:
    values = flat("--config", "sorter.yaml", "--model.net", "DeepNet")
    assert (values["model.net.depth"], values["model.net.dropout"], values["model.lr"]) == (
        2,
        0.25,
        0.7,
    )
    assert "model.net.width" not in values


def test_a_class_replaces_itself_with_its_defaults(configs: Path) -> None:
    assert flat("--config", "sorter.yaml", "--model.net", "WideNet")["model.net.dropout"] == 0.0


@pytest.mark.parametrize(
    "over",
    [["--config", "counter.yaml"], ["--model", "Counter"], ["--model={class_path: Counter}"]],
)
def test_nothing_of_a_checkpoints_model_leaks_into_another(configs: Path, over: list[str]) -> None:
    base = typed.dump(typed.parse(["--config", "sorter.yaml"]))
    assert only(flat(*over, base=base), "model") == {
        "model": "test_cli.Counter",
        "model.lr": 0.5,
        "model.count": 3,
    }


def test_trainer_and_checkpoint_are_merged_key_by_key(configs: Path) -> None:
    values = flat(
        "--config",
        "sorter.yaml",
        "--config",
        "trainer.yaml",
        "--checkpoint",
        "checkpoint/steps.yaml",
    )
    assert (
        values["trainer.max_epochs"],
        values["trainer.precision"],
        values["trainer.logger"],
    ) == (
        9,
        "64-true",
        False,
    )
    assert (values["checkpoint.save_every_epochs"], values["checkpoint.save_every_steps"]) == (
        None,
        5,
    )
    assert values["checkpoint.monitor"] == "val/accuracy"


def test_a_group_without_a_class_is_refused_because_it_cannot_be_mixed_in(configs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"No class chosen by `model`: half.yaml.*--model.NAME VALUE"
    ):
        typed.parse(["--config", "sorter.yaml", "--config", "half.yaml"])


def test_a_logger_that_is_replaced_keeps_no_value_of_the_one_before_it(configs: Path) -> None:
    base = "{trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: a, prefix: old}}}}"
    (configs / "logger.yaml").write_text(base)
    values = flat(
        "--config=sorter.yaml",
        "--config=logger.yaml",
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.save_dir=b",
    )
    assert (values["trainer.logger.save_dir"], values["trainer.logger.prefix"]) == ("b", "")


# --- which wins, and where files are looked for ---


def test_a_single_value_wins_over_files_and_groups_wherever_it_stands(configs: Path) -> None:
    values = flat(
        "--model.lr",
        "0.2",
        "--trainer.max_epochs=7",
        "--config",
        "sorter.yaml",
        "--model",
        "model/deep.yaml",
    )
    assert (values["model.lr"], values["trainer.max_epochs"]) == (0.2, 7)


def test_of_two_values_of_one_key_the_later_wins(configs: Path) -> None:
    assert flat("--config=sorter.yaml", "--model.lr=0.2", "--model.lr=1e-3")["model.lr"] == 0.001


def test_of_two_classes_for_one_key_nothing_of_the_earlier_stays(configs: Path) -> None:
    earlier = "--model.net={class_path: WideNet, init_args: {dropout: 0.9}}"
    assert flat("--config=sorter.yaml", earlier, "--model.net=DeepNet")["model.net.dropout"] == 0.25


def test_a_class_named_after_its_values_is_refused_instead_of_dropping_them(configs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--model.net would undo what stands before it: --model.net.width"
    ):
        typed.parse(["--config=sorter.yaml", "--model.net.width=3", "--model.net", "DeepNet"])


def test_group_files_in_a_config_are_relative_to_that_config(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    values = flat("--config", str(configs / "parts.yaml"))
    assert (values["model.net"], values["data"]) == ("test_cli.DeepNet", "test_cli.Shells")


def test_the_default_config_is_found_from_any_working_directory(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_entered", workspace.Project(configs, Path("sorter.yaml")))
    monkeypatch.chdir("/")
    assert flat()["model.lr"] == 0.7


def test_a_default_config_that_is_gone_is_said_with_the_place_that_names_it(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_entered", workspace.Project(configs, Path("gone.yaml")))
    with pytest.raises(ConfigError, match=r"No default config: .*gone\.yaml.*train\.py names it"):
        flat()


def test_files_that_choose_no_model_go_on_top_of_the_default_config(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_entered", workspace.Project(configs, Path("sorter.yaml")))
    values = flat("--config", "trainer.yaml")
    assert (values["model.lr"], values["trainer.max_epochs"]) == (0.7, 9)


def test_a_checkpoints_config_stands_in_for_the_default_config(configs: Path) -> None:
    base = typed.dump(typed.parse(["--config", "sorter.yaml"]))
    values = flat("--trainer.max_epochs", "4", "--config", "trainer.yaml", base=base)
    assert (values["model.lr"], values["trainer.max_epochs"], values["trainer.precision"]) == (
        0.7,
        4,
        "64-true",
    )


# --- the dump ---


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [
            "--checkpoint.save_every_epochs",
            "null",
            "--checkpoint.save_every_steps",
            "5",
            "--checkpoint.monitor",
            "null",
        ],
        [
            "--trainer.callbacks+=Timer",
            "--trainer.callbacks.duration=00:00:01:00",
            "--trainer.callbacks+=LearningRateMonitor",
        ],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x"],
        [
            "--model.net",
            "DeepNet",
            "--model.lr=1e-7",
            "--model.tag=1e-3",
            "--trainer.overfit_batches=10",
        ],
        [
            "--trainer.devices=[0, 1]",
            "--trainer.gradient_clip_val=.inf",
            "--seed_everything=12345678901",
        ],
    ],
)
def test_a_dump_parses_to_the_same_dump(configs: Path, argv: list[str]) -> None:
    text = typed.dump(typed.parse(["--config", "sorter.yaml", *argv]))
    assert typed.dump(typed.parse([], base=text)) == text


def test_a_dump_keeps_a_null_that_stands_against_a_default(configs: Path) -> None:
    base = typed.dump(
        typed.parse(["--config=sorter.yaml", "--checkpoint.save_every_epochs", "null"])
    )
    assert typed.parse([], base=base).checkpoint.save_every_epochs is None


def test_the_parser_of_the_process_keeps_no_model_that_was_made_with_it(configs: Path) -> None:
    config = typed.parse(["--config=sorter.yaml"])
    model = weakref.ref(typed.instantiate(config)[0])
    gc.collect()
    assert model() is None


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\x85")
@example("1e-3")
def test_any_text_survives_a_dump(text: str) -> None:
    read = compose.parse_yaml(compose.to_yaml({"run_name": text}), "a test")
    assert read == {"run_name": text}


def test_a_text_that_looks_like_a_number_stays_a_text(configs: Path) -> None:
    base = typed.dump(
        typed.parse(["--config=sorter.yaml", "--run_name=1e3", "--model.tag=2026-11-20"])
    )
    config = typed.parse([], base=base)
    assert (config.run_name, config.model.init_args.tag) == ("1e3", "2026-11-20")


def test_a_dump_holds_the_keys_of_the_contract_and_nothing_of_the_way_they_were_given(
    configs: Path,
) -> None:
    text = typed.dump(typed.parse(["--config", "sorter.yaml"]))
    every = tuple(key for key in compose.KEYS if key != "federated")  # where a config has it alone
    assert tuple(compose.parse_yaml(text, "a test")) == every
    assert "sorter.yaml" not in text


def test_flatten_names_values_as_their_flags() -> None:
    model = "{class_path: a.M, init_args: {lr: 1, net: {class_path: a.N}, betas: [1, 2], more: {}}}"
    text = f"{{model: {model}, seed_everything: 0}}"
    assert compose.flatten(text) == {
        "model": "a.M",
        "model.lr": 1,
        "model.net": "a.N",
        "model.betas": [1, 2],
        "model.more": {},
        "seed_everything": 0,
    }


# --- what is wrong, in one line ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model.lrr 0.1", "Unknown key: --model.lrr. Did you mean model.lr?"),
        ("--model.zzz 0.1", "Unknown key: --model.zzz. Sorter takes lr, mode, net, tag."),
        ("--model.net.widht 3", "Unknown key: --model.net.widht. Did you mean model.net.width?"),
        (
            "--trainer.max_epochs.foo 3",
            "Unknown key: --trainer.max_epochs.foo. See --print_config.",
        ),
        ("--model.tag [1]", "Wrong value of --model.tag: [1]. Expected str | null."),
        ("--model.lr abc", "Wrong value of --model.lr: abc. Expected float."),
        ("--model.net.width x", "Wrong value of --model.net.width: x. Expected int."),
        ("--model.mode left", "Wrong value of --model.mode: left. Expected one of 'up', 'down'."),
        ("--data.batch_size 1.5", "Wrong value of --data.batch_size: 1.5. Expected int."),
        ("--data.batch_size null", "Wrong value of --data.batch_size: null. Expected int."),
        (
            "--trainer.max_epochs abc",
            "Wrong value of --trainer.max_epochs: abc. Expected int | null.",
        ),
        (
            "--checkpoint.mode up",
            "Wrong value of --checkpoint.mode: up. Expected one of 'min', 'max'.",
        ),
        (
            "--resume yes",
            "Wrong value of --resume: yes. Expected one of 'never', 'auto', 'must' | null.",
        ),
        ("--seed_everything x", "Wrong value of --seed_everything: x. Expected int."),
        ("--model.net WideNett", "No such class for --model.net: WideNett. Did you mean WideNet"),
        (
            "--model.net nowhere.Net",
            "No such class for --model.net: nowhere.Net (No module named 'nowhere').",
        ),
        ("--model Sortr", "No such class for --model: Sortr. Did you mean Sorter?"),
        (
            "--data fashion",
            "No such class for --data: fashion. Did you mean configs/data/fashion.yaml?",
        ),
        (
            "--trainer.callbacks+=Timerr",
            "No such class for --trainer.callbacks: Timerr. Did you mean Timer?",
        ),
        (
            "--model.net test_cli.Shells",
            "Wrong class for --model.net: test_cli.Shells. Expected a Module.",
        ),
        (
            "--model Sorter",
            "No value for model.net (--model). Its class has no default for it. Give --model.net "
            "VALUE.",
        ),
        (
            "--trainer.max_epoch 3",
            "Unknown flag: --trainer.max_epoch. Did you mean --trainer.max_epochs",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(configs: Path, argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        typed.parse(["--config", "sorter.yaml", *argv.split()])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 0.7", "lrr: 0.7", "Unknown key: model.lrr (sorter.yaml). Did you mean model.lr?"),
        ("lr: 0.7", "lr: [0.7]", "Wrong value of model.lr (sorter.yaml): [0.7]. Expected float."),
        (
            "width: 3",
            "wid: 3",
            "Unknown key: model.net.wid (sorter.yaml). Did you mean model.net.width?",
        ),
        ("width: 3", "width: x", "Wrong value of model.net.width (sorter.yaml): x. Expected int."),
        (
            "width: 3",
            "width: null",
            "Wrong value of model.net.width (sorter.yaml): null. Expected int.",
        ),
        ("WideNet", "NarrowNet", "No such class for model.net (sorter.yaml): NarrowNet."),
        (
            "class_path: Sorter",
            "class_path: Sort",
            "No such class for model (sorter.yaml): Sort. Did you mean Sorter?",
        ),
        (
            "max_epochs: 3",
            "max_epochs: a",
            "Wrong value of trainer.max_epochs (sorter.yaml): a. Expected int | null.",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(
    configs: Path, old: str, new: str, message: str
) -> None:
    (configs / "sorter.yaml").write_text(SORTER.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        typed.parse(["--config", "sorter.yaml"])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_value_that_lightning_refuses_is_a_config_error(configs: Path) -> None:
    config = typed.parse(["--config", "sorter.yaml", "--trainer.accelerator", "abacus"])
    with pytest.raises(ConfigError, match=r"Trainer refuses its settings: .*abacus"):
        typed.instantiate(config)


# --- help ---


def test_print_config_prints_the_dump_and_leaves(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        typed.parse(["--config", "sorter.yaml", "--print_config", "--model.lr", "3"])
    assert left.value.code == 0
    assert capsys.readouterr().out == typed.dump(
        typed.parse(["--config", "sorter.yaml", "--model.lr", "3"])
    )


def test_the_help_of_a_key_says_what_its_class_takes(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        typed.parse(["--config", "sorter.yaml", "--model.help"])
    assert capsys.readouterr().out.splitlines() == [
        "test_cli.Sorter takes, as --model.NAME VALUE or under `model` in a config:",
        "  net: Module (required)",
        "  lr: float (default 0.1)  How far a step goes.",
        "  mode: one of 'up', 'down' (default \"up\")",
        "  tag: str | null (default null)",
    ]


def test_the_help_of_a_key_takes_another_class_by_name(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        typed.parse(["--config", "sorter.yaml", "--model.net.help", "DeepNet"])
    assert "depth: int (default 2)" in capsys.readouterr().out


# --- objects ---


def test_the_objects_are_those_of_the_config(configs: Path) -> None:
    config = typed.parse(
        ["--config", "sorter.yaml", "--model.net.width", "5", "--checkpoint.keep_last", "3"]
    )
    model, data, trainer = typed.instantiate(config, default_root_dir=str(configs))
    assert isinstance(model, Sorter)
    assert isinstance(data, Pebbles)
    assert model.net.layer.in_features == 5
    assert (trainer.max_epochs, trainer.loggers, trainer.default_root_dir) == (3, [], str(configs))
    assert len([c for c in trainer.callbacks if isinstance(c, CheckpointCallback)]) == 1


def test_building_twice_gives_the_same_weights_and_another_seed_others(configs: Path) -> None:
    def weights(*argv: str) -> torch.Tensor:
        return typed.instantiate(typed.parse(["--config", "sorter.yaml", *argv]))[
            0
        ].net.layer.weight

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights("--seed_everything", "1"))


def test_callbacks_of_the_caller_join_those_of_the_config_and_stand_before_the_checkpoint(
    configs: Path,
) -> None:
    config = typed.parse(["--config=sorter.yaml", "--trainer.callbacks+=Timer"])
    mine = EarlyStopping("val/loss")
    callbacks = typed.instantiate(config, callbacks=[mine])[2].callbacks
    assert [type(c).__name__ for c in callbacks[:2]] == ["Timer", "EarlyStopping"]
    assert mine is callbacks[1]
    assert isinstance(callbacks[-1], CheckpointCallback)


def test_arguments_of_the_caller_take_the_place_of_the_configs(configs: Path) -> None:
    config = typed.parse(["--config", "sorter.yaml", "--trainer.logger", "true"])
    assert typed.instantiate(config, logger=False, max_epochs=8)[2].loggers == []
    assert typed.instantiate(config, logger=False, max_epochs=8)[2].max_epochs == 8


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
def test_a_model_can_be_loaded_from_a_checkpoint_alone(configs: Path) -> None:
    model, _, _ = typed.instantiate(typed.parse(["--config", "sorter.yaml"]))
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(content, "model.ckpt")
    loaded = Sorter.load_from_checkpoint("model.ckpt", weights_only=True)
    assert (loaded.lr, loaded.net.dropout) == (0.7, 0.5)
    assert torch.equal(loaded.net.layer.weight, model.net.layer.weight)


def test_the_command_line_of_the_process_is_neither_read_nor_changed(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--nonsense"])
    typed.instantiate(typed.parse(["--config", "sorter.yaml"]))
    assert sys.argv == ["train.py", "--nonsense"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model.lrr 1", "Unknown key: --model.lrr. Did you mean model.lr?"),
        ("--data.rot x", "Unknown key: --data.rot. Did you mean data.root?"),
        ("--modle.lr 1", "Unknown flag: --modle.lr. Did you mean --model.lr?"),
        ("--epochs 3", "Unknown flag: --epochs. Did you mean --trainer.max_epochs?"),
        ("--lr 3", "Unknown flag: --lr. Did you mean --model.lr?"),
        ("--batch_size 3", "Unknown flag: --batch_size. Did you mean --data.batch_size?"),
        ("--confg good.yaml", "Unknown flag: --confg. Did you mean --config?"),
        ("--seed 3", "Unknown flag: --seed. See --help."),
        (
            "--logger.offline true",
            "Unknown flag: --logger.offline. Did you mean --trainer.logger.offline, beside "
            "--trainer.logger CLASS?",
        ),
        (
            "--strategy.accelerator cpu",
            "Unknown flag: --strategy.accelerator. Did you mean --trainer.strategy.accelerator, "
            "beside --trainer.strategy CLASS?",
        ),
        ("--run_names 3", "Unknown flag: --run_names. Did you mean --run_name?"),
        (
            "--trainer.max_epoch 3",
            "Unknown flag: --trainer.max_epoch. Did you mean --trainer.max_epochs?",
        ),
        ("--trainer.zzz 3", "Unknown flag: --trainer.zzz. See --trainer.help."),
        (
            "--checkpoint.keep 3",
            "Unknown flag: --checkpoint.keep. Did you mean --checkpoint.keep_last?",
        ),
        (
            "--trainer {zzz: 3}",
            "Unknown key in --trainer: trainer.zzz. See --trainer.help for its keys.",
        ),
        (
            "--checkpoint {keep_lasts: 3}",
            "Unknown key in --checkpoint: checkpoint.keep_lasts. Did you mean",
        ),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest_ones(argv: str, message: str) -> None:
    import project  # noqa: F401

    flag, _, value = argv.partition(" ")
    with pytest.raises(ConfigError) as raised:
        typed.parse([flag, value])
    assert str(raised.value).startswith(message.removesuffix("?"))
