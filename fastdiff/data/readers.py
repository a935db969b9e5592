"""Opening a data set of captioned pictures, whichever of the two layouts it has."""

from __future__ import annotations

from pathlib import Path

from fastdiff.data.cache import DEFAULT_FOLDER, ShardCache, is_remote, list_shards
from fastdiff.data.embeddings import Embeddings
from fastdiff.data.folder import METADATA_NAME, FolderDataset
from fastdiff.data.shards import ShardDataset

DEFAULT_CACHE_GIB = 64.0
_EXPECTED = (
    f"expected a folder with {METADATA_NAME} (lines with 'file_name' and 'text'), a folder of "
    "*.tar shards as img2dataset writes them (KEY.jpg|png|webp with KEY.txt|json), or one such tar"
)


def open_dataset(
    path: str | Path,
    *,
    embeddings: str | Path | None = None,
    encoder: str | None = None,
    cache: str | Path = DEFAULT_FOLDER,
    cache_gib: float = DEFAULT_CACHE_GIB,
) -> FolderDataset | ShardDataset:
    """Open captioned pictures for reading by index; the layout is detected.

    Args:
        path: a folder with `metadata.jsonl`, a folder of `*.tar` shards, or one tar; or an address
            of shards that fsspec knows: `s3://bucket/folder`, `gs://...`,
            `https://host/{00000..01242}.tar`, `file:///slow/mount`.
        embeddings: folder or address of stored text features (`fastdiff embed-text`) of the
            shards; each sample then has its `context`.
        encoder: label of the text encoder that they must be of; None accepts any.
        cache: local folder for remote files; processes of one machine share it.
        cache_gib: its largest size.

    Returns:
        A map-style data set: `len(ds)`, `ds[i]` -> Sample, or BadSample raised for a rotten one.

    Raises:
        FileNotFoundError: nothing at `path`, or no text features.
        ValueError: neither layout, both, or nothing in it that can be read.
        WrongEncoder: text features of another encoder.
    """
    remote = is_remote(path)
    store = None
    if remote or (embeddings is not None and is_remote(embeddings)):
        store = ShardCache(cache, int(cache_gib * 2**30))
    features = None if embeddings is None else Embeddings(embeddings, encoder, store)
    if remote:
        found = list_shards(str(path))
        if not found:
            raise ValueError(f"open_dataset: no *.tar shards in {path}")
        return ShardDataset(found, cache=store, embeddings=features)
    dataset = _open_local(Path(path).expanduser(), features)
    if features is not None and not isinstance(dataset, ShardDataset):
        raise ValueError(f"open_dataset: text features belong to tar shards; {path} holds none")
    return dataset


def _open_local(path: Path, features: Embeddings | None) -> FolderDataset | ShardDataset:
    if not path.exists():
        raise FileNotFoundError(f"open_dataset: {path} does not exist; {_EXPECTED}")
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(
                f"open_dataset: {path} is a {path.suffix or 'nameless'} file; {_EXPECTED}"
            )
        return ShardDataset([path], embeddings=features)
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
        return ShardDataset(shards, embeddings=features)
    names = sorted(p.name for p in path.iterdir())
    found = (
        f"found {len(names)} entries ({', '.join(names[:5])})" if names else "the folder is empty"
    )
    raise ValueError(f"open_dataset: no data in {path}: {found}; {_EXPECTED}")
