"""How a model's folder says that hidden states become an embedding."""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.scheduler.types import Pooling

MODES = {"pooling_mode_lasttoken": Pooling.LAST, "pooling_mode_mean_tokens": Pooling.MEAN}
NAMES = {"lasttoken": Pooling.LAST, "mean": Pooling.MEAN}


def pooling_of(folder: Path) -> tuple[Pooling, str | None]:
    """What sentence-transformers' files in the folder ask for, else the last token; and a warning where they
    ask for something else. Source: sentence-transformers, `modules.json` and `Pooling`'s config.json."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        [path] = [one["path"] for one in modules if one["type"].rsplit(".", 1)[-1] == "Pooling"]
        config = json.loads((folder / path / "config.json").read_bytes())
    except FileNotFoundError:
        return Pooling.LAST, None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return Pooling.LAST, f"{folder / 'modules.json'} says nothing of pooling that can be read: {error}"
    asked = {name for name, value in config.items() if value is True and name.startswith("pooling_mode_")}
    found = [MODES[name] for name in asked if name in MODES]
    if "pooling_mode" in config:
        asked = {str(config["pooling_mode"])}
        found = [NAMES[name] for name in asked if name in NAMES]
    if len(asked) == len(found) == 1:
        return found[0], None
    return Pooling.LAST, f"pooling by {', '.join(sorted(asked)) or 'nothing'} is not there: the last token's"
