"""tools/setup_env.sh on made-up machines (a PATH of fake programs, nothing is installed), and what no file may name."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.repository import REPO

REAL_PROGRAMS = "bash cat chmod cksum cut dirname du getconf grep ln mkdir mv rm sh sleep tail".split()

# Notes every call, answers the question for the version, and fails where $FAIL occurs in the arguments.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$FAIL" in ?*) case "$*" in *"$FAIL"*)
  echo "  ERROR: No matching distribution found"; echo "more words"; exit 1 ;;
esac ;; esac
case "$*" in
  *version_info*) echo {version} ;;
  "-m venv .venv") mkdir -p .venv/bin; cat "$0" > .venv/bin/python; chmod +x .venv/bin/python ;;
  *"pip install"*) sleep 0.05 ;;
esac
"""
FAKE_DF = """#!/bin/sh
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo 'disk 9 9 {free_kb} 9% /'
"""


class Machine:
    """A copy of what the set-up script reads, and a PATH that holds only what is put there."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bin, self.calls = folder / "repo", folder / "bin", folder / "calls"
        (self.repo / "tools").mkdir(parents=True)
        for name in ("constraints.txt", "setup.cfg", "tools/setup_env.sh"):
            shutil.copy(REPO / name, self.repo / name)
        self.bin.mkdir()
        for name in (*REAL_PROGRAMS, "flock"):
            program = shutil.which(name)
            if program:
                (self.bin / name).symlink_to(program)
        self.add("df", FAKE_DF.format(free_kb=90 << 20))
        self.add("c++", "#!/bin/sh\n")
        self.add("python3", FAKE_PYTHON.format(version="3.11"))

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.repo / "tools" / "setup_env.sh"],
            env={"PATH": str(self.bin), "CALLS": str(self.calls), "FAIL": "", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **env: str) -> tuple[int, str]:
        """Exit status and standard error."""
        process = self.start(**env)
        _, err = process.communicate(timeout=30)
        return process.returncode, err

    def installs(self) -> list[str]:
        """The `pip install` calls since the last time."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line for line in lines if "pip install" in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_refused(machine: Machine, *expected: str, **env: str) -> None:
    status, err = machine.run(**env)
    assert status == 1
    assert err.startswith("set-up: ")
    assert err.count("\n") == 1, err
    for text in expected:
        assert text in err
    assert not machine.installs()


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.13"])
def test_refuses_other_pythons_and_says_what_it_found(machine: Machine, version: str) -> None:
    machine.add("python3", FAKE_PYTHON.format(version=version))
    assert_refused(machine, "3.10, 3.11 or 3.12 is needed", f"python3 is {version}", "PYTHON=")


def test_refuses_a_machine_without_python(machine: Machine) -> None:
    machine.add("python3", "#!/bin/sh\necho 'shim: not installed' >&2\nexit 127\n")
    assert_refused(machine, "is needed (found: none that runs)")


def test_takes_a_later_candidate_when_python3_is_too_new(machine: Machine) -> None:
    machine.add("python3", FAKE_PYTHON.format(version="3.13"))
    machine.add("python3.10", FAKE_PYTHON.format(version="3.10"))
    assert machine.run() == (0, "")
    assert machine.run(PYTHON="python3.10") == (0, "")
    status, err = machine.run(PYTHON="python3")
    assert (status, err.count("\n")) == (1, 1)
    assert "is Python 3.13 but .venv was made with 3.10" in err


def test_refuses_a_python_without_venv(machine: Machine) -> None:
    assert_refused(machine, "lacks the venv module", "python3.11-venv", FAIL="ensurepip")


def test_refuses_a_machine_without_compiler(machine: Machine) -> None:
    (machine.bin / "c++").unlink()
    assert_refused(machine, "no C++ compiler", "c++, g++, clang++", "apt install g++")
    assert_refused(machine, "looked for icpx", CXX="icpx")


def test_refuses_a_python_without_headers(machine: Machine) -> None:
    assert_refused(machine, "lacks the header Python.h", "python3.11-dev", FAIL="Python.h")


def test_refuses_a_full_disk(machine: Machine) -> None:
    machine.add("df", FAKE_DF.format(free_kb=3 << 20))
    assert_refused(machine, "not enough disk", "needs 10 GB free and has 3 GB")
    assert not (machine.repo / ".venv").exists()


def test_second_run_does_nothing_until_an_input_changes(machine: Machine) -> None:
    assert machine.run() == (0, "")
    assert machine.installs()
    assert machine.run() == (0, "")
    assert not machine.calls.exists()
    for name in ("constraints.txt", "setup.cfg"):
        with (machine.repo / name).open("a") as file:
            file.write("# changed\n")
        assert machine.run() == (0, "")
        assert machine.installs()


def test_failed_update_is_not_forgotten_when_the_change_is_taken_back(machine: Machine) -> None:
    before = (machine.repo / "constraints.txt").read_text()
    assert machine.run() == (0, "")
    (machine.repo / "constraints.txt").write_text("")
    assert machine.run(FAIL="-e .[openmmlab")[0] == 1
    (machine.repo / "constraints.txt").write_text(before)
    machine.installs()
    assert machine.run() == (0, "")
    assert machine.installs()


def test_moved_repository_is_set_up_again(machine: Machine, tmp_path: Path) -> None:
    assert machine.run() == (0, "")
    machine.installs()
    machine.repo = machine.repo.rename(tmp_path / "elsewhere")
    assert machine.run() == (0, "")
    assert machine.installs()


def test_pip_failure_is_one_sentence_and_the_next_run_goes_on(machine: Machine) -> None:
    status, err = machine.run(FAIL="-e .[openmmlab")
    assert (status, err.count("\n")) == (1, 1)
    assert "pip failed: ERROR: No matching distribution found" in err
    assert ".venv/setup.log" in err
    assert "more words" in (machine.repo / ".venv" / "setup.log").read_text()
    machine.calls.unlink()
    assert machine.run() == (0, "")
    assert "-m venv" not in machine.calls.read_text()
    assert machine.run() == (0, "")


def test_mmcv_that_does_not_load_is_compiled_again_with_nvcc_where_there_is_a_gpu(machine: Machine) -> None:
    """The fake torch sees a GPU: it answers every question with yes."""
    status, err = machine.run(FAIL="mmcv.ops")
    assert (status, err.count("\n")) == (1, 1)
    assert "compiled ops do not load" in err
    installs = machine.installs()
    assert ["--no-cache-dir" in line for line in installs if line.endswith("onedl-mmcv")] == [False, True]
    assert any("cuda-toolkit[nvcc" in line for line in installs)


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock nothing guards against two set-ups at once")
def test_two_at_once_install_once(machine: Machine) -> None:
    assert machine.run() == (0, "")
    alone = len(machine.installs())
    (machine.repo / ".venv" / "ready").unlink()
    both = [machine.start(), machine.start()]
    for process in both:
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 0
    assert len(machine.installs()) == alone


def test_wheel_carries_configs_and_weights(tmp_path: Path) -> None:
    """So that `pe_spatial::x.py` and the demo work after `pip install .`, without the repository."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("pe_spatial", "configs"):
        shutil.copytree(REPO / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "-q", "--no-deps", "--no-build-isolation", "-w", "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").iterdir()
    carried = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"pe_spatial/.mim/{path.relative_to(REPO)}" for path in (REPO / "configs").rglob("*.py")}
    assert len(expected) > 30
    assert expected <= carried
    assert "pe_spatial/synthetic/pe_synthetic_xs8_192.safetensors" in carried
    assert any(
        b"pe-spatial = pe_spatial.cli.main:main" in zipfile.ZipFile(wheel).read(name)
        for name in carried
        if name.endswith("entry_points.txt")
    )


def test_no_file_names_an_index_host_or_a_place_on_one_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    hosts = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|index[-_]url\b|--find-links"
    unwanted = re.compile(hosts + r"|(?<![\w.}$-])/(?:home|root|Users|work)/")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = REPO / name
        if not path.is_file() or b"\0" in (data := path.read_bytes())[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if path != Path(__file__) and unwanted.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found
    assert unwanted.search('path = "/home/someone/data"')
    assert not unwanted.search("https://example.com/{0}/ and ../{0}/x and {0}_dirs/demo/".format("work"))


def test_pre_commit_runs_the_pinned_ruff():
    pinned = re.search(r"^ruff==\S+", (REPO / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert f"[{pinned}]" in (REPO / ".pre-commit-config.yaml").read_text()
