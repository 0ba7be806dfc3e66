"""Runs the source of CUDA kernels on the CPU and checks every access; README.md says how."""
