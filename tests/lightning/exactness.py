"""What is the same bit for bit in any company: with compiled kernels."""

import torch
from l2l_kernels.cpu import library


def assert_identical(actual, expected):
    """Bit for bit, as the compiled kernels compute a coordinate: the same beside any others.

    Without a compiler the reference runs, whose matrix products torch sums in an order that depends on their
    size: then to a thousand roundings, as steps carry them on (1.8e-5 were seen in float32).
    """
    if library.load() is None:
        tolerance = 1000 * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
