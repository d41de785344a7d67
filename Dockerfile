# `regard serve` in a container, without root.
#
#   docker build -t regard .                                        # for CPUs
#   docker build -t regard:cuda --build-arg BASE=pytorch/pytorch:2.14.1-cuda13.0-cudnn9-runtime .
#   docker run --rm -p 8000:8000 -v "$PWD/runs/photos:/network:ro" regard
#
# BASE needs Python 3.11 or newer; a PyTorch that it brings is used. Otherwise pip installs PyTorch with
# NVIDIA's files, unless PIP_OPTIONS says where to find the CPU build (an option that the page
# pytorch.org/get-started prints for "CPU").
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG PIP_OPTIONS=""
ARG EXTRAS=serve,dicom,tiff
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The package is this folder, which has one version.
# hadolint ignore=DL3013,SC2086
RUN python -m pip install ${PIP_OPTIONS} ".[${EXTRAS}]" && rm -rf /build/src

RUN useradd --system --uid 10001 --create-home regard
USER 10001
WORKDIR /home/regard
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["regard", "serve"]
CMD ["/network", "--host", "0.0.0.0", "--port", "8000"]
