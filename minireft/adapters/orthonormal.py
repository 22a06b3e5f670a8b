"""Orthonormal rows from any matrix of full rank: the R of LoReFT.

Use:  R = orthonormalise(m)                      # m (..., r, C), all layers at once
See:  R Rᵀ = I within float32's rounding, the same R for any multiple of m.
"""

import torch
from torch import Tensor


def orthonormalise(m: Tensor) -> Tensor:
    """Rows of m (..., r, C) → orthonormal rows that span the same space: R = L⁻¹ M where M Mᵀ = L Lᵀ. O(C r²).

    A Cholesky factor of r × r numbers replaces the usual Householder map of C × C. Scaling M leaves R as it is, so weight
    decay cannot destroy it. The Gram matrix squares M's condition number, hence float64 inside. Row i of R depends on
    rows 0 ... i of M only. Rows of M that depend on each other give NaN, not an error: that would wait for a GPU.
    """
    wide = m.double()
    L, _ = torch.linalg.cholesky_ex(wide @ wide.mT)                       # (..., r, r)
    return torch.linalg.solve_triangular(L, wide, upper=False).to(m.dtype)
