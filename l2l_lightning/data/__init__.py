"""Data sets that live on the device: labelled images, in three disjoint splits."""

from l2l_lightning.data.data_sets import DATA_SETS, DataSet
from l2l_lightning.data.images import Images
from l2l_lightning.data.loading import load_images
from l2l_lightning.data.splits import ImageSplits
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

__all__ = [
    "DATA_SETS",
    "DataCorruptedError",
    "DataNotFoundError",
    "DataSet",
    "ImageSplits",
    "Images",
    "load_images",
]
