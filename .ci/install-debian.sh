#!/usr/bin/env bash
# Install the Debian or Ubuntu packages that are missing: .ci/install-debian.sh run|test|deb...
# Does nothing, quickly, when all are there; needs root only when some are missing.
set -eu

# To build, mount and use udbad.
run_packages=(
    make git gcc libc6-dev pkg-config
    python3 python3-dev python3-venv
    libfuse3-dev fuse3 mount util-linux
    attr acl
)

# Only for the tests and the benchmark.
test_packages=(
    build-essential debootstrap fish inotify-tools libcap2-bin procps rsync strace
    btrfs-progs e2fsprogs squashfs-tools xfsprogs
    buildah podman crun uidmap busybox-static
    postgresql sqlite3 prometheus openssl fuse-overlayfs mergerfs openssh-server sshfs systemd zsh mandoc man-db
    nats-server redis-server iproute2
)

# To build the Debian package.
deb_packages=(build-essential debhelper lintian)

wanted=()
for list in "$@"; do
    case "$list" in
        run) wanted+=("${run_packages[@]}") ;;
        test) wanted+=("${test_packages[@]}") ;;
        deb) wanted+=("${deb_packages[@]}") ;;
        *) echo "$0: unknown package list '$list' (run, test, deb)" >&2; exit 2 ;;
    esac
done

if ! command -v apt-get >/dev/null; then
    echo "$0: not a Debian or Ubuntu; these must be here in some other way: ${wanted[*]}" >&2
    exit 0
fi

missing=()
for package in "${wanted[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "$0: missing packages; as root: apt-get install ${missing[*]}" >&2
    exit 1
fi
if [[ " ${missing[*]} " == *" postgresql "* && ! -e /etc/postgresql-common/createcluster.conf ]]; then
    # The tests make their own clusters; installing the package must not start a server on this machine.
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A fresh machine may still be at its own upgrades: wait for the lock, in seconds.
apt="apt-get -q -o DPkg::Lock::Timeout=300"
$apt update
# Installing a server (prometheus, sshd, ...) must not start it here, nor at the next boot.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f '$policy EXIT
fi
$apt install -y --no-install-recommends "${missing[@]}"
for server in prometheus:prometheus openssh-server:ssh nats-server:nats-server redis-server:redis-server; do
    if [[ " ${missing[*]} " == *" ${server%:*} "* ]] && command -v systemctl >/dev/null; then
        systemctl disable --quiet "${server#*:}" 2>/dev/null || true
    fi
done
