"""The README's commands in subprocesses, tiny and offline, right and wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_test.core import store

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "memory_test" / "diffusion_profile"
TINY = [
    *("--model", "DiT-S/2", "--depth", "1", "--hidden-size", "32", "--num-heads", "2"),
    *("--image-size", "64", "--num-threads", "1", "--warmup", "0"),
]
SWEEP = """
base: {model: DiT-S/2, depth: 1, hidden_size: 32, num_heads: 2, image_size: 64,
       num_threads: 1, num_iter: 1, warmup: 0}
grid:
  experiment: [vanilla, ghost]
  batch_size: [1, 2]
"""


def call(*command: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command with this Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


def run(*arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run ``memory-test``."""
    return call("-m", "memory_test.cli", *arguments, cwd=cwd)


def test_the_seeds_command_with_both_spellings(tmp_path: Path) -> None:
    for index, dashes in enumerate((True, False)):
        flags = [f if dashes or not f.startswith("--") else "--" + f[2:].replace("-", "_") for f in TINY]
        rest = ["--patch-size", 2, "--in-channels", 4, "--batch-size", 1, "--num-iter", 2]
        rest = [str(f) if dashes or not str(f).startswith("--") else "--" + str(f)[2:].replace("-", "_") for f in rest]
        output = tmp_path / f"{index}.json"
        done = call(SCRIPTS / "single_experiment.py", "--experiment", "ghost", "--output", output, *flags, *rest)
        assert done.returncode == 0, done.stderr
        record = store.load(output)
        assert record.status == "ok"
        assert len(record.step_times_s) == 2
        assert "T=16" in done.stderr
        assert str(output) in done.stdout


def test_sweep_resumes_reports_and_aggregates(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP)
    first = call(SCRIPTS / "run_sweep.py", "s.yaml", "--output-dir", "d", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    records = sorted((tmp_path / "d").glob("*.json"))
    assert len(records) == 4
    written = {path: path.stat().st_mtime_ns for path in records}
    records[0].unlink()
    second = call(SCRIPTS / "run_sweep.py", "s.yaml", "--output-dir", "d", cwd=tmp_path)
    assert second.returncode == 0
    assert "3 of 4 cells were finished earlier" in second.stderr
    again = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "d").glob("*.json"))}
    assert [path for path in written if written[path] != again[path]] == [records[0]]
    report = call(SCRIPTS / "aggregate.py", "d", "--output-dir", "r", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    for name in ("report.html", "report.md", "summary.csv"):
        assert (tmp_path / "r" / name).stat().st_size > 0
    assert "ghost" in report.stdout


def test_sweep_refuses_another_environment(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP.replace("[vanilla, ghost]", "[vanilla]").replace("[1, 2]", "[1]"))
    assert run("sweep", "s.yaml", "--output-dir", "d", cwd=tmp_path).returncode == 0
    (path,) = (tmp_path / "d").glob("*.json")
    data = json.loads(path.read_text())
    data["environment"]["torch_version"] = "0.0"
    path.write_text(json.dumps(data))
    before = path.read_bytes()
    refused = run("sweep", "s.yaml", "--output-dir", "d", cwd=tmp_path)
    assert refused.returncode == 2
    assert "torch_version=0.0" in refused.stderr
    assert "--on-mismatch rerun" in refused.stderr
    assert path.read_bytes() == before
    assert run("sweep", "s.yaml", "--output-dir", "d", "--on-mismatch", "rerun", cwd=tmp_path).returncode == 0
    assert store.load(path).environment.torch_version != "0.0"  # type: ignore[union-attr]


def test_interrupted_sweep_keeps_finished_cells(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP.replace("[1, 2]", "[1, 2, 4, 8, 16]"))
    process = subprocess.Popen(
        [sys.executable, "-m", "memory_test.cli", "sweep", "s.yaml", "--output-dir", "d"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(2400):
        if list((tmp_path / "d").glob("*.json")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "finished cells are kept" in stderr
    for path in (tmp_path / "d").iterdir():
        assert store.load(path).status == "ok"


def test_a_cell_that_cannot_run_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    missing = "{experiment: ghost, pretrained: true, model: /no, depth: null, hidden_size: null, num_heads: null}"
    (tmp_path / "s.yaml").write_text(SWEEP.replace("[1, 2]", "[1]") + f"cells:\n  - {missing}\n")
    done = run("sweep", "s.yaml", "--output-dir", "d", "--report", cwd=tmp_path)
    assert done.returncode == 1
    assert "2 ok, 1 error" in done.stdout
    assert (tmp_path / "d" / "report" / "report.html").exists()


def test_the_report_of_an_edited_sweep_leaves_older_cells_alone(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP.replace("[1, 2]", "[1]"))
    assert run("sweep", "s.yaml", "--output-dir", "d", cwd=tmp_path).returncode == 0
    for path in (tmp_path / "d").glob("*.json"):
        data = json.loads(path.read_text())
        data["environment"]["commit"] = "0" * 40
        path.write_text(json.dumps(data))
    (tmp_path / "s.yaml").write_text(SWEEP.replace("[1, 2]", "[3]"))
    done = run("sweep", "s.yaml", "--output-dir", "d", "--report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "d").glob("*.json"))) == 4
    assert "2 ok" in done.stdout


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    import psutil

    process = subprocess.Popen(
        [sys.executable, "-m", "memory_test.cli", "run", "--experiment", "vanilla", "--num-iter", "1000000", *TINY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    workers: list[psutil.Process] = []
    for _ in range(600):
        workers = [p for p in psutil.Process(process.pid).children() if "libtorch_cpu" in _maps(p.pid)]
        if workers:
            break
        time.sleep(0.05)
    assert workers
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("run",),
        ("sweep",),
        ("compare",),
        ("report",),
        ("inspect",),
        ("doctor",),
        ("predict",),
        ("plan",),
        ("calibrate",),
        ("cards",),
    ],
)
def test_help_needs_no_torch(arguments: tuple[str, ...]) -> None:
    code = f"import sys; from memory_test.cli import main; main([*{arguments!r}, '--help'])"
    probe = f"import atexit, sys; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules))); {code}"
    done = call("-c", probe)
    assert done.returncode == 0
    assert "usage" in done.stdout
    assert done.stderr.endswith("False")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), "run, sweep, compare, report, inspect, predict, plan, calibrate, cards, doctor"),
        (("run", "--experiment", "vanila"), "experiment: got 'vanila'; accepted: vanilla, "),
        (
            ("run", "--experiment", "ghost", "--in-channels", "5"),
            "in_channels: got 5; accepted: 1 (grey pixels), 3 (RGB",
        ),
        (("run", "--experiment", "ghost", "--batch-size", "0"), "batch_size: got 0; accepted: an integer >= 1"),
        (("run", "--experiment", "ghost", "--batch-size", "two"), "--batch-size"),
        (("run", "--experiment", "ghost", "--image-sze", "5"), "--image-size"),
        (("run",), "--experiment"),
        (("run", "--experiment", "ghost", "--output", "no/r.json"), "mkdir -p no"),
        (("sweep", "no.yaml", "--output-dir", "d"), "readable YAML"),
        (("sweep", "broken.yaml", "--output-dir", "d"), "valid YAML"),
        (("sweep", "bytes.yaml", "--output-dir", "d"), "valid YAML"),
        (("sweep", "text.yaml", "--output-dir", "d"), "write 1.0e-4 instead"),
        (("sweep", "type.yaml", "--output-dir", "d"), "batch_size"),
        (("sweep", "range.yaml", "--output-dir", "d"), "batch_size: got 0"),
        (("sweep", "devices.yaml", "--output-dir", "d"), "device: got 'cpu, cuda'"),
        (("sweep", "key.yaml", "--output-dir", "d"), "batchsize"),
        (("sweep", "good.yaml", "--output-dir", "no/d"), "mkdir -p"),
        (("sweep", "good.yaml", "--output-dir", "good.yaml"), "this is a file"),
        (("compare", "no.yaml", "--output-dir", "d"), "comparison: got 'no.yaml'; accepted: a readable YAML"),
        (("compare", "good.yaml", "--output-dir", "d"), "key: got 'grid'; accepted: name, "),
        (("compare", "good.yaml", "--output-dir", "d", "--on-mismatch", "mix"), "on_mismatch: got 'mix'"),
        (("compare", "engine_cpu", "--output-dir", "no/d"), "mkdir -p"),
        (("report", "no"), "existing folder of records"),
        (("report", "half"), "complete JSON"),
        (("report", "newer"), "newer memory-test"),
        (("inspect", "--model", "no_such_module:model"), "no_such_module"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("base: [unclosed")
    (tmp_path / "good.yaml").write_text(SWEEP)
    (tmp_path / "bytes.yaml").write_bytes(b"base: \xff\xfe")
    (tmp_path / "type.yaml").write_text("base: {batch_size: four}\ngrid: {experiment: [ghost]}")
    (tmp_path / "range.yaml").write_text("base: {batch_size: 0}\ngrid: {experiment: [ghost]}")
    (tmp_path / "devices.yaml").write_text("grid: {experiment: [ghost], device: [cpu, cuda]}")
    (tmp_path / "text.yaml").write_text("base: {learning_rate: 1e-4}\ngrid: {experiment: [ghost]}")
    (tmp_path / "key.yaml").write_text("base: {batchsize: 4}\ngrid: {experiment: [ghost]}")
    for name, content in (("half", '{"schema_version": 1, "sta'), ("newer", '{"schema_version": 99}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text(content)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("memory-test: error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
