"""Data sets that live on the device: labelled images, in three disjoint splits."""

from l2l_lightning.data.images import Images
from l2l_lightning.data.loading import DataCorruptedError, DataNotFoundError, ImageSplits, load_images

__all__ = ["DataCorruptedError", "DataNotFoundError", "ImageSplits", "Images", "load_images"]
