# The embedded Triton (nvidia-pytriton's tritonserver) with PyTorch for the CPU, and the exporter of model repositories.
# docker build -f docker/cpu-server.Dockerfile -t tritonmark/cpu-server .
#
# BASE_IMAGE: any Debian-like image with python3 3.11 or 3.12, venv and libpython3.so. TORCH_INDEX_URL: where the
# CPU build of torch comes from, if pip's own index has none.
# A site's pip settings: --secret id=pip_conf,src=/etc/pip.conf (nothing of it stays in the image).
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
ARG TORCH_INDEX_URL=
RUN python3 -m venv /opt/tritonmark
ENV PATH=/opt/tritonmark/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Layers by how seldom they change: torch, the other dependencies, the project.
COPY scripts/install_torch.py docker/constraints.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    TORCH=cpu TORCH_INDEX_URL=${TORCH_INDEX_URL} PIP_CONSTRAINT=/src/constraints.txt python install_torch.py
COPY pyproject.toml docker/requirements.py ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python requirements.py embedded > requirements.txt && pip install --constraint constraints.txt -r requirements.txt
COPY README.md LICENSE tritonmark.py ./
COPY loadgen ./loadgen
COPY exporters ./exporters
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf pip install --no-deps .
# The server's private backend folder is made here, because the root of the running container is read-only.
RUN XDG_CACHE_HOME=/opt/tritonmark/cache python -c "from exporters.wheel import find_binary; find_binary()" \
    && chmod -R a+rX /opt/tritonmark/cache

FROM ${BASE_IMAGE}
ENV PATH=/opt/tritonmark/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    XDG_CACHE_HOME=/opt/tritonmark/cache
RUN useradd --uid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tritonmark \
    && install -d -m 1777 /models /hub
COPY --from=build /opt/tritonmark /opt/tritonmark
COPY docker/export.sh docker/healthcheck.py /opt/docker/
USER 1000:1000
WORKDIR /tmp
CMD ["tritonmark", "serve", "--repository", "/models", "--host", "0.0.0.0"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "/opt/docker/healthcheck.py", "http://127.0.0.1:8000/v2/health/ready"]
