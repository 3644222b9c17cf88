"""One app on three runtimes: the same bits. Minutes: a deployment starts a process a message."""

import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from support import deployment, federated, rounds
from support.deployment import Deployment
from support.forked import Program

from savepoint import commands
from savepoint.checkpoint import store
from savepoint.errors import FederatedError

pytestmark = pytest.mark.slow
KEPT = "--federated.personal [net.classify] --federated.keep_optimizer true --model.net.width 4"
TWO = (
    "num-server-rounds=2 num-clients=2 fraction-train=1.0 fraction-evaluate=1.0 "
    f"flags='{KEPT} --run_name RUN --output_dir OUT --federated.timeout 3000'"
)


def straight(directory: Path, *flags: str) -> Path:
    """The same run in this process."""
    words = [*KEPT.split(), "--federated.timeout", "3000"]
    given = ["--federated.fraction_train", "1.0", "--federated.fraction_evaluate", "1.0"]
    from savepoint.config import typed
    from savepoint.federated import runtime

    where = ["--config", "configs/federated/digits.yaml", "--output_dir", str(directory.parent)]
    config = typed.parse([*where, "--run_name", directory.name, *given, *words, *flags])
    assert runtime.train(config, "digits") == 0
    return directory


def digests(directory: Path) -> dict[int, str]:
    state, _ = store.load(federated.newest(directory))
    return {client: one["digest"] for client, one in state["federated"]["clients"].items()}


def test_a_simulation_with_ray_ends_as_the_run_in_this_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    flags = rounds.KEEPS
    assert rounds.train(tmp_path / "here", *flags) == 0
    assert federated.train(tmp_path / "ray", *flags, "--federated.runtime", "ray")[0] == 0
    federated.assert_equal(tmp_path / "here", tmp_path / "ray")


def test_a_simulation_goes_on_in_this_process_where_it_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    flags = [*rounds.KEEPS, "--federated.runtime", "ray"]
    federated.killed(tmp_path / "ray", flags, "before the server saves", 3)
    code, said = federated.resume(tmp_path / "ray", "--federated.runtime", "local")
    assert code == 0, said
    assert rounds.train(tmp_path / "here", *rounds.KEEPS) == 0
    federated.assert_equal(tmp_path / "here", tmp_path / "ray")


def test_a_simulation_with_ray_stops_for_a_sigterm_at_the_end_of_the_round(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    flags = [*federated.TINY, *rounds.KEEPS, "--federated.runtime", "ray"]
    where = ["--output_dir", str(tmp_path), "--run_name", "ray"]
    with Program(["train.py", *flags, *where], tmp_path / "ray.log") as program:
        program.wait_for(lambda: program.saved)
        program.signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM, program.said
        assert "Continue with: " in program.said
    assert federated.resume(tmp_path / "ray", "--federated.runtime", "local")[0] == 0
    assert rounds.train(tmp_path / "here", *rounds.KEEPS) == 0
    federated.assert_equal(tmp_path / "here", tmp_path / "ray")


def test_flwr_run_makes_the_same_run_directory(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    env = deployment.environment(tmp_path / "home")
    (tmp_path / "home").mkdir()
    given = TWO.replace("RUN", "flower").replace("OUT", str(tmp_path))
    words = ["run", ".", "--stream", "--run-config", given]
    size = ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]
    said = deployment.call(str(deployment.BIN / "flwr"), *words, *size, at=deployment.ROOT, env=env)
    try:
        assert "round 2/2" in said
        here = straight(
            tmp_path / "here", "--federated.num_server_rounds", "2", "--federated.num_clients", "2"
        )
        federated.assert_equal(here, tmp_path / "flower")
    finally:
        deployment.stop_daemon(env)


needs_keys = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="no openssl"
)


@needs_keys
def test_a_deployment_with_tls_and_keys_ends_as_the_run_in_this_process(tmp_path: Path) -> None:
    """And goes on, after its SuperLink and a SuperNode were stopped, from the same states."""
    deployed = Deployment(tmp_path / "flower")
    given = TWO.replace("RUN", "run").replace("OUT", str(tmp_path)).replace("rounds=2", "rounds=1")
    with deployed.superlink():
        deployed.register()
        with deployed.supernodes():
            deployed.flwr("run", ".", "here", "--stream", "--run-config", given)
        assert deployed.status() == "finished:completed"
    more = ["--federated.num_clients", "2"]
    here = straight(tmp_path / "here", "--federated.num_server_rounds", "1", *more)
    assert commands.main(["diff", str(here), str(tmp_path / "run")]) == 0
    assert (here / "results.json").read_bytes() == (tmp_path / "run" / "results.json").read_bytes()
    assert not (tmp_path / "run" / "clients").exists()
    kept = list((tmp_path / "flower").glob("states*/*/partition-*/step-*.ckpt"))
    assert {store.load(path)[1]["digest"] for path in kept} >= set(digests(here).values())
    go_on = f"resume='{tmp_path / 'run'}' num-server-rounds=2"
    with deployed.superlink(), deployed.supernodes():
        deployed.flwr("run", ".", "here", "--stream", "--run-config", go_on)
        assert deployed.status() == "finished:completed"
    two = straight(tmp_path / "two", "--federated.num_server_rounds", "2", *more)
    assert digests(two) == digests(tmp_path / "run")
    assert rounds.history(two) == rounds.history(tmp_path / "run")


def steps(run_dir: Path) -> list[int]:
    return [one.step for one in store.CheckpointStore(run_dir / "checkpoints").checkpoints()]


@needs_keys
@pytest.mark.parametrize(
    "programs",
    [("flwr-serverapp",), ("flower-superlink", "flwr-serverapp")],
    ids=["the ServerApp", "the SuperLink"],
)
def test_a_run_whose_server_died_in_a_round_goes_on_and_ends_as_a_straight_one(
    programs: tuple[str, ...], tmp_path: Path
) -> None:
    deployed = Deployment(tmp_path / "flower")
    given = TWO.replace("RUN", "run").replace("OUT", str(tmp_path)).replace("3000", "300")
    with deployed.superlink():
        deployed.register()
    with deployed.supernodes():  # they look for the SuperLink until it is there again
        with deployed.superlink(), deployed.run(given) as run:
            deployed.wait_until(lambda: steps(tmp_path / "run") == [1])
            for pid in deployment.processes(deployed.env, *programs):
                os.kill(pid, signal.SIGKILL)
            deployed.wait_until(lambda: run.poll() is not None)
        assert steps(tmp_path / "run") == [1]
        with deployed.superlink():
            go_on = f"resume='{tmp_path / 'run'}' num-server-rounds=2"
            deployed.flwr("run", ".", "here", "--stream", "--run-config", go_on)
            assert deployed.status() == "finished:completed"
    two = ["--federated.num_server_rounds", "2", "--federated.num_clients", "2"]
    here = straight(tmp_path / "here", *two)
    assert digests(here) == digests(tmp_path / "run")
    assert rounds.history(here) == rounds.history(tmp_path / "run")


@needs_keys
def test_a_supernode_that_died_in_a_round_is_a_failure_and_the_run_goes_on(tmp_path: Path) -> None:
    deployed = Deployment(tmp_path / "flower")
    given = TWO.replace("RUN", "run").replace("OUT", str(tmp_path))
    # Or Flower's strategy waits for the dead one.
    given = given.replace("3000", "90 --federated.min_available_nodes 1")
    with deployed.superlink():
        deployed.register()
        with deployed.supernodes() as nodes, deployed.run(given) as run:
            deployed.wait_until(lambda: steps(tmp_path / "run") == [1])
            nodes[1].kill()
            deployed.wait_until(lambda: run.poll() is not None)
        assert deployed.status() == "finished:completed"
    assert steps(tmp_path / "run")[-1] == 2
    first, second = rounds.history(tmp_path / "run")
    assert not first["failures"]
    assert second["failures"]


def test_a_deployment_that_fails_says_so_in_its_status(tmp_path: Path) -> None:
    deployed = Deployment(tmp_path / "flower")
    given = TWO.replace("RUN", "run").replace("OUT", str(tmp_path)).replace("3000", "20")
    with deployed.superlink():
        deployed.flwr("run", ".", "here", "--stream", "--run-config", given, check=False)
        assert deployed.status() == "finished:failed"
    assert FederatedError.exit_code == 1
