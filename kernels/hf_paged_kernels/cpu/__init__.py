"""The C++ kernels: compiled with the system's compiler, kept in the user's cache."""
