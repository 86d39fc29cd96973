"""Functions that several kernels call on the device."""
