"""Facts about the built CUDA kernels. Their launchers are not typed: `xtoken.losses._cuda.Kernels` calls them."""

architectures: str
cuda_version: int
max_threads: int
