#!/bin/sh
# Makes FOLDER a self-contained espeak-ng for a machine without network (needs apt here, nothing there):
#   train/fetch_espeak.sh FOLDER
# then there: ESPEAK_BINARY=FOLDER/bin/espeak-ng python -m kinora.train.tiny ...
# The program runs under its own C library and loader, so the other machine's distribution does not matter.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/debs" "$work/tree"
packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances espeak-ng | grep '^[a-z0-9]' | grep -v ':' | sort -u)
(
    cd "$work/debs"
    [ "$(id -u)" != 0 ] || chmod 777 .
    for package in $packages; do
        # virtual packages have nothing to download
        apt-cache show "$package" >/dev/null 2>&1 && apt-get download -q "$package" >/dev/null 2>&1 || true
    done
    for deb in *.deb; do dpkg -x "$deb" "$work/tree"; done
)
loader=$(find "$work/tree" -name 'ld-linux*.so.*' | head -n 1)
program=$work/tree/usr/bin/espeak-ng
[ -x "$program" ] && [ -n "$loader" ] || { echo "$0: apt-get download brought no espeak-ng; run apt-get update" >&2; exit 1; }
libraries=$(find "$work/tree" -name '*.so.*' -exec dirname {} + | sort -u | tr '\n' ':')
rm -rf "$folder/bin" "$folder/lib" "$folder/share"
mkdir -p "$folder/bin" "$folder/lib" "$folder/share"
cp "$loader" "$folder/lib/loader"
"$loader" --library-path "$libraries" --list "$program" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | while read -r library; do
    cp -L "$library" "$folder/lib/"
done
cp "$program" "$folder/lib/espeak-ng"
cp -r "$(find "$work/tree/usr/lib" -type d -name espeak-ng-data)" "$folder/share/"
cat >"$folder/bin/espeak-ng" <<'WRAPPER'
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
ESPEAK_DATA_PATH=${ESPEAK_DATA_PATH:-$here/share} exec "$here/lib/loader" --library-path "$here/lib" "$here/lib/espeak-ng" "$@"
WRAPPER
chmod +x "$folder/bin/espeak-ng"
"$folder/bin/espeak-ng" --stdout "ready" >/dev/null
du -sh "$folder"
