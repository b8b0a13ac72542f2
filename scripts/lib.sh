# The scripts beside this file source it. It says where things are, and sets an environment in which mpirun works on this machine.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${FSDP_QLORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fsdp-qlora}
program=${CARGO_TARGET_DIR:-$repo/target}/release/fsdp-qlora

if ! command -v cargo >/dev/null && [[ -x $HOME/.cargo/bin/cargo ]]; then
    PATH=$HOME/.cargo/bin:$PATH
fi

# The program shares the cores among ranks itself, so mpirun binds nothing and may start more ranks than there are cores. Open MPI 4
# reads the first names, Open MPI 5 (PRRTE) the second.
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
if [[ $EUID -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# python_packages NAME REQUIREMENTS: sets `venv` to a Python environment of the cache folder that holds these packages
python_packages() {
    venv=$cache/$1
    cmp -s "$2" "$venv/installed.txt" && return
    say "fetching the packages of $2 into $venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$2"
    cp "$2" "$venv/installed.txt"
}
