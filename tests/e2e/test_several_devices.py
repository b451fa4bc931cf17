"""The README's script for several devices, under torchrun with two processes on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"## Several devices\n.*?`torchrun (.*?)`.*?```python\n(.*?)```", re.DOTALL)
REPORT = """
from pathlib import Path
found = [(getattr(p, "full_tensor", lambda: p)()).tolist() for p in model.parameters()]
Path(f"rank{dist.get_rank()}").write_text(str(found))
"""


def run_script(folder: Path, edit: dict[str, str]) -> list[str]:
    """Run the script with some lines changed; return what each rank ended with."""
    found = SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    command, script = found.groups()
    script = script.replace("dist.destroy", REPORT + "dist.destroy")
    for before, after in edit.items():
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    (folder / "train.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split()],
        capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]
    return [(folder / f"rank{rank}").read_text(encoding="utf-8") for rank in range(2)]


FSDP2 = {
    "import torch\n": "import torch\nfrom torch.distributed.fsdp import fully_shard\n",
    "optimizer = torch.optim.AdamW(model.parameters())\n": "",
    "engine = attach(": "model = fully_shard(model)\nengine = attach(",
    '"bookkeeping"': '"ghost_fsdp_bk"',
    # FSDP2 keeps its mesh, and that the group, until the process ends; gloo's threads may then abort it.
    "dist.destroy_process_group()": "dist.destroy_process_group()\nimport os\nos._exit(0)",
    ", process_group=dist.group.WORLD)": ")\noptimizer = torch.optim.AdamW(engine.parameters.values())",
}


@pytest.mark.parametrize("edit", [{}, FSDP2], ids=["as it stands", "with fully_shard"])
def test_both_ranks_end_with_one_model(tmp_path: Path, edit: dict[str, str]) -> None:
    one, other = run_script(tmp_path, edit)
    assert one == other
    assert "nan" not in one
