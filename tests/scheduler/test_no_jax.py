"""The scheduler is host bookkeeping: it must import where there is no jax."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
for name in ("jax", "jaxlib", "flax", "tokenizers", "transformers", "torch"):
    sys.modules[name] = None
import jaxserve.scheduler.scheduler
from jaxserve import SamplingParams
allowed = set(sys.stdlib_module_names) | {"numpy", "jaxserve", "__main__"}
others = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None} - allowed
# site-packages may load hooks of their own at start-up (editable installs, coverage)
print(sorted(name for name in others if not name.startswith(("_", "sitecustomize", "coverage"))))
print(sorted(name for name in sys.modules if name.startswith("jaxserve.") and "scheduler" not in name))
"""


def test_scheduler_imports_only_the_standard_library_and_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]
