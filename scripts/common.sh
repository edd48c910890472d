# Sourced by the scripts beside it: how they speak, fail and install. Sets `root`, the repository, and
# `cache`, where what was fetched stays.
# Every failure is one line on standard error that says what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# cargo, ccache and our own cache want a home; a build service may have none.
if [[ ! -w ${HOME:-} ]]; then
  export HOME=$root/build/home
  mkdir -p "$HOME" 2>/dev/null || die "cannot write $root, where the build belongs"
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lorikeet
readonly cache

# version_at_least 3.25.1 3.24
version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# apt_install WHY PACKAGE...
apt_install() {
  local why=$1 as_root=()
  shift
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "$why: run as root, or have sudo, or first install: $*"
    as_root=(sudo)
  fi
  say "Installing $why: $*"
  local options=(-y -q --no-install-recommends -o Dpkg::Use-Pty=0)
  "${as_root[@]}" apt-get update -q || die "apt-get update failed; its words are above"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" ||
    die "apt-get could not install: $*"
}

# need_pip WHY: pip knows this machine's package index.
need_pip() {
  python3 -m pip --version >/dev/null 2>&1 || apt_install "pip, to fetch $1" python3-pip
}
