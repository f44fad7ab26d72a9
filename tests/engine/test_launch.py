"""The launch scripts, with real processes: nodes that train together, workers that are lost, a queue that preempts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.repository import REPO

pytest.importorskip("mmengine")
from helpers.tiny_run import tiny_config
from mmengine.config import Config

ENVIRON = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
    "OMP_NUM_THREADS": "1",
}


STEPS = 20


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a config whose every third step is saved."""
    folder = tmp_path_factory.mktemp("launch")
    changes = {"train_cfg.max_iters": STEPS, "default_hooks.checkpoint.interval": 3, "log_level": "INFO"}
    cfg = tiny_config("unused", **changes)
    for key in ("work_dir", "experiment_name", "randomness"):
        cfg.pop(key)
    cfg.custom_imports = dict(imports=["helpers.tiny_run"])
    cfg.env_cfg = dict(dist_cfg=dict(backend="nccl"))  # as the configs have it; without a GPU it becomes gloo
    Config(cfg.to_dict()).dump(folder / "tiny.py")
    return folder


def launch(project, name, *flags, **environ):
    """Start tools/dist_train.sh with two processes."""
    options = ("--deterministic", "--work-dir", name)
    return subprocess.Popen(
        [REPO / "tools" / "dist_train.sh", "tiny.py", *map(str, flags or (2,)), *options],
        cwd=project,
        env={**ENVIRON, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def curve(project, name):
    """The loss of each step, as logged; a step that was done twice must have given the same."""
    found = {}
    for log in sorted((project / name).glob("*/vis_data/*.json")):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return found


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(process):
    """Numbers of the training processes below a launcher."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.fixture(scope="module")
def stopped(project):
    """The curve of a run of two processes that was told to stop, and the step after which it was."""
    process = launch(project, "run", 2, SLOW_STEPS="0.1")
    wait_for(project / "run" / "iter_3.pth", process)
    time.sleep(0.15)  # a signal that arrives before step 3 ends would save it again
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    latest = Path((project / "run" / "last_checkpoint").read_text()).name
    again = launch(project, "run", 2, SLURM_RESTART_COUNT="1")  # as SLURM starts a job that it requeued
    assert again.wait(120) == 0, again.stderr.read()[-3000:]
    return curve(project, "run"), int(re.fullmatch(r"iter_(\d+).pth", latest)[1])


@pytest.mark.slow
def test_told_to_stop_the_launcher_saves_and_later_goes_on(stopped):
    losses, step = stopped
    assert 3 < step < STEPS
    assert sorted(losses) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_nodes_survive_the_loss_of_a_worker(project, stopped):
    """Two launchers with a rendezvous of their own; SIGKILL in the middle; the same curve as one that stopped."""
    environ = dict(NNODES="2", MASTER_ADDR="localhost", PORT="29517", JOB="lost")
    slow = {"SLOW_STEPS": "0.1", **environ}  # time to be killed in
    nodes = [launch(project, "part", 1, **slow) for _ in range(2)]
    wait_for(project / "part" / "iter_6.pth", nodes[0])
    (victim,) = workers(nodes[1])
    os.kill(victim, signal.SIGKILL)
    assert [node.wait(180) for node in nodes] == [0, 0]
    assert (project / "part" / f"iter_{STEPS}.pth").is_file()
    assert curve(project, "part") == stopped[0]
    assert len(list((project / "part").glob("*/vis_data"))) > 1  # it did start twice


@pytest.mark.parametrize("arguments", [(), ("config.py",), ("config.py", "eight"), ("config.py", "0")])
def test_usage(arguments):
    done = subprocess.run([REPO / "tools/dist_train.sh", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]\n")


def test_several_nodes_need_the_address_of_one():
    environ = {**ENVIRON, "NNODES": "2"}
    done = subprocess.run(
        [REPO / "tools/dist_train.sh", "c.py", "8"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "MASTER_ADDR: is the name or address of one of the nodes" in done.stderr


FAKES = {
    "sbatch": 'echo "sbatch $*" >> "$CALLS"; shift $(( $# - 3 )); '
    'PE_SPATIAL_IN_JOB=2 SLURM_JOB_ID=7 SLURM_NNODES=1 SLURM_JOB_NODELIST=n[0-1] exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo n0; fi',
    "srun": 'echo "srun $*" >> "$CALLS"; case "$*" in *pkill*) touch stop ;; *) echo "port $PORT of $MASTER_ADDR" >> '
    '"$CALLS"; touch started; while [ ! -e stop ]; do sleep 0.02; done; exit "$STATUS" ;; esac',
}


@pytest.mark.parametrize("preempted", [False, True])
def test_slurm_queues_again_what_it_preempts(tmp_path, preempted):
    """With programs in SLURM's place: sbatch runs the script at once, srun waits."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "STATUS": "3"}
    job = subprocess.Popen([REPO / "tools/slurm_train.sh", "gpu", "name", "c.py", "--amp"], cwd=tmp_path, env=environ)
    wait_for(tmp_path / "started", job, 20)
    if preempted:
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "stop").touch()
    status = job.wait(20)
    calls = (tmp_path / "calls").read_text()
    assert "--partition gpu --job-name name --nodes 1" in calls
    assert "--requeue" in calls
    assert "--signal B:USR1@600" in calls
    assert "dist_train.sh c.py 2 --amp" in calls
    assert "port 20007 of n0" in calls
    assert ("scontrol requeue 7" in calls) is preempted
    assert status == (0 if preempted else 3)
