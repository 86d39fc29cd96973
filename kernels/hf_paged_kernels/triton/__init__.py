"""The Triton kernels: plans, kernel calls, launches and device code."""
