"""What tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAGES = [
    "load the model ...",
    "capture and check against eager FP32 ...",
    "calibrate ...",
    "plan and rewrite ...",
    "compare with FP32 ...",
    "measure time and memory ...",
    "attribute the error ...",
    "judge ...",
]


def decisions(folder: Path, name: str = "model") -> dict[str, dict[str, Any]]:
    text = (folder / "reports" / name / "report.json").read_text(encoding="utf-8")
    return {row["node"]: row for row in json.loads(text)["plan"]["decisions"]}
