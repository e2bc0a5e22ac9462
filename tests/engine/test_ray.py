"""Units on a Ray cluster, of one node or of several; nodes and actors that die."""

import os
import signal
import threading
import time

import pytest

from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run, settle
from diffdoctor.runs.errors import UserError
from support.engine import Spec, check, plan_of

pytest.importorskip("pyarrow")
pytest.importorskip("ray")
pytestmark = pytest.mark.study  # a cluster takes some ten seconds to start


def finish(plan, output, seconds=0.0, **options):
    output.mkdir(exist_ok=True)
    options = {"kind": "ray", "address": "local", "cpus": 1, "gpus": 0, **options}
    report = run(plan, Spec(str(output), seconds), output, EngineConfig(**options))
    return report, list(settle(plan, output, report))


def test_the_same_rules_as_for_processes(tmp_path):
    import ray

    plan = plan_of(12, poison=[2], once=[5], raises=[7], hangs=[9])
    report, commits = finish(plan, tmp_path / "out", actors=2, retries=2, unit_timeout=10)
    assert not ray.is_initialized()
    # What may still be written by an actor out of reach is left alone.
    for path in (tmp_path / "out" / ".attempts").iterdir():
        assert path.name.startswith(("000002", "000007", "000009"))
        path.unlink()
    check(plan, tmp_path / "out", report, commits, ["000002", "000007", "000009"])
    assert report.failed["000007"] == "RuntimeError: an odd unit, 2 times"
    assert report.failed["000009"] == "it took more than 10 seconds, 2 times"
    with pytest.raises(UserError, match="this cannot be done"):
        finish(plan_of(2, refuses=[1]), tmp_path / "other", actors=1)


def test_no_cluster_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"engine\.address auto: no Ray cluster can be reached"):
        finish(plan_of(1), tmp_path / "out", address="auto")


def test_nodes_that_join_and_die_lose_and_double_nothing(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, logging_level="error")
        lost, plan, output = cluster.add_node(num_cpus=1), plan_of(40), tmp_path / "out"
        output.mkdir()

        done = []
        thread = threading.Thread(target=lambda: done.append(finish(plan, output, seconds=0.7)))
        thread.start()
        while len(list((output / "commits").glob("0*.json"))) < 8:
            time.sleep(0.1)
            assert thread.is_alive()
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        thread.join()
        check(plan, output, *done[0])
        commits = done[0][1]
        assert ray.is_initialized()
        assert len({commit["worker"].split()[-1] for commit in commits}) == 3
    finally:
        ray.shutdown()
        cluster.shutdown()


DRIVER = """
import sys
from pathlib import Path
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run
from support.engine import Spec, check, plan_of

output = Path(sys.argv[1])
run(plan_of(30), Spec(str(output), 0.4), output, EngineConfig(kind="ray", address=sys.argv[2], actors=2, gpus=0))
"""


def test_a_driver_that_is_killed_is_followed_by_another(tmp_path):
    import subprocess
    import sys

    from ray.cluster_utils import Cluster

    from support.launch import environment

    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        command = [sys.executable, str(tmp_path / "driver.py"), str(output), cluster.address]
        driver = subprocess.Popen(command, env=environment())
        while len(list((output / "commits").glob("0*.json"))) < 6:
            time.sleep(0.1)
            assert driver.poll() is None
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert subprocess.run(command, env=environment(), check=False).returncode == 0
    finally:
        cluster.shutdown()
    plan = plan_of(30)
    report = run(plan, Spec(str(output)), output, EngineConfig(kind="none"))
    check(plan, output, report, list(settle(plan, output, report)))
