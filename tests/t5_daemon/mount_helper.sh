#!/usr/bin/env bash
# mount(8) with mount.udba, in a mount namespace of its own where /sbin has the helper. Each step prints what
# the test compares. Arguments: directory to work in, path of the helper, word "daemon" to have one run.
set -eu
work=$1 helper=$2 mode=$3
# Copies of unions that others have mounted would keep their processes alive.
findmnt --raw --noheadings --output TARGET --types fuse.udba |
    while IFS= read -r target; do umount --lazy -- "$(printf '%b' "$target")"; done
mkdir -p "$work"/{sbin,orig,top,base,extra,mnt}
sbin=$(readlink -f /sbin)
mount --bind "$sbin" "$work/orig"
cp -rs "$work/orig/." "$work/sbin/" 2>/dev/null
rm -f "$work"/sbin/mount.{,fuse.}udba # links to installed ones, through which cp would write
cp "$helper" "$work/sbin/mount.udba"
ln -s mount.udba "$work/sbin/mount.fuse.udba"
mount --bind "$work/sbin" "$sbin"
cd "$work"
echo base >base/file
echo extra >extra/other

daemon=
if [ "$mode" = daemon ]; then
    printf '[daemon]\nrun_dir = "%s"\n[metrics]\nlisten = "off"\n' "$UDBAD_RUN_DIR" >udbad.toml
    "$PYTHON" -m udbad run -c "$work/udbad.toml" &
    daemon=$!
    for _ in $(seq 600); do [ -S "$UDBAD_RUN_DIR/udbad.sock" ] && break; sleep 0.05; done
fi
finish() {
    umount "$work/mnt" 2>/dev/null || umount -l "$work/mnt" 2>/dev/null || true
    [ -z "$daemon" ] || { kill "$daemon"; wait "$daemon"; }
}
trap finish EXIT

branches() { cat "$UDBAD_RUN_DIR"/si_*/br[0-9]* | sed "s|$work/||"; }

mount -t udba -o br="top=rw:$work/base=ro",udba=notify none "$work/mnt"
echo "mounted: $(cat mnt/file) $(findmnt -nro FSTYPE mnt) $(branches | xargs)"
mount -t udba -o remount,udba=none,append=extra=ro none "$work/mnt"
echo "remounted: $(cat mnt/other) $(branches | xargs) $("$PYTHON" -m udbad status --json | grep -c '"udba": "none"')"
mount -o remount,del="$work/extra" "$work/mnt"
echo "deleted: $(ls mnt | xargs) $(branches | xargs)"
mkdir 'od,d=dir'
cd top # relative paths are the caller's, whose directory is not the daemon's
mount -o 'remount,add=1:../od\,d\=dir=ro,prepend:../extra=rw' "$work/mnt"
echo "added: $(branches | xargs)"
mount -o 'remount,mod=../extra=ro,del=../od\,d\=dir' "$work/mnt"
echo "changed: $(branches | xargs)"
mount -o remount,del=../extra "$work/mnt"
mount -o remount,append= "$work/mnt" 2>&1 | sed 's/^/empty: /' || true
cd ..
mount -o remount,noplink "$work/mnt" 2>&1 | sed 's/^/refused: /' || true
mount -o remount,ro "$work/mnt"
echo "ro: $(touch mnt/new 2>&1 | sed 's/.*: //') $(findmnt -nro OPTIONS mnt | cut -d, -f1)"
mount -o remount,rw,noexec "$work/mnt"
touch mnt/new && echo "rw: $(findmnt -nro OPTIONS mnt | cut -d, -f1,2)"
exec 9>mnt/open
mount -o remount,ro "$work/mnt" 2>&1 | sed "s|$work/||; s/process.*/process/; s/^/busy: /" || true
mount -o remount,udba=reval,mod="$work/top=ro" "$work/mnt" 2>&1 | sed 's/^/mod: /' || true
exec 9>&-
umount mnt
echo "unmounted: $(ls mnt | wc -l)"

echo "pool $work/mnt udba br=$work/top=rw:$work/base=ro,udba=reval,noauto,x-systemd.automount 0 0" >fstab
mount -T fstab "$work/mnt"
echo "fstab: $(cat mnt/file) $(findmnt -nro SOURCE mnt) $(findmnt -nro TARGET -S pool | sed "s|$work/||")"
sed -i s/noauto,// fstab
mount -T fstab -a && echo "again: $(findmnt -nro TARGET mnt | wc -l)"
mount -t udba -o br="$work/extra" none "$work/mnt" 2>&1 | sed "s|$work/||; s/^/other: /" || true
umount pool
echo "by name: $(ls mnt | wc -l)"
mount -t udba -o br="$work/nowhere" none "$work/mnt" 2>&1 | grep -v "INFO: runs uncompiled" | sed "s|$work/||; s/^[a-z.]*:/missing:/" || true
mount -t udba -o br="$work/top",udba=sometimes none "$work/mnt" 2>&1 | sed 's/^[a-z.]*:/option:/' || true
