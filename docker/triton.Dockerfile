# Triton for GPUs: NVIDIA's image, and PyTorch with transformers and diffusers where the image has none.
# docker build -f docker/triton.Dockerfile --build-arg BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3 -t tritonmark/triton .
#
# The -vllm-python-py3 and -trtllm-python-py3 images have PyTorch already, and nothing is added to them.
# Never built by the project's own tests: NVIDIA's images could not be had there.
ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${BASE_IMAGE}
COPY docker/constraints.txt docker/serve.py /opt/docker/
# numpy below 2 is what Triton's python stub reads; NVIDIA's image pins it as well.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -c "import torch, transformers" 2>/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir \
    --constraint /opt/docker/constraints.txt "torch==2.13.0" transformers diffusers av pillow "numpy<2"
# Compiled code goes to /cache, a volume that outlives the container: its root is read-only, and so are the models. A
# volume takes over the mode of the folder here, so whoever the container runs as may write.
RUN install -d -m 1777 /cache /hub
ENV HOME=/tmp XDG_CACHE_HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton
USER 1000:1000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["curl", "-fsS", "http://127.0.0.1:8000/v2/health/ready"]
