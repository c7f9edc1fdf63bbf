"""requeue.sbatch with stand-ins for scontrol, srun and Python: when it requeues its job, and when its guard stops it.

What it shares with train.sbatch is tested in test_sbatch.py, both under a scheduler in test_slurm.py, test_requeue.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.launch.jobs import REQUEUE
from tests.launch.test_sbatch import SCONTROL, Spool
from tests.launch.test_scripts import JOB, executable

PYTHON = """
[[ $1 != -c ]] || exit 0
shift 3
case "$1" in
    path) echo "$RUN" ;;
    latest) cat "$RUN/newest" 2>/dev/null || echo ;;
esac
shift
printf '%s|' "$@" >>"$0.arguments"
"""
STATE = "JobId=1234567 JobName=harness JobState={} Reason=None Dependency=(null) Requeue=1 Restarts={} BatchFlag=1"


class Start(Spool):
    """Starts of one job. `run` is the run's folder, of which the stand-in for Python tells."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, REQUEUE)
        self.run_folder = folder / "runs/my run"
        self.record = self.run_folder / "slurm-starts.txt"
        self.python = executable(folder / "venv/bin/python", PYTHON)
        self.trains(0)
        self.state("RUNNING", 0)

    def trains(self, status: int, until: int | None = None, *, before: str = "") -> None:
        """What srun does: a run that saves its step `until` and ends with a status."""
        saves = f'mkdir -p "$RUN"; echo {until} >"$RUN/newest"' if until is not None else ""
        executable(self.srun, f'printf "%s\\n" "$@" >"$0.arguments"\n{before}\n{saves}\nexit {status}')

    def state(self, state: str, restarts: int) -> None:
        """What SLURM says of the job when the ranks have ended."""
        answers = f"""
case "$*" in
    "requeue "*) echo "$2" >>"$0.requeued"; exit 0 ;;
    "--oneliner show job "*) echo "{STATE.format(state, restarts)}"; exit 0 ;;
esac
"""
        executable(self.scontrol, answers + SCONTROL)

    def start(self, number: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        count = {"SLURM_RESTART_COUNT": str(number)} if number else {}
        return self.run(*JOB, RUN=str(self.run_folder), VENV=str(self.folder / "venv"), **count, **variables)

    @property
    def requeued(self) -> bool:
        path = Path(f"{self.scontrol}.requeued")
        assert not path.exists() or path.read_text() == "1234567\n"
        return path.exists()

    @property
    def started(self) -> bool:
        return Path(f"{self.srun}.arguments").exists()


@pytest.fixture
def job(tmp_path: Path) -> Start:
    return Start(tmp_path)


def test_a_run_that_finishes(job: Start) -> None:
    """Its tasks are not ended when one of them is."""
    done = job.start(END_TIMEOUT_SECONDS="77")
    assert (done.returncode, done.stderr) == (0, "")
    assert not job.requeued
    arguments = Path(f"{job.srun}.arguments").read_text().splitlines()
    assert arguments[:3] == ["--kill-on-bad-exit=0", "--wait=77", "--nodes=2"]
    assert arguments[-len(JOB) :] == JOB
    assert job.record.read_text() == "job 1234567 start 0 from none\n"
    asked = Path(f"{job.python}.arguments").read_text()
    assert asked == 2 * ("|".join(JOB) + "|")  # where the run lies, and its newest checkpoint


def test_a_stopped_run_is_requeued(job: Start) -> None:
    job.trains(75, until=40)
    done = job.start()
    assert done.returncode == 75
    assert job.requeued
    assert "job 1234567: ended with status 75, step 40 is saved: requeued\n" in done.stdout


def test_without_a_new_checkpoint_it_is_not(job: Start) -> None:
    job.trains(75, until=40)
    job.start()
    Path(f"{job.scontrol}.requeued").unlink()
    job.state("RUNNING", 1)
    job.trains(75)
    for number in (2, 3):  # the guard of start 3 has nothing to do with it: another job
        done = job.start(number, SLURM_JOB_ID="7" * number)
        assert done.returncode == 75
        assert not job.requeued
        assert "ended with status 75 without a new checkpoint (newest: step 40): not requeued\n" in done.stdout


@pytest.mark.parametrize("status", [1, 2, 130, 137, 143])
def test_another_status_is_the_jobs(job: Start, status: int) -> None:
    job.trains(status, until=40)
    assert job.start().returncode == status
    assert not job.requeued


@pytest.mark.parametrize(("state", "restarts"), [("COMPLETING", 0), ("PENDING", 1), ("RUNNING", 1), ("RUNNING", 10)])
def test_what_slurm_has_ended_is_slurms(job: Start, state: str, restarts: int) -> None:
    """scancel or the time limit; a failed node: the job waits, or runs again, while this start of it ends."""
    job.state(state, restarts)
    job.trains(75, until=40)
    done = job.start()
    assert done.returncode == 75
    assert not job.requeued
    assert "step 40 is saved; this start of it is over: not requeued from here\n" in done.stdout


def test_the_guard(job: Start) -> None:
    """It sees starts that SLURM brought about as well: nothing is left to the end of the start before."""
    job.run_folder.mkdir(parents=True)
    newest = job.run_folder / "newest"
    newest.write_text("40\n")
    assert job.start().returncode == 0
    newest.write_text("50\n")
    assert job.start(1).returncode == 0
    Path(f"{job.srun}.arguments").unlink()
    done = job.start(2)
    assert done.returncode == 2
    assert not job.started
    assert done.stderr.startswith(
        "launch/slurm/requeue.sbatch: error: job 1234567: no new checkpoint since its last start (newest: step 50); "
    )
    assert done.stderr.count("\n") == 1
    newest.write_text("60\n")
    assert job.start(3).returncode == 0
    assert [line.split(" start ")[1] for line in job.record.read_text().splitlines()] == [
        "0 from step 40",
        "1 from step 50",
        "3 from step 60",
    ]


def test_the_guard_of_a_run_without_a_checkpoint(job: Start) -> None:
    assert job.start().returncode == 0
    done = job.start(1)
    assert done.returncode == 2
    assert "(newest: none)" in done.stderr


def test_the_guard_minds_starts_of_its_own_job_only(job: Start) -> None:
    """A new job may go on from where the last one stopped; and numbers begin again when a cluster is set up anew."""
    assert job.start(SLURM_JOB_ID="123456").returncode == 0
    assert job.start(1).returncode == 0  # its first start was ended before it wrote a line
    assert job.start(0).returncode == 0


def test_bad_input_is_said_by_harness(job: Start) -> None:
    executable(
        job.python, "[[ $1 != -c ]] || exit 0; echo 'harness checkpoint: error: my config.yaml: bad' >&2; exit 2"
    )
    done = job.start()
    assert (done.returncode, done.stderr) == (2, "harness checkpoint: error: my config.yaml: bad\n")
    assert not job.started


def test_the_shell_outlives_a_sigterm(job: Start) -> None:
    """SLURM sends one to the batch shell when it sends them to the ranks, which need time to save."""
    job.trains(75, until=40, before="kill -TERM $PPID; sleep 0.3")
    job.state("COMPLETING", 0)
    done = job.start()
    assert done.returncode == 75
    assert "not requeued from here" in done.stdout


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"SLURM_SUBMIT_DIR": "/"}, "HARNESS_ROOT=/: is not the repository"),
        ({"SLURM_JOB_ID": "unset"}, "not in a SLURM job; submit it: sbatch launch/slurm/requeue.sbatch"),
        ({"END_TIMEOUT_SECONDS": "0"}, "END_TIMEOUT_SECONDS=0: should be a whole number from 1 to 86400"),
    ],
)
def test_what_is_missing_is_said(job: Start, variables: dict[str, str], line: str) -> None:
    done = job.start(0, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/slurm/requeue.sbatch: error: {line}")
    assert done.stderr.count("\n") == 1
    assert not job.started
