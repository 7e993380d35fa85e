#!/usr/bin/env bash
# Builds the Dockerfile on a plain Debian base, without a Docker daemon and without a GPU, then trains a step and runs the
# tests inside, as the image's own user, with the data mounted read-only.
#
#   BASE_IMAGE=localhost/my_base docker/test_image.sh    another base: debootstrap's is not made then
#   TESTS="tests/data -k tar" docker/test_image.sh       some tests only
#   WHEELS=/srv/wheels docker/test_image.sh              a folder that pip looks into first: a torch without CUDA
#   WORK=/scratch docker/test_image.sh                   another place for everything that is made
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=${WORK:-${TMPDIR:-/tmp}/nemo_slam_image}
SUITE=${SUITE:-bookworm} # Debian 12, with Python 3.11
IMAGE=localhost/nemo_slam
TESTS=${TESTS:-}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs

for program in buildah debootstrap; do
  command -v "$program" >/dev/null || { echo "error: $program is missing: apt-get install buildah debootstrap" >&2; exit 2; }
done
[ "$(id -u)" -eq 0 ] || { echo "error: debootstrap and buildah's chroot isolation need root" >&2; exit 2; }
mkdir -p "$WORK"

if [ -z "${BASE_IMAGE:-}" ]; then
  BASE_IMAGE=localhost/nemo_slam_base
  if [ ! -e "$WORK/rootfs/.complete" ]; then
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates,make,git,libsndfile1 \
      "$SUITE" "$WORK/rootfs"
    # A machine behind a proxy that signs for others trusts it; so must what is built on this machine.
    if compgen -G "/usr/local/share/ca-certificates/*.crt" >/dev/null; then
      cp /usr/local/share/ca-certificates/*.crt "$WORK/rootfs/usr/local/share/ca-certificates/"
      chroot "$WORK/rootfs" update-ca-certificates
    fi
    touch "$WORK/rootfs/.complete"
  fi
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$WORK/rootfs" /
  buildah commit --quiet --rm "$container" "$BASE_IMAGE"
fi

wheels=()
if [ -n "${WHEELS:-}" ]; then
  printf '[global]\nfind-links = /wheels\n' >"$WORK/pip.conf"
  wheels=(--volume "$WHEELS:/wheels:ro" --volume "$WORK/pip.conf:/etc/pip.conf:ro")
fi
# Docker's own format: the other one has no health check, and no SHELL.
buildah bud --format docker --network host "${wheels[@]}" --build-arg BASE_IMAGE="$BASE_IMAGE" --tag "$IMAGE" .

container=$(buildah from "$IMAGE")
trap 'buildah rm "$container" >/dev/null' EXIT
inside() { buildah run --network host "$@"; }

user=$(inside "$container" -- id -u)
[ "$user" -ne 0 ] || { echo "error: the image runs as root" >&2; exit 1; }
echo "user $user"
words='{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}'
mapfile -t health < <(buildah inspect --type image --format "$words" "$IMAGE")
inside "$container" -- "${health[@]:1}" # its first word says how it is run: CMD
echo "healthy"

# The corpus once, writable; then read-only, as a run on a cluster finds it.
mkdir -p "$WORK/data"
chown "$user" "$WORK/data"
inside --volume "$WORK/data:/workspace/nemo_slam/data:rw" "$container" -- python3 scripts/prepare_data.py prompts
inside --volume "$WORK/data:/workspace/nemo_slam/data:rw" "$container" -- \
  python3 scripts/speech_pretrain.py --config-name slam_stage1 model=tiny trainer.max_steps=1 exp_manager.exp_dir=/tmp/first
inside --volume "$WORK/data:/workspace/nemo_slam/data:ro" "$container" -- \
  python3 scripts/speech_pretrain.py --config-name slam_stage1 model=tiny trainer.max_steps=1
# shellcheck disable=SC2086 # several words on purpose
inside --env OMP_NUM_THREADS=1 --volume "$WORK/data:/workspace/nemo_slam/data:ro" "$container" -- \
  make test PYTEST_ARGS="$TESTS"
