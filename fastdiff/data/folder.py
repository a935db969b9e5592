"""A folder of pictures with `metadata.jsonl`: one JSON object a line with `file_name` and `text`.

This is the layout of Hugging Face's "imagefolder". Only the offsets of the lines are kept in
memory; a line is parsed when its sample is read, so a rotten line costs one sample.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastdiff.data.samples import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    BadSample,
    Sample,
    caption_of,
    decode_image,
    parse_json,
)

METADATA_NAME = "metadata.jsonl"


class FolderDataset:
    """Captioned pictures of a folder, in the order of `metadata.jsonl`.

    A `file_name` must lie inside the folder, also after symbolic links are followed.

    Args:
        root: the folder.

    Raises:
        ValueError: `metadata.jsonl` has no line.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.metadata = self.root / METADATA_NAME
        self._lines = _line_spans(self.metadata)
        if len(self._lines) == 0:
            raise ValueError(f"open_dataset: {self.metadata} is empty")

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def fingerprint(self) -> str:
        """Contents of `metadata.jsonl` as 16 hex digits: equal on all ranks, and when a run is
        resumed, or index i does not mean the same sample."""
        with open(self.metadata, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`.

        Raises:
            BadSample: the line or the picture cannot be used.
            IndexError: outside 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"FolderDataset: index {index}; expected 0..{len(self) - 1}")
        key = f"line {index + 1}"
        try:
            fields = self._fields(index)
            name = fields.get("file_name")
            if not isinstance(name, str):
                raise ValueError("no 'file_name'")
            key = name
            caption = caption_of(fields, "text")
            return Sample(decode_image(self._read_image(name)), caption, key)
        except (ValueError, OSError) as error:
            raise BadSample(key, str(self.metadata), str(error)) from None

    def _fields(self, index: int) -> dict[str, object]:
        start, stop = self._lines[index].tolist()
        if stop - start > MAX_CAPTION_BYTES:
            raise ValueError(f"line has {stop - start} bytes; at most {MAX_CAPTION_BYTES} are read")
        with open(self.metadata, "rb") as file:
            file.seek(start)
            fields = parse_json(file.read(stop - start))
        if not isinstance(fields, dict):
            raise ValueError(f"line is {type(fields).__name__}; expected a JSON object")
        return fields

    def _read_image(self, name: str) -> bytes:
        if name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"file_name {name!r}; expected .{', .'.join(IMAGE_EXTENSIONS)}")
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"file_name {name!r} leads out of the folder")
        if not path.is_file():
            raise ValueError("no such file")
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"picture has {size} bytes; at most {MAX_IMAGE_BYTES} are read")
        return path.read_bytes()


def _line_spans(path: Path) -> np.ndarray:
    """(N, 2) int64: start and end in bytes of every line that is not blank."""
    spans, position = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                spans.append((position, position + len(line)))
            position += len(line)
    return np.array(spans, np.int64).reshape(-1, 2)
