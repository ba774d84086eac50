# Load generator: Locust master and workers, the history exporter, and the command line.
# docker build -f docker/load.Dockerfile -t tritonmark/load .
#
# BASE_IMAGE: any Debian-like image with python3 3.11 or 3.12 and venv, so that a site can bring its own mirror.
# A site's pip settings: --secret id=pip_conf,src=/etc/pip.conf (nothing of it stays in the image).
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv /opt/tritonmark
ENV PATH=/opt/tritonmark/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Dependencies first: this layer is built anew only when they change.
COPY pyproject.toml docker/constraints.txt docker/requirements.py ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python requirements.py > requirements.txt && pip install --constraint constraints.txt -r requirements.txt
COPY README.md LICENSE tritonmark.py ./
COPY loadgen ./loadgen
COPY exporters ./exporters
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf pip install --no-deps .

FROM ${BASE_IMAGE}
ENV PATH=/opt/tritonmark/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN useradd --uid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tritonmark \
    && install -d -m 1777 /results
COPY --from=build /opt/tritonmark /opt/tritonmark
COPY docker/load.sh docker/healthcheck.py docker/web_login.py /opt/docker/
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/bin/sh", "/opt/docker/load.sh"]
CMD ["master"]
# A worker has no other port than its metrics; the master's are its web page and its metrics.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/docker/healthcheck.py", "http://127.0.0.1:9464/metrics"]
