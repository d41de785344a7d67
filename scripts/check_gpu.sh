#!/usr/bin/env bash
# Runs on a machine with a GPU what no other can: the GPU's tests, then what docs/performance.md and
# docs/scale.md say of GPUs. Some ten minutes on one H200; what is printed goes to the folder OUT.
#
#     scripts/check_gpu.sh OUT [FOLDER_OF_JPEG_FILES]
set -u
[ $# -ge 1 ] || { echo "check_gpu: name a folder for what is printed: $0 OUT [FOLDER_OF_JPEG_FILES]" >&2; exit 2; }
[ -z "${2:-}" ] || [ -d "$2" ] || { echo "check_gpu: $2: no such folder" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
images=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1

python3 - <<'P' || exit 1
import importlib.metadata as installed
import sys
import tomllib
from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
unmet = []
for requirement in map(Requirement, wanted):
    try:
        found = installed.version(requirement.name)
    except installed.PackageNotFoundError:
        found = "none"
    if found == "none" or found.split("+")[0] not in requirement.specifier:
        unmet.append(f"{requirement} (found: {found})")
if unmet:
    sys.exit("check_gpu: first install " + "; ".join(unmet))
import torch

if not torch.cuda.is_available():
    sys.exit("check_gpu: torch finds no GPU here")
print(torch.cuda.get_device_name(), torch.__version__)
P

step() { # NAME SECONDS COMMAND...: its end is shown, all that it prints is kept
    local name=$1 seconds=$2 rc
    shift 2
    echo "== $name"
    echo "\$ $*" >"$out/$name.txt"
    timeout "$seconds" "$@" >>"$out/$name.txt" 2>&1
    rc=$?
    tail -n 12 "$out/$name.txt" | cut -c1-200
    [ $rc = 0 ] || echo "== $name ended with $rc"
}

regard="python3 -m regard"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
short="--faithfulness-images 0 --log none"
step tests 300 python3 -m pytest tests/test_gpu.py -n 4 --dist load -p no:cacheprovider -p no:benchmark
step streamed 90 bash -c "$regard shrink digits $runs/digits --side 16 && $regard train $runs/digits/images.csv \
    --model ag_sononet8 --size 32 --steps 300 --memory no --workers 4 --compile graphs $short --out $runs/streamed"
[ -z "$images" ] || step decoded 120 $regard train "$images" --model cbam_resnet18 --size 128 --steps 300 --memory no \
    --decode device --compile graphs --pretrained no --random-crop resized $short --out "$runs/decoded"
step fit-memory 120 $regard train digits --model cbam_resnet50 --size 448 --batch-size 1024 --steps 3 \
    --fit-memory --compile no --pretrained no $short --out "$runs/fit"
step loop 60 $regard train digits --model attention56_cifar --size 32 --batch-size 1024 --steps 200 \
    --eval-every 100 --compile graphs --pretrained no $short --out "$runs/loop"
step compiled 120 $regard train digits --model cbam_resnet18 --size 64 --steps 30 --compile yes \
    --pretrained no $short --out "$runs/compiled"
step stopped 15 $regard train digits --model cbam_resnet18 --epochs 200 --pretrained no $short --out "$runs/stopped"
step resumed 15 $regard train digits --model cbam_resnet18 --epochs 200 --pretrained no $short --out "$runs/stopped" --resume
step kernels 240 python3 benchmarks/fused_kernels.py
step resnet50 240 $regard bench resnet50 cbam_resnet50 --train --engine eager fused compiled graphs \
    --precision bf16 --batch-size 256 --device cuda --rounds 4
step resnet18 60 $regard bench resnet18 cbam_resnet18 --train --engine eager graphs --precision bf16 \
    --batch-size 64 --size 128 128 --device cuda --rounds 4
step attention56 60 $regard bench attention56_cifar --train --recipe fast-cifar --engine eager graphs \
    --precision bf16 --batch-size 64 512 1024 --device cuda --rounds 4
[ -z "$images" ] || step decoding 90 python3 benchmarks/decoding.py "$images" --rounds 3
