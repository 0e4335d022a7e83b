"""HoVer's own claims, read from its JSON files: nothing is downloaded.

Plain JSON, not the `datasets` library: `supporting_facts` mixes titles and numbers, which its tables refuse.
"""

import json
from pathlib import Path
from typing import Any

from .claims import REFUTED, SUPPORTED, Claim

FIELDS = ("uid", "claim", "supporting_facts", "label", "num_hops")


def read_claims(path: Path, hops: int) -> list[Claim]:
    """The claims with that many hops, each text once, in an order that does not depend on the files'.

    Args:
        path: A file with a JSON list of records, or a folder of such files.
        hops: Of the claims that are wanted.

    Raises:
        ValueError: nothing there, a record of another schema, or no claim with that many hops.
    """
    records = [record for file in _files(path) for record in _records(file)]
    claims = {record["claim"]: _claim(record) for record in records if record["num_hops"] == hops}
    if not claims:
        found = sorted({record["num_hops"] for record in records})
        raise ValueError(f"FST_HOVER_DATA {str(path)!r} has no claims with {hops} hops, only with {found}")
    return [claims[text] for text in sorted(claims)]


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise ValueError(
            f"FST_HOVER_DATA is {str(path)!r}, where there is no JSON: "
            "name HoVer's hover_train_release_v1.1.json, or a folder with that and others"
        )
    return files


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    for place, record in enumerate(records if isinstance(records, list) else [records]):
        _check(record, f"{file}, record {place}")
    return list(records)


def _check(record: Any, where: str) -> None:
    missing = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: a list of HoVer's records is wanted")
    if record["label"] not in (SUPPORTED, REFUTED):
        raise ValueError(f"{where} has the label {record['label']!r}: HoVer's test file has none, use train and dev")
    facts = record["supporting_facts"]
    if not facts or not all(isinstance(fact, list) and fact and isinstance(fact[0], str) for fact in facts):
        raise ValueError(f"{where} has supporting_facts {facts!r}: a list of [title, sentence number] is wanted")


def _claim(record: dict[str, Any]) -> Claim:
    titles = dict.fromkeys(fact[0] for fact in record["supporting_facts"])
    return Claim(record["claim"], tuple(titles), record["label"])
