"""The problems of the suite by family; each file registers its own when this package is imported."""

from l2l_lightning.reproduce.zero_shot.problems import factors, functions, generative, images, tables, text

__all__ = ["factors", "functions", "generative", "images", "tables", "text"]
