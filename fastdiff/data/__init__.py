"""Captioned pictures: readers of both layouts, the exact training stream, embedded data sets."""

from fastdiff.data.faults import BadRecord, BadSampleError, BadSampleLimit
from fastdiff.data.readers import open_dataset
from fastdiff.data.samples import BadSample, CaptionedImages, Sample
from fastdiff.data.stream import StreamConfig, make_loader
from fastdiff.data.transforms import to_square_tensor

__all__ = [
    "BadRecord",
    "BadSample",
    "BadSampleError",
    "BadSampleLimit",
    "CaptionedImages",
    "Sample",
    "StreamConfig",
    "make_loader",
    "open_dataset",
    "to_square_tensor",
]
