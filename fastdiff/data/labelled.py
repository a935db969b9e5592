"""A folder of labelled pictures: one folder a label, the pictures in it at any depth."""

from __future__ import annotations

from pathlib import Path

from fastdiff.data.samples import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    BadSample,
    Sample,
    decode_image,
)


class LabelledFolder:
    """Pictures by index, label by label; the caption of a picture is the name of its label.

    Args:
        root: the folder.

    Attributes:
        labels: names of the folders that hold pictures, sorted; label y is labels[y].

    Raises:
        FileNotFoundError: no such folder.
        ValueError: fewer than two labels.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"LabelledFolder: {self.root} is no folder")
        self.labels: list[str] = []
        self._files: list[tuple[str, str]] = []  # label and path under the root
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir()):
            pictures = [
                str(path.relative_to(self.root))
                for path in folder.rglob("*")
                if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()
            ]
            if pictures:
                self.labels.append(folder.name)
                self._files += [(folder.name, name) for name in sorted(pictures)]
        if len(self.labels) < 2:
            raise ValueError(
                f"LabelledFolder: {len(self.labels)} labels in {self.root}; expected at least two "
                f"folders with pictures (.{', .'.join(IMAGE_EXTENSIONS)})"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        """Picture number `index`.

        Raises:
            BadSample: it cannot be used.
            IndexError: outside 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"LabelledFolder: index {index}; expected 0..{len(self) - 1}")
        label, name = self._files[index]
        try:
            path = self.root / name
            size = path.stat().st_size
            if size > MAX_IMAGE_BYTES:
                raise ValueError(f"picture has {size} bytes; at most {MAX_IMAGE_BYTES} are read")
            return Sample(decode_image(path.read_bytes()), label, name)
        except (ValueError, OSError) as error:
            raise BadSample(name, str(self.root), str(error)) from None
