# shellcheck shell=bash
# What the scripts here and .ci/run share: finding the repository, installing what it needs, starting MPI.
# Sourced after `set -euo pipefail`. Everything can be run twice: what is there already is left alone.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

# die MESSAGE REMEDY
die() {
    printf 'launch: %s\n        %s\n' "$1" "$2" >&2
    exit 1
}

# Runs a command as root: directly, or by sudo, which may ask for a password only where someone can type it.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    # Not libclang-cpp, which comes with clang itself and has another interface.
    compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang-[0-9]*.so*' >/dev/null && return 0
    # `grep -q` would end the pipe early, which pipefail takes for a failure.
    { ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null || true; } | grep -E 'libclang(-[0-9.]+)?\.so' >/dev/null
}

# Debian packages: MPI with its headers, libclang (the MPI binding reads mpi.h with it), a C compiler, curl for rustup.
install_packages() {
    local missing=()
    command -v mpirun >/dev/null || missing+=(openmpi-bin)
    command -v mpicc >/dev/null || missing+=(libopenmpi-dev)
    have_libclang || missing+=(libclang-dev)
    command -v cc >/dev/null || missing+=(build-essential)
    if ! find_cargo && ! command -v curl >/dev/null; then
        missing+=(curl ca-certificates)
    fi
    [ "${#missing[@]}" -eq 0 ] && return 0
    command -v apt-get >/dev/null ||
        die "missing here: ${missing[*]} (Debian's names)" "Install them with this system's package manager, then run this script again."
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
        die "missing here: ${missing[*]}; there is no sudo to install them with" "Run 'apt-get update && apt-get install ${missing[*]}' as root, then this script again."
    fi
    say "installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2 ||
        die "apt-get update failed" "Check the network and /etc/apt/sources.list, then run this script again."
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >&2 ||
        die "installing ${missing[*]} failed" "Run 'apt-get install ${missing[*]}' as root to see why, then this script again."
}

# True when cargo can be called and rustc is new enough (rust-version in Cargo.toml).
find_cargo() {
    local home="${CARGO_HOME:-${HOME:-/root}/.cargo}" wanted have
    case ":$PATH:" in *":$home/bin:"*) ;; *) [ -x "$home/bin/cargo" ] && export PATH="$home/bin:$PATH" ;; esac
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    wanted="$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")"
    have="$(rustc --version 2>/dev/null | cut -d' ' -f2)" || return 1
    [ "$(printf '%s\n%s\n' "$wanted" "${have%%-*}" | sort -V | head -n 1)" = "$wanted" ]
}

install_rust() {
    find_cargo && return 0
    local script
    if command -v rustup >/dev/null; then
        say "updating Rust"
        rustup toolchain install stable --profile minimal >&2 && rustup default stable >&2 || true
    else
        say "installing Rust with rustup"
        script="$(mktemp)"
        curl --proto '=https' --tlsv1.2 -sSf --retry 3 -o "$script" https://sh.rustup.rs ||
            die "downloading rustup failed" "Check the network, or install Rust from https://rustup.rs, then run this script again."
        # -y: no questions; the user's shell files stay as they are. An older cargo from the system may be there too.
        RUSTUP_INIT_SKIP_PATH_CHECK=yes sh "$script" -y --profile minimal --no-modify-path --default-toolchain stable >&2 ||
            die "rustup could not install Rust" "Install Rust from https://rustup.rs, then run this script again."
        rm -f "$script"
        export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    find_cargo || die "the Rust found here is too old or unusable" "Install the version that Cargo.toml asks for from https://rustup.rs, then run this script again."
}

install_all() {
    install_packages
    install_rust
}

# Where cargo puts what it builds.
target_dir() { printf '%s' "${CARGO_TARGET_DIR:-$ROOT/target}"; }

# Sets MPI_FLAGS: mpirun's flags for ranks that share one host's CPUs.
mpi_flags() {
    # More ranks than cores are welcome, and each may use every core: the program shares them out itself.
    MPI_FLAGS=(--bind-to none)
    # Messages by shared memory alone: no network is looked for, which also makes starting faster.
    MPI_FLAGS+=(--mca pml ob1)
    case "$(mpirun --version 2>/dev/null | sed -n '1s/.*[ v]\([0-9][0-9]*\)\..*/\1/p')" in
        1 | 2 | 3 | 4)
            MPI_FLAGS+=(--oversubscribe --mca btl "self,vader")
            # Copying between processes directly is forbidden in most containers, and only large messages gain by it.
            MPI_FLAGS+=(--mca btl_vader_single_copy_mechanism none)
            ;;
        *) MPI_FLAGS+=(--map-by :OVERSUBSCRIBE --mca btl "self,sm") ;; # Open MPI 5 and later
    esac
    # Open MPI refuses to run as root (containers, CI) unless told.
    if [ "$(id -u)" -eq 0 ]; then MPI_FLAGS+=(--allow-run-as-root); fi
}
