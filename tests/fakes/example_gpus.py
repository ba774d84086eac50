"""GPUs that somebody might have, as `exporters.gpus` describes them: for tests of what fits where."""

from exporters.gpus import Gpu

GIB = 1 << 30
GTX_1080 = Gpu("NVIDIA GeForce GTX 1080", 6.1, 8 * GIB, 8 * GIB)
V100 = Gpu("Tesla V100-SXM2-16GB", 7.0, 16 * GIB, 16 * GIB)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 8.0, 80 * GIB, 80 * GIB)
L40S = Gpu("NVIDIA L40S", 8.9, 46068 << 20, 45500 << 20)
H100 = Gpu("NVIDIA H100 80GB HBM3", 9.0, 81559 << 20, 81000 << 20)
H200 = Gpu("NVIDIA H200", 9.0, 143771 << 20, 143000 << 20)
