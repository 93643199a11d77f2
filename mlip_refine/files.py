"""Writing files so that they appear whole or not at all."""

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, indented."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
