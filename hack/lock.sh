#!/usr/bin/env bash
# Pins every requirement with hashes. torch stays out: it is pinned by version in torch.txt, so that a machine that
# carries a CPU build of it can use that, and the GPU libraries come with torch as its own pins say.
set -euo pipefail
cd "$(dirname "$0")/.."
names=$(uv pip compile --quiet --no-header --no-annotate --python-version 3.11 requirements/torch.txt \
  | sed -n 's/^\(torch\|triton\|nvidia-[a-z0-9-]*\|cuda-[a-z-]*\)\(\[.*\]\)\?==.*/\1/p')
skip=()
for name in $names; do skip+=(--no-emit-package "$name"); done
compile() {
  local out=$1
  shift
  uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
    --constraint requirements/torch.txt "${skip[@]}" --output-file "$out" "$@"
  # The project itself is installed from the tree.
  sed -i '/^finetune-operator/d' "$out"
  echo "$out: $(grep -c '==' "$out") packages" >&2
}
compile requirements/operator.lock pyproject.toml --extra operator
compile requirements/trainer.lock pyproject.toml --extra trainer
compile requirements/dev.lock pyproject.toml --extra dev
# For the images: what builds them, and PyPI's torch with its GPU libraries, of the versions that the others have.
uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
  --constraint requirements/dev.lock --output-file requirements/build.lock requirements/build.in
keep=()
for name in $(sed -n 's/==.*//p' requirements/trainer.lock); do keep+=(--no-emit-package "$name"); done
uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
  --constraint requirements/trainer.lock "${keep[@]}" --output-file requirements/torch.lock requirements/torch.txt
# What FlashAttention 4 needs beyond all that; its compiler's build for CUDA 12 takes the room of the one for 13.
keep=()
for name in $(sed -n 's/==.*//p' requirements/trainer.lock requirements/torch.lock); do keep+=(--no-emit-package "$name"); done
uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
  --constraint requirements/trainer.lock --constraint requirements/torch.lock "${keep[@]}" \
  --no-emit-package nvidia-cutlass-dsl-libs-cu12 --output-file requirements/flash4.lock requirements/flash4.in
uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --no-deps --python-version 3.11 \
  --output-file requirements/example-model.lock requirements/example-model.in
# Its packages that the development environment has, too, are of the same versions.
uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
  --constraint requirements/dev.lock --output-file requirements/mutation.lock requirements/mutation.in
# Peers of the trainer's bench, each with its own pins in an environment of its own.
for peer in llamafactory unsloth; do
  compile "bench/trainer/environments/$peer.lock" "bench/trainer/environments/$peer.in"
done
