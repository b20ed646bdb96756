# docker build -t milora-init .                                      a CPU build of torch
# docker build -t milora-init:cuda --build-arg TORCH_BACKEND=cu128 . with CUDA; run it with --gpus all
#
# docker run --rm -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" -e HF_TOKEN \
#     milora-init --model meta-llama/Llama-2-7b-hf --rank 64 --out svd_init
FROM python:3.12-slim

ARG TORCH_BACKEND=cpu
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir "uv==${UV_VERSION}"

COPY pyproject.toml README.md LICENSE /src/
COPY milora_init /src/milora_init
COPY configs /src/configs
RUN uv pip install --system --no-cache --torch-backend "${TORCH_BACKEND}" "/src[peft]"

# Whoever runs it owns what it writes: add --user "$(id -u):$(id -g)" where that is not 1000.
RUN useradd --create-home --uid 1000 milora && mkdir /cache && chown milora /cache
USER 1000
ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["milora-init"]
CMD ["--help"]
