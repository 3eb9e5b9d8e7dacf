"""The text package knows nothing of devices, nor of the rest of jaxserve."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
for name in ("jax", "flax", "torch", "transformers"):
    sys.modules[name] = None
import jaxserve.text.detokenizer, jaxserve.text.stop_strings, jaxserve.text.tokenizer
print([name for name in sys.modules if name.startswith("jaxserve.") and not name.startswith("jaxserve.text")])
"""


def test_text_imports_nothing_of_ours_but_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
