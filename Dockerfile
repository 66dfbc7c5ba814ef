# k2quant on CPUs. From a clone:
#   docker build -t k2quant .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" k2quant convert --to int4 MODEL MODEL-INT4
# docs/install.md says more.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# Extras of pyproject.toml with commas between them; EXTRAS= leaves what converts, checks and merges.
ARG EXTRAS=run
# The address of PyTorch's builds for CPUs, where torch shall be one; pip's usual one is for GPUs and gigabytes larger.
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints-dev.txt ./
COPY calib calib
COPY exports exports
COPY eval eval
COPY kernels kernels
COPY qat qat
COPY k2quant k2quant
RUN python -m venv /opt/k2quant \
    && /opt/k2quant/bin/pip install --no-cache-dir --constraint constraints-dev.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="k2quant" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/k2quant /opt/k2quant
# Codecs are compiled on the machine that runs them, and kept here; any user may write to it.
RUN mkdir -m 1777 /cache
# A user whom the image does not know has neither a home nor a name.
ENV PATH=/opt/k2quant/bin:$PATH \
    NUMBA_CACHE_DIR=/cache/numba \
    HOME=/tmp \
    USER=k2quant
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["k2quant"]
CMD ["--help"]
