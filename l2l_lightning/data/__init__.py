"""What tasks draw from: images by name, a text, or data of the user's own, in three disjoint splits."""

from l2l_lightning.data.data_sets import DATA_SETS, DataSet
from l2l_lightning.data.examples import Examples, TensorExamples
from l2l_lightning.data.images import Images
from l2l_lightning.data.loaded import LoadedExamples
from l2l_lightning.data.loading import load_images
from l2l_lightning.data.splits import ImageSplits, Splits
from l2l_lightning.data.text import TextWindows, load_text
from l2l_lightning.errors import DataCorruptedError, DataError, DataNotFoundError

__all__ = [
    "DATA_SETS",
    "DataCorruptedError",
    "DataError",
    "DataNotFoundError",
    "DataSet",
    "Examples",
    "ImageSplits",
    "Images",
    "LoadedExamples",
    "Splits",
    "TensorExamples",
    "TextWindows",
    "load_images",
    "load_text",
]
