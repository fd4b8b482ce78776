#!/usr/bin/env bash
# The walk-through of the README: two small branches and their union, served until Ctrl-C. `make run` calls this.
# The trees are made anew each time; a mount left by a run that was killed is removed first.
set -eu
cd "$(dirname "$0")/.."
udbad=$PWD/.venv/bin/udbad
dir=$PWD/run/walkthrough

# mountinfo, not stat: the mount point of a dead daemon answers ENOTCONN, a wedged one not at all.
mounted() { grep -qF " ${dir// /\\040}/mnt " /proc/self/mountinfo; }
while mounted; do
    umount -- "$dir/mnt" 2>/dev/null || umount --lazy -- "$dir/mnt"
done
rm -rf --one-file-system -- "$dir"
mkdir -p "$dir"/{base,top,mnt}
cd "$dir"
echo "hello from base" >base/hello.txt
echo "common from base" >base/common.txt
echo "foo from top" >top/foo.txt
echo "common from top" >top/common.txt

next_steps() {
    cat <<TEXT

$dir/mnt is the union of top (writable) over base (read-only). In another terminal:

  cd $dir
  ls mnt                            # common.txt foo.txt hello.txt
  cat mnt/common.txt                # common from top: the upper branch wins
  echo changed > mnt/common.txt     # changes top/common.txt only
  echo changed > mnt/hello.txt      # base stays as it is, the change is in top/hello.txt
  rm mnt/hello.txt; ls -A top       # a whiteout, top/.wh.hello.txt, hides base/hello.txt
  echo direct > base/direct.txt     # a branch changed directly ...
  cat mnt/direct.txt                # ... is seen by the next access

Ctrl-C here unmounts.
TEXT
}

# The daemon writes READY to descriptor 3 when the mount serves. exec: signals go straight to it, and it unmounts.
exec "$udbad" mount -f --ready-fd 3 -o br=top:base none mnt \
    3> >(if IFS= read -r _ready; then next_steps; fi)
