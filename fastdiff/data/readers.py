"""Opening a data set of captioned pictures, whichever of the two layouts it has."""

from __future__ import annotations

from pathlib import Path

from fastdiff.data.folder import METADATA_NAME, FolderDataset
from fastdiff.data.shards import ShardDataset

_EXPECTED = (
    f"expected a folder with {METADATA_NAME} (lines with 'file_name' and 'text'), a folder of "
    "*.tar shards as img2dataset writes them (KEY.jpg|png|webp with KEY.txt|json), or one such tar"
)


def open_dataset(path: str | Path) -> FolderDataset | ShardDataset:
    """Open captioned pictures for reading by index; the layout is detected.

    Args:
        path: a folder with `metadata.jsonl`, a folder of `*.tar` shards, or one tar.

    Returns:
        A map-style data set: `len(ds)`, `ds[i]` -> Sample, or BadSample raised for a rotten one.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: neither layout, both, or nothing in it that can be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"open_dataset: {path} does not exist; {_EXPECTED}")
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(
                f"open_dataset: {path} is a {path.suffix or 'nameless'} file; {_EXPECTED}"
            )
        return ShardDataset([path])
    shards = [p for p in path.glob("*.tar") if p.is_file()]
    has_metadata = (path / METADATA_NAME).is_file()
    if shards and has_metadata:
        raise ValueError(
            f"open_dataset: {path} holds both {METADATA_NAME} and {len(shards)} tar shards; "
            "move one of them elsewhere"
        )
    if has_metadata:
        return FolderDataset(path)
    if shards:
        return ShardDataset(shards)
    names = sorted(p.name for p in path.iterdir())
    found = (
        f"found {len(names)} entries ({', '.join(names[:5])})" if names else "the folder is empty"
    )
    raise ValueError(f"open_dataset: no data in {path}: {found}; {_EXPECTED}")
