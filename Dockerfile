# The command line in an image. CPU by default:
#
#   docker build -t lightning-align .
#   docker run --rm -v "$PWD:/work" lightning-align fit --config sft/jsonl --config model/palm_tiny --data.train rows.jsonl
#
# For CUDA, and run it with --gpus all:
#
#   docker build -t lightning-align:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --build-arg EXTRAS=gpu,hf .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cpu,hf

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lightning_align lightning_align
# torch first, from its own index: the index of Python packages has the CUDA build alone, which takes gigabytes.
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch \
 && pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# Files that runs write belong to this user. On a shared folder, pass --user "$(id -u):$(id -g)".
RUN useradd --create-home align && chmod 1777 /home/align
# Of any user of --user, for the caches of libraries.
ENV HOME=/home/align USER=align
USER align
WORKDIR /work
ENTRYPOINT ["lightning-align"]
CMD ["--help"]
