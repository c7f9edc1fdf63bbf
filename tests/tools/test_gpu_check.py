"""tools/gpu_check.py where there is no GPU: in small, in Triton's interpreter, with mistakes planted, and its goals and
table on made-up results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import interpreter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import gpu_table  # noqa: E402
from gpu import cases, goals, jobs  # noqa: E402

interpreted = pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))

SOME = "|".join([
    r"^triton, fp32: (1x1x1|0x17x8|certain.*|masked.*|all ignored|many blocks)$",
    r"^triton, bf16: (large.*|flat.*|everything, tau 1.7|adversarial|tiling 0 .*|layout: offset|rand.*)$",
    r"^triton, fp16: (0x17x8|1x2x8|mean)$",
    r"^blocked, (float64|bf16)",
    r"^(filter, bf16: .*and weight's|triton: two runs.*plain|blocked: two|triton: (a CUDA|torch)|a target)",
    r"2\*\*31",
])  # fmt: skip
"""Of each kind of check some."""


def run(out: Path, *options: str, script: str = "tools/gpu_check.py") -> tuple[int, dict[str, Any], str]:
    """Exit status, document and output. As much of harness as a bare checkout has: not what is installed."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(out.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--device", "cpu", "--workers", "1", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


@interpreted
def test_everything_in_small(tmp_path: Path) -> None:
    status, document, output = run(tmp_path / "out.json", "--only", SOME, "--combinations", "1", "--tune")
    assert status == 0, output
    counts = document["counts"]
    assert counts["passed"] > 50
    assert counts["failed"] == counts["not run"] == counts["unsupported"] == 0
    names = [check["name"] for check in document["checks"]]
    assert len(set(names)) == len(names)
    assert all(error <= tolerance for check in document["checks"] for error, tolerance in check["errors"].values())
    assert any(0 < check.get("kept_share", 0) < 0.9 for check in document["checks"])
    assert document["machine"]["torch"]
    assert str(document["seed"]) in output
    for shape in document["speed"]:
        done = {method["name"]: method for method in shape["methods"] if "milliseconds" in method}
        assert {goals.OURS, goals.OURS_BF16, goals.FORWARD, goals.COMPILED, "blocked", "torch, plain"} <= {*done}
        assert all(method["right"] for method in done.values())
        assert done["blocked"]["rounds"] >= 1
        products = sum(product["milliseconds"] for product in shape["products"].values())
        plain = done["torch, plain"]
        assert plain["share_of_rate"] == pytest.approx(products / plain["milliseconds"])
        assert done[goals.FORWARD]["share_of_rate"] == pytest.approx(products / 3 / done[goals.FORWARD]["milliseconds"])
    assert [goal["what"] for goal in document["goals"]]
    for shape in document["tuning"]:
        assert "left_out" not in shape
        rows = [*shape["facts"], *shape["gradient"], *shape["steps"].values(), *shape["workspaces"], shape["graph"]]
        assert all(row["tflops"] > 0 for row in rows)
    assert Path(document["stored_tilings"]["file"]).exists()


@interpreted
@pytest.mark.slow
def test_every_check_in_small(tmp_path: Path) -> None:
    status, _, output = run(tmp_path / "out.json", "--parts", "A", "--combinations", "24")
    assert status == 0, output


WITH_MISTAKES = """
import runpy, sys
sys.path.insert(0, {tools!r})
from gpu.source import find_kernels
find_kernels()
from harness.kernels.linear_cross_entropy.fused import passes
accumulate, run_gradient = passes.accumulate, passes.run_gradient
def wrong_last_row(out, *arguments, **options):
    accumulate(out, *arguments, **options)
    out[-1:] *= 1.3
def nothing_written(head, tiling, strip, coefficients, tops, kept, out, *arguments, **options):
    if head.bias is not None:
        run_gradient(head, tiling, strip, coefficients, tops, kept, out, *arguments, **options)
    else:
        out[-1, -1] = float("nan")
passes.accumulate, passes.run_gradient = wrong_last_row, nothing_written
sys.argv[0] = {worker!r}
runpy.run_path({worker!r}, run_name="__main__")
"""
WITH_WORKER = """
import sys
sys.path.insert(0, {tools!r})
import gpu_check
gpu_check.WORKER_COMMAND = [sys.executable, {worker!r}]
sys.exit(gpu_check.main())
"""


@interpreted
def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    tools, real = str(ROOT / "tools"), str(ROOT / "tools/gpu/worker.py")
    worker, script = tmp_path / "worker.py", tmp_path / "script.py"
    worker.write_text(WITH_MISTAKES.format(tools=tools, worker=real))
    script.write_text(WITH_WORKER.format(tools=tools, worker=str(worker)))
    only = "^(triton|blocked), fp32: (bias|softcap)$"
    status, document, output = run(tmp_path / "out.json", "--parts", "A", "--only", only, script=str(script))
    assert status == 1
    assert document["counts"] == {"passed": 2, "failed": 2, "not run": 0, "unsupported": 0}
    found = {check["name"]: check for check in document["checks"]}
    assert "FAILED triton, fp32: bias" in output
    errors = found["triton, fp32: bias"]["errors"]
    error, tolerance = errors["hidden's gradient, worst row"]
    assert error > tolerance
    assert errors["loss"][0] <= errors["loss"][1]
    assert found["triton, fp32: softcap"]["outcome"] == "failed"
    assert found["triton, fp32: softcap"]["errors"]["hidden's gradient"][0] == "not finite"


WORKER = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
out = open(job["out"], "a", buffering=1)
def tell(**message): out.write(json.dumps(message) + "\\n")
tell(plan=["a", "b", "c", "d"])
for name in "abcd":
    if name in job["finished"] or name in job["lost"]: continue
    tell(begin=name)
    if name == "b":
        print("ouch", flush=True)
        os._exit(7)
    if name == "c": time.sleep(600)
    tell(result={"name": name})
tell(done=True)
"""


def test_work_that_dies_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    heard: list[dict[str, Any]] = []
    done = jobs.supervise(
        [{"part": "x"}], tmp_path, heard.append, deadline=time.monotonic() + 60, stall_seconds=2,
        command=[sys.executable, str(script)],
    )  # fmt: skip
    assert done
    assert [message["result"]["name"] for message in heard if "result" in message] == ["a", "d"]
    lost = {message["lost"]: message for message in heard if "lost" in message}
    assert set(lost) == {"b", "c"}
    assert "status 7" in lost["b"]["how"]
    assert "ouch" in lost["b"]["output"]
    assert "no sign of life" in lost["c"]["how"]


def test_a_worker_that_cannot_start_is_not_started_for_ever(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    assert jobs.supervise(
        [{"part": "x"}], tmp_path, heard.append, deadline=time.monotonic() + 60, stall_seconds=60, command=command
    )
    assert [message["lost"] for message in heard] == ["start"]
    assert "no such module" in heard[0]["output"]


def test_the_cases_for_a_gpu_can_be_drawn() -> None:
    pytest.importorskip("triton")
    from gpu.device import Device
    from gpu.problems import draw

    found = cases.list_cases("cuda", 1, 30)
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    said = {name for case in found for name in (*case.tensors, *case.settings, *case.outputs)}
    assert {"bias", "class_weights", "token_weights", "perturbed_hidden", *cases.ALL_OUTPUTS} <= said
    assert {"shift", "label_smoothing", "z_loss", "softcap", "temperature", "reduction", "ignore_index"} <= said
    for case in found:
        if case.vocab_size < 2000 and (case.implementation, case.dtype) == ("triton", "bf16"):
            problem = draw(case, Device())
            assert all(leaf.isfinite().all() or name == "bias" for name, leaf in problem.leaves.items())


def made_up(dim: int, milliseconds: dict[str, float]) -> dict[str, Any]:
    nvd = {goals.FORWARD: 2, goals.OURS: 8, goals.OURS_BF16: 8}
    return {
        "name": f"8x16x{dim}",
        "shape": [8, 16, dim],
        "products_tflops": 700.0,
        "methods": [
            {
                "name": name,
                "ours": name in nvd,
                "nvd": nvd.get(name, 6),
                "milliseconds": value,
                "share_of_rate_at_8": 40 / value,
                "share_of_rate": 5 * nvd.get(name, 6) / value,
                "beyond_bytes": 1 << 20,
                "beyond_share": 0.02,
                "errors": {"loss": [1e-6, 1e-5], "other": ["not finite", 0.1]},
                "right": True,
            }
            for name, value in milliseconds.items()
        ]
        + [{"name": "QuACK", "ours": False, "nvd": 6, "error": "not there"}],
    }


def test_goals_are_judged() -> None:
    times = {goals.OURS: 53.0, goals.OURS_BF16: 50.0, goals.FORWARD: 12.0, goals.COMPILED: 51.0, "Liger": 80.0}
    judged = goals.judge([made_up(768, times), made_up(64, {"Liger": 1.0})])
    outcome = [(goal["met"], goal["figure"]) for goal in judged]
    assert outcome[:5] == [
        (True, pytest.approx(40 / 53)), (False, pytest.approx(40 / 53)), (True, pytest.approx(10 / 12)),
        (False, 0.02), (True, pytest.approx(50 / 51)),
    ]  # fmt: skip
    assert outcome[5:] == [(False, None)] * 4
    lines = goals.goal_lines(judged)
    assert lines[0].startswith("met")
    assert "NOT MET not measured" in lines[-1]
    assert "80.00 ms" in "\n".join(goals.shape_lines(made_up(64, {"Liger": 80.0})))


def test_the_table_is_made_of_the_newest_result(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    text = f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n"
    readme.write_text(text)
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert gpu_table.main([*arguments, "--check"]) == 1
    assert gpu_table.main(arguments) == 0
    assert "no run has been made yet" in readme.read_text()
    times = {goals.OURS: 50.0, goals.OURS_BF16: 48.0, goals.FORWARD: 12.5, goals.COMPILED: 60.0, "Liger": 96.0}
    counts = {"passed": 7, "failed": 0, "not run": 0, "unsupported": 0}
    shapes = [made_up(768, times)]
    for date, kind, name in (("2027-01-02", "cuda", "New"), ("2026-01-02", "cuda", "Old"), ("2028-01-01", "cpu", "No")):
        document = {
            "date": date, "machine": {"kind": kind, "name": name, "torch": "2", "triton": "3"}, "counts": counts,
            "speed": shapes, "goals": goals.judge(shapes),
        }  # fmt: skip
        (tmp_path / f"gpu_check_{name}.json").write_text(json.dumps(document))
    assert gpu_table.main(arguments) == 0
    after = readme.read_text()
    assert after.startswith(f"before\n{gpu_table.BEGIN}\n")
    assert after.endswith(f"{gpu_table.END}\nafter\n")
    assert "old" not in after
    assert "On one New" in after
    assert "| 8 × 16 × 768 | 700 | 80.0% | 80.0% | 2.0% | 0.80 | – | 0.50 (Liger) |" in after
    assert "- NOT MET 0.020" in after
    assert gpu_table.main([*arguments, "--check"]) == 0
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="must have the two lines"):
        gpu_table.main(arguments)


def test_readme_has_the_table_of_the_newest_result() -> None:
    assert gpu_table.main(["--check"]) == 0
