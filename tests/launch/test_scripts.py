"""The scripts without a job: clean, refusing what is missing or contradictory, and what they would start."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import LOCAL, ROOT, TORCHRUN, environment, shown

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch/slurm").iterdir()])
SOURCED = ("common.sh", "job.sh")
JOB = ["my config.yaml", "run.name=two words", "x='single' \"double\" $HOME * \\"]
PYTHON = f"{sys.prefix}/bin/python"
STATIC = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "localhost"}
C10D = {"NNODES": "3", "RDZV_ENDPOINT": "localhost:1234", "RDZV_ID": "run 7"}


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def command(script: Path, **variables: str) -> list[str]:
    """What SHOW_COMMAND=1 prints, as the shell would read it; without its first word, the number of threads."""
    done = shown(script, JOB, variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)[1:]


def refused(script: Path, arguments: list[str], variables: dict[str, str]) -> str:
    """The one line of a refusal."""
    done = shown(script, arguments, {"NPROC_PER_NODE": "2", **variables})
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize("script", [LOCAL, TORCHRUN], ids=lambda script: script.name)
def test_the_verb_is_what_starts(script: Path) -> None:
    known = {"NPROC_PER_NODE": "2", **(STATIC if script == TORCHRUN else {})}
    place = command(script, **known).index("harness")
    assert command(script, **known)[place + 1] == "train"
    assert command(script, **known, VERB="remove-norms")[place + 1] == "remove-norms"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    if script.name not in SOURCED:
        assert "set -euo pipefail\n" in text
        assert script.stat().st_mode & 0o111
    assert max(map(len, text.splitlines())) <= 120
    paths = set(re.findall(r"(?<![\w$.}*)-])/(?:\w+/)+\w+", text))
    assert paths <= {"/usr/bin/env", "/dev/null", "/etc/hosts"}, "a path that other machines may not have"


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: should be a whole number from 1 to 1024"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE=gpu: should be"),
        ({"OMP_NUM_THREADS": "-1"}, "OMP_NUM_THREADS=-1: should be"),
        ({"VENV": "/absent"}, "VENV=/absent: has no bin/python"),
        ({"VERB": "evaluate"}, "VERB=evaluate: should be train or remove-norms"),
    ],
)
@pytest.mark.parametrize("script", [LOCAL, TORCHRUN], ids=lambda script: script.name)
def test_both_refuse(script: Path, variables: dict[str, str], line: str) -> None:
    assert refused(script, JOB, {**(STATIC if script == TORCHRUN else {}), **variables}).startswith(
        f"launch/{script.name}: error: {line}"
    )


@pytest.mark.parametrize("script", [LOCAL, TORCHRUN], ids=lambda script: script.name)
def test_a_configuration_is_asked_for(script: Path) -> None:
    assert "error: no configuration; usage: launch/" in refused(script, [], {})


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, "NNODES is not set"),
        ({"NNODES": "2"}, "neither MASTER_ADDR (static rendezvous) nor RDZV_ENDPOINT (c10d) is set"),
        ({**STATIC, "NNODES": "1:2"}, "NNODES=1:2: should be a whole number"),
        ({**STATIC, "NODE_RANK": ""}, "NODE_RANK is not set; it is the number of this machine, 0 to 2"),
        ({**STATIC, "NODE_RANK": "3"}, "NODE_RANK=3: should be a whole number from 0 to 2"),
        ({**STATIC, "NODE_RANK": "09"}, "NODE_RANK=09: should be a whole number from 0 to 2"),
        ({**STATIC, "MASTER_PORT": "65536"}, "MASTER_PORT=65536: should be a whole number from 1 to 65535"),
        ({**STATIC, "MASTER_ADDR": "absent.invalid"}, "MASTER_ADDR: the name absent.invalid does not resolve"),
        ({**STATIC, "JOIN_TIMEOUT_SECONDS": "1.5"}, "JOIN_TIMEOUT_SECONDS=1.5: should be"),
        ({**STATIC, "RDZV_IS_HOST": "true"}, "RDZV_IS_HOST (c10d) and MASTER_ADDR (static) are both set"),
        ({**STATIC, "RDZV_LOCAL_ADDR": "10.0.0.1"}, "RDZV_LOCAL_ADDR (c10d) and MASTER_ADDR (static) are both set"),
        ({**C10D, "MASTER_ADDR": "localhost"}, "MASTER_ADDR (static) and RDZV_ENDPOINT (c10d) are both set"),
        ({**C10D, "MASTER_PORT": "1"}, "MASTER_PORT (static) and RDZV_ENDPOINT (c10d) are both set"),
        ({**C10D, "NODE_RANK": "0"}, "NODE_RANK (static) and RDZV_ENDPOINT (c10d) are both set"),
        ({**C10D, "RDZV_ENDPOINT": "localhost"}, "RDZV_ENDPOINT=localhost: should be HOST:PORT"),
        ({**C10D, "RDZV_ENDPOINT": "absent.invalid:1"}, "RDZV_ENDPOINT: the name absent.invalid does not resolve"),
        ({**C10D, "RDZV_ID": ""}, "RDZV_ID is not set"),
        ({**C10D, "RDZV_IS_HOST": "yes"}, "RDZV_IS_HOST=yes: should be true"),
    ],
)
def test_torchrun_refuses(variables: dict[str, str], line: str) -> None:
    assert refused(TORCHRUN, JOB, variables).startswith(f"launch/torchrun.sh: error: {line}")


def test_the_commands() -> None:
    head, tail = [PYTHON, "-m", "harness.launcher"], ["--max-restarts=0", "-m", "harness", "train", *JOB]
    assert command(LOCAL, NPROC_PER_NODE="3") == [*head, "--standalone", "--nproc-per-node=3", *tail]
    nodes = ["--nnodes=3", "--nproc-per-node=4"]
    static = ["--node-rank=2", "--master-addr=localhost", "--rdzv-id=harness", "--rdzv-conf=timeout=600"]
    c10d = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:1234", "--rdzv-id=run 7"]
    for variables, options in (
        (STATIC, [*static[:2], "--master-port=29500", *static[2:]]),
        ({**STATIC, "MASTER_PORT": "77", "RDZV_ID": "8"}, [*static[:2], "--master-port=77", "--rdzv-id=8", static[3]]),
        (C10D, [*c10d, "--rdzv-conf=join_timeout=600"]),
        (
            {**C10D, "RDZV_IS_HOST": "false", "RDZV_LOCAL_ADDR": "10.0.0.1", "JOIN_TIMEOUT_SECONDS": "30"},
            [*c10d, "--rdzv-conf=join_timeout=30,is_host=false", "--local-addr=10.0.0.1"],
        ),
    ):
        assert command(TORCHRUN, NPROC_PER_NODE="4", **variables) == [*head, *nodes, *options, *tail]


def test_processes_and_threads_follow_the_machine(tmp_path: Path) -> None:
    """One process a GPU; the cores are shared out."""
    executable(tmp_path / "nproc", "echo 11")
    smi = executable(tmp_path / "nvidia-smi", "exit 9")
    path = f"{tmp_path}:{environment()['PATH']}"

    def chosen(script: Path, **variables: str) -> str:
        done = shown(script, JOB, {**STATIC, "RDZV_ID": "", "PATH": path, "OMP_NUM_THREADS": "", **variables})
        processes = re.search(r"--nproc-per-node=(\d+)", done.stdout)
        assert processes, done
        return f"{processes[1]} x {done.stdout.split()[0].removeprefix('OMP_NUM_THREADS=')}"

    assert [chosen(LOCAL), chosen(TORCHRUN)] == ["2 x 5", "1 x 11"]  # no GPU
    assert chosen(LOCAL, NPROC_PER_NODE="20") == "20 x 1"
    assert chosen(LOCAL, OMP_NUM_THREADS="7") == "2 x 7"
    executable(smi, "printf 'GPU 0: A (UUID: x)\\n  MIG 1g Device 0: (UUID: MIG-GPU-y)\\nGPU 1: A\\nGPU 2: A\\n'")
    assert [chosen(LOCAL), chosen(TORCHRUN)] == ["3 x 3", "3 x 3"]
    for visible, expected in (("", 2), ("-1", 2), ("NoDevFiles", 2), ("1", 1), ("0,2,5,7", 4), ("GPU-a,GPU-b", 2)):
        assert chosen(LOCAL, CUDA_VISIBLE_DEVICES=visible).split()[0] == str(expected), visible


@pytest.mark.parametrize(("script", "variables"), [(LOCAL, {}), (TORCHRUN, STATIC)], ids=["local.sh", "torchrun.sh"])
def test_the_command_is_run_and_its_status_passed_on(script: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """From another folder, by a relative path; both streams reach the terminal."""
    fake = '[[ $1 == -c ]] && exit 0; printf "%s|" "$OMP_NUM_THREADS" "$NCCL_SOCKET_IFNAME" "$@"; echo "E" >&2; exit 7'
    executable(tmp_path / "venv/bin/python", fake)
    executable(tmp_path / "bin/nproc", "echo 12")
    (tmp_path / "link").symlink_to(ROOT)
    variables = environment(NPROC_PER_NODE="2", VENV="venv", NCCL_SOCKET_IFNAME="ib0", **variables)
    del variables["OMP_NUM_THREADS"]
    done = subprocess.run(
        [f"link/launch/{script.name}", *JOB],
        cwd=tmp_path,
        env={**variables, "PATH": f"{tmp_path / 'bin'}:{variables['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (7, "E\n")
    words = done.stdout.split("|")
    assert words[:2] == ["6", "ib0"]
    assert words[-len(JOB) - 1 :] == [*JOB, ""]


@pytest.mark.parametrize(("script", "variables"), [(LOCAL, {}), (TORCHRUN, STATIC)], ids=["local.sh", "torchrun.sh"])
def test_the_signal_of_slurm_is_ignored_until_python_has_handlers(
    script: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    """One that comes while the script looks for Python, and one that comes after exec."""
    fake = "kill -USR1 $PPID $$; [[ $1 == -c ]] || echo alive"
    executable(tmp_path / "venv/bin/python", fake)
    variables = environment(NPROC_PER_NODE="2", VENV=str(tmp_path / "venv"), **variables)
    parent = ["bash", "-c", 'trap : USR1; "$@"; exit $?', "bash"]  # of the script, which the second signal reaches too
    done = subprocess.run([*parent, str(script), *JOB], env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_the_python_is_found_and_looked_at(tmp_path: Path) -> None:
    """.venv of the repository before PATH; one without harness is refused."""
    copy = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", copy / "launch")
    script = copy / "launch/local.sh"
    path = {"PATH": f"{tmp_path / 'path'}:{environment()['PATH']}", "VENV": ""}
    on_path = executable(tmp_path / "path/python3", "exit 1")
    assert f"{on_path}: has not both harness and torch; set VENV" in refused(script, JOB, path)
    executable(on_path, "exit 0")
    assert command(script, NPROC_PER_NODE="2", **path)[0] == str(on_path)
    inside = executable(copy / ".venv/bin/python", "exit 0")
    assert command(script, NPROC_PER_NODE="2", **path)[0] == str(inside)
    assert command(script, NPROC_PER_NODE="2", PATH=path["PATH"], VENV=sys.prefix)[0] == PYTHON
