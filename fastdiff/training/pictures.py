"""Pictures without captions, with or without labels, as the training stream reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from fastdiff.data.samples import Sample
from fastdiff.data.transforms import named_transform
from fastdiff.metrics.pictures import open_pictures


class TrainingPictures:
    """Pictures of a folder or an archive (`fastdiff.metrics.open_pictures`) by index.

    The label of a picture is the first folder on its path; it stands where others have a caption.

    Args:
        path: Folder of pictures, `.zip`, tar shards, `.npz`, `cifar-10-binary.tar.gz`.
        transform: Name of a crop (`fastdiff.data.transforms`), None for the stream's own.
        labelled: Whether the pictures lie in a folder for each label.

    Attributes:
        labels: Their names, sorted; label y is labels[y]. Empty without labels.

    Raises:
        FileNotFoundError, ValueError: Nothing there, no pictures, an unknown crop, or fewer than
            two labels.
    """

    def __init__(
        self, path: str | Path, *, transform: str | None = None, labelled: bool = False
    ) -> None:
        crop = None if transform is None else named_transform(transform)
        self.pictures = open_pictures(path, crop)
        self.labels: list[str] = []
        if labelled:
            self.labels = sorted({self._label(i) for i in range(len(self))} - {""})
            if len(self.labels) < 2:
                raise ValueError(
                    f"TrainingPictures: {len(self.labels)} labels in {path}; expected a folder or "
                    "an archive with a folder of pictures for each of at least two labels"
                )

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def fingerprint(self) -> str:
        """Names of all pictures as 16 hex digits: equal where index i means the same picture."""
        names = "\0".join(self.pictures.key(i) for i in range(len(self)))
        return hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _label(self, index: int) -> str:
        folder, slash, _ = self.pictures.key(index).partition("/")
        return folder if slash else ""

    def __getitem__(self, index: int) -> Sample:
        """Picture number `index`.

        Raises:
            BadSample: It cannot be read.
            IndexError: Outside 0..len - 1.
        """
        image = Image.fromarray(self.pictures[index])
        return Sample(image, self._label(index) if self.labels else "", self.pictures.key(index))
