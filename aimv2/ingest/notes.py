"""Lines on what may go unseen in a preparation: captions elsewhere, shards without columns, files without a tar."""

import os
from pathlib import Path

from aimv2.data.images import MOST_BYTES
from aimv2.data.shard_index import read_index
from aimv2.ingest.measures import find_caption, parse_json
from aimv2.ingest.prepared_folder import find_orphans, shards_with_columns
from aimv2.ingest.selection import Selection

MOST_NAMED = 20  # things of one kind
LOOKED_AT = 100  # samples of the first shard


def find_notes(folder: Path, selection: Selection) -> list[str]:
    notes = []
    if selection.captions and not any(selection.captions.values()) and (names := _caption_names(selection.shards[0])):
        notes.append(f"Captions may be in --captions json:KEY; the json members have: {_listed(names)}")
    missing = {shard.name for shard in selection.shards} - (found := shards_with_columns(folder))
    if found and missing:
        notes.append(f"{len(missing):,} shards have no columns of COYO: run `make_shards.py coyo` again")
    if orphans := find_orphans(folder):
        notes.append(f"Without a tar: {_listed(orphans)}")
    return notes


def _caption_names(shard: Path) -> list[str]:
    """What could be captions in the first json member that has any."""
    index = read_index(shard)
    with open(shard, "rb", buffering=0) as file:
        for row in range(min(index.rows, LOOKED_AT)):
            for extension, offset, size, _ in index.members(row):
                if extension == "json" and size <= MOST_BYTES:
                    fields = parse_json(os.pread(file.fileno(), size, offset))
                    names = [name for name in fields if find_caption(f"json:{name}", None, fields) is not None]
                    if names:
                        return names
    return []


def _listed(names: list[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else "")
