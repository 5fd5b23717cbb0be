"""The Triton kernels and their launchers; nothing here is imported before it is launched."""
