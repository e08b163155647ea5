#!/bin/sh
# Prints the path of an nvcc of CUDA 13: $NVCC, that of $CUDA_HOME, the one on PATH, or else the one of NVIDIA's PyPI packages, which it
# installs into the folder $1 with the Python $2. No GPU and no driver are needed.
set -eu
folder=$1 python=$2

is_13() { [ -x "$1" ] && "$1" --version 2>/dev/null | grep -q 'release 1[3-9]\.'; }

if [ -n "${NVCC:-}" ]; then
    is_13 "$NVCC" || { echo "NVCC=$NVCC is no nvcc of CUDA 13 or newer" >&2; exit 1; }
    echo "$NVCC"
    exit
fi
installed=$folder/nvidia/cu13/bin/nvcc
for nvcc in "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "$(command -v nvcc || true)" "$installed"; do
    if is_13 "$nvcc"; then
        echo "$nvcc"
        exit
    fi
done
if ! "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2; then
    echo "the CUDA kernels need nvcc 13: install the CUDA toolkit and set CUDA_HOME, or build without CUDA: make CUDA=0" >&2
    exit 1
fi
is_13 "$installed" || { echo "$installed does not run" >&2; exit 1; }
echo "$installed"
