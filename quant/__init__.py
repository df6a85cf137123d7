"""Quantised matrices on the CPU: block formats and the Numba kernels that compute with them.

NumPy, Numba and llvmlite only: no torch, no files, no printing. Matrices come as addresses into somebody else's memory
(QuantMatrix) and are never dequantised as a whole.
"""
