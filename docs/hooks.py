"""Pages that are generated join the navigation when they are there."""

from pathlib import Path
from typing import Any

GENERATED = {"Results": "results.md"}


def on_config(config: Any) -> Any:
    """Called by mkdocs with its configuration."""
    there = [{title: page} for title, page in GENERATED.items() if (Path(config["docs_dir"]) / page).is_file()]
    listed = [page for entry in config["nav"] for page in entry.values()]
    config["nav"] += [entry for entry in there if not set(entry.values()) & set(listed)]
    return config
