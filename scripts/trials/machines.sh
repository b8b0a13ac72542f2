# shellcheck shell=bash
# Machines for trials of launchers, on one machine. A script sources lib.sh and this file, calls enter_head, and then start_nodes.
#
# A node is a set of namespaces: it has a name, an address, an sshd, /dev/shm, /tmp and processes of its own. It shares all other folders
# with the other nodes, as nodes of a cluster share a file system. The script itself moves to the head, which has namespaces of its own too
# and the switch that all nodes are plugged into. /mnt is a file system in memory that only the head and the nodes see. Nothing outside
# is changed, and when the script ends, however it ends, the nodes and everything in them end too.

# `repo` is lib.sh's.
: "${repo:?}"

# missing COMMAND...: prints what nodes and these commands need and this machine lacks
missing() {
    local command
    [[ $EUID -eq 0 ]] || echo root
    unshare --net --uts --ipc --pid --mount --fork true 2>/dev/null || echo "the right to make namespaces (unshare)"
    for command in ip nsenter ssh sshd ssh-keygen "$@"; do
        command -v "$command" >/dev/null || echo "$command"
    done
}

# enter_head COMMAND... -- ARGUMENT...: goes on from the beginning of the script, with these arguments, on the head. The status is 77 if
# this machine lacks one of the commands or something else.
enter_head() {
    PATH=$PATH:/usr/sbin:/sbin
    [[ -z ${ON_HEAD:-} ]] || return 0
    local commands=() lacks
    until [[ $1 == -- ]]; do
        commands+=("$1")
        shift
    done
    shift
    lacks=$(missing "${commands[@]}" | paste -sd, | sed 's/,/, /g')
    if [[ -n $lacks ]]; then
        say "NOT TRIED: $0 needs what this machine lacks: $lacks"
        say "help: on Debian, apt-get install iproute2 openssh-server mpich slurm-wlm munge; a container must be allowed to make namespaces"
        exit 77
    fi
    ON_HEAD=1 exec unshare --net --uts --ipc --pid --mount --fork --kill-child --mount-proc "$0" "$@"
}

# start_nodes N: makes node1 to nodeN, all of which take the same key for ssh
start_nodes() {
    local k
    mount -t tmpfs none /run
    mount -t tmpfs none /mnt
    mkdir -p /run/sshd /run/ssh
    hostname head
    ip link set lo up
    ip link add switch address 02:00:00:00:00:64 type bridge
    ip link set switch up
    ip address add 10.77.0.100/24 dev switch

    ssh-keygen -q -t ed25519 -N '' -f /run/ssh/key
    cp /run/ssh/key.pub /run/ssh/authorized_keys
    printf '%s\n' 'HostKey /etc/ssh/key' 'AuthorizedKeysFile /etc/ssh/authorized_keys' 'StrictModes no' \
        'PermitRootLogin prohibit-password' 'UseDNS no' >/run/ssh/sshd_config
    printf '%s\n' 'IdentityFile /etc/ssh/key' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
        >/run/ssh/ssh_config
    printf '%s\n' '127.0.0.1 localhost' '10.77.0.100 head' >/run/hosts
    for ((k = 1; k <= $1; k++)); do echo "10.77.0.$k node$k" >>/run/hosts; done
    mount --bind /run/ssh /etc/ssh
    mount --bind /run/hosts /etc/hosts
    for ((k = 1; k <= $1; k++)); do start_node "$k"; done
}

# start_node K: makes node K; also after kill_node
start_node() {
    ip netns add "node$1"
    # The same hardware address each time, since the other nodes remember it.
    ip link add "port$1" type veth peer name eth0 address "02:00:00:00:00:0$1" netns "node$1"
    ip link set "port$1" master switch up
    ip -n "node$1" link set lo up
    ip -n "node$1" link set eth0 up
    ip -n "node$1" address add "10.77.0.$1/24" dev eth0
    nsenter --net="/run/netns/node$1" unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc bash -c \
        "hostname node$1; mount -t tmpfs none /dev/shm; mount -t tmpfs none /tmp; exec $(command -v sshd) -D" &
    node_pids[$1]=$!
    within 20 ssh -o ConnectTimeout=1 "node$1" true
}

# cut_node K: pulls the cable, so that packets are lost in silence; mend_node K plugs it in again
cut_node() { ip link set "port$1" nomaster; }
mend_node() { ip link set "port$1" master switch; }

# kill_node K: ends all processes of the node at once, as a loss of power does
kill_node() {
    ip link set "port$1" nomaster
    kill -KILL "${node_pids[$1]}"
    wait "${node_pids[$1]}" 2>/dev/null || true
    ip link del "port$1"
    ip netns del "node$1"
}

# install_program FILE: makes the program /mnt/bin/fsdp-qlora, where all nodes find it
install_program() { install -D "$1" /mnt/bin/fsdp-qlora; }

# tiny_run FOLDER: makes a folder with a tiny model, rows and a recipe of a thousand short steps, and enters it
tiny_run() {
    local golden=$repo/tests/golden
    mkdir -p "$1/model"
    cp "$golden/tiny/config.json" "$golden/tiny/model.safetensors" "$golden"/tokenizer/tokenizer{,_config}.json "$1/model"
    cp "$golden/qlora_steps/rows.jsonl" "$1"
    cat >"$1/recipe.yaml" <<END
model: model
output_dir: out
data: {train: rows.jsonl, max_length: 128, packing: false}
lora: {r: 4}
training: {global_batch_size: 6, max_steps: 1000, learning_rate: 1.0e-3, save_steps: 50, save_total_limit: null, logging_steps: 10}
END
    cd "$1" || exit
}

# begin COMMAND...: says when and where a trial runs, and the versions that these commands print
begin() {
    local command version
    say "$0 on $(date -u +%F), $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release)"
    for command in "$@"; do
        version=$($command 2>&1)
        say "    ${version%%$'\n'*}"
    done
}

# expect WHAT COMMAND...: says that something is so, or fails
expect() {
    local what=$1
    shift
    "$@" || fail "not so: $what ($*)"
    say "ok: $what"
}

# state FOLDER: prints the state in run.json of an output folder
state() { sed -n 's/^  "state": "\(.*\)",$/\1/p' "$1/run.json"; }

# newest FOLDER: prints the step of the newest complete checkpoint
newest() { find "$1" -path '*/checkpoint-*/state.json' | sed 's/.*-\([0-9]*\).*/\1/' | sort -n | tail -n1; }

# within SECONDS COMMAND...: waits until the command succeeds, and fails the script if it does not in time
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "not in time: $*"
        sleep 0.1
    done
}
