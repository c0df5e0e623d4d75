# Fine-tuning and prediction in a container. GPUs: docker build -t nnssl-adapt .
# CPUs only: docker build -t nnssl-adapt --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=https://pypi.org/simple

WORKDIR /opt/nnssl_adapt
COPY . .
# torch first, from its own index; the rest then takes it as it is.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.6,!=2.9.*" \
    && pip install --no-cache-dir . \
    && useradd --create-home --uid 1000 user \
    && mkdir /nnUNet_raw /nnUNet_preprocessed /nnUNet_results \
    && chown user /nnUNet_raw /nnUNet_preprocessed /nnUNet_results

ENV nnUNet_raw=/nnUNet_raw \
    nnUNet_preprocessed=/nnUNet_preprocessed \
    nnUNet_results=/nnUNet_results
VOLUME ["/nnUNet_raw", "/nnUNet_preprocessed", "/nnUNet_results"]
USER 1000
WORKDIR /home/user
ENTRYPOINT ["nnssl-adapt"]
CMD ["--help"]
