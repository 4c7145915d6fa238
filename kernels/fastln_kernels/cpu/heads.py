"""Tensors of heads, as the compiled kernels take them."""

import ctypes
from ctypes import c_int64, c_void_p

from torch import Tensor


class Rows(ctypes.Structure):
    """The struct `Rows` in `heads.h`: a four-dimensional tensor whose last dimension is contiguous."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> "Rows":
        """Describe a tensor. It must live until the kernel has run."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3])
