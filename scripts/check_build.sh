#!/usr/bin/env bash
# Build sdist and wheel into dist/, install each in a clean virtual environment, and use it.
#
#   scripts/check_build.sh                 with python3
#   PYTHON=.venv/bin/python scripts/check_build.sh
#
# The packages that milora-init needs come from the environment of PYTHON. With uv installed, the wheel is also run by
# uvx, which installs them from the index: UV_TORCH_BACKEND=cpu saves gigabytes of CUDA there.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build
rm -rf dist
"$work/build/bin/python" -m build --outdir dist . > "$work/build.log" || { cat "$work/build.log"; exit 1; }

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" scripts/make_checkpoint.py "$work/model" --size tiny

for file in dist/*.whl dist/*.tar.gz; do
    echo "== $file"
    clean=$work/clean-${file##*.}
    "$python" -m venv "$clean"
    "$clean/bin/python" -m pip install --quiet --no-deps "$file"
    # Without the file's own folder on sys.path, the packages are found, and milora-init is the installed one.
    own=$("$clean/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$packages" > "$own/packages.pth"
    (
        cd "$work"
        "$clean/bin/python" -c "import milora_init; assert milora_init.__file__.startswith('$clean'), milora_init.__file__"
        "$clean/bin/milora-init" --version
        "$clean/bin/milora-init" --help > /dev/null
        "$clean/bin/milora-init" recipes > /dev/null
        "$clean/bin/milora-init" --model model --rank 8 --out "out-${file##*.}" --quiet
        "$clean/bin/milora-init" verify "out-${file##*.}"
    )
done

if command -v uvx > /dev/null; then
    echo "== uvx"
    for wheel in dist/*.whl; do
        uvx --from "./$wheel" milora-init --help > /dev/null
    done
fi
echo "dist/ is usable"
