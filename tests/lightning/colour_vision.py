"""Colours as readers with a colour vision deficiency see them, and how far apart two then are."""

import numpy as np

# Machado, Oliveira and Fernandes (2009), table 1 at severity 1.0: they act on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# sRGB to CIE XYZ, and the white of D65 (IEC 61966-2-1).
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(rgb):
    rgb = np.asarray(rgb, dtype=float)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb, deficiency="none"):
    """CIE L*a*b* of sRGB colours [..., 3], as seen with a deficiency."""
    seen = np.clip(linear(rgb) @ DEFICIENCIES[deficiency].T, 0, 1)
    relative = (seen @ XYZ.T) / WHITE
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def distance(one, other, deficiency="none"):
    """CIE 1976's colour difference; 2.3 is just noticeable side by side."""
    return float(np.linalg.norm(lab(one, deficiency) - lab(other, deficiency)))


def contrast(one, other):
    """WCAG 2's contrast ratio, in [1, 21]."""
    luminances = sorted(float(linear(rgb) @ XYZ[1]) for rgb in (one, other))
    return (luminances[1] + 0.05) / (luminances[0] + 0.05)
