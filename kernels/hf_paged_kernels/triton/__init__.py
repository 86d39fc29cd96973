"""The Triton kernels: plans, launches and device code."""
