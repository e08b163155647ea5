#!/bin/sh
# Runs the tests that need a GPU, without CMake: all programs cuda_* of a folder, one after the other, with a line for each.
# usage: run_cuda.sh FOLDER VECTORS [NAME]..., the golden files' folder tests/vectors/bitsandbytes, and only these programs if there are any
set -u
if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER VECTORS [NAME]..." >&2
    exit 2
fi
programs=$(cd "$1" && pwd) && vectors=$(cd "$2" && pwd) && here=$(cd "$(dirname "$0")" && pwd) || exit 2
run=$here/run.sh tables=$here/tables
shift 2
if [ $# -eq 0 ]; then
    for program in "$programs"/cuda_*; do
        if [ -f "$program" ] && [ -x "$program" ]; then set -- "$@" "${program##*/}"; fi
    done
fi
if [ $# -eq 0 ]; then
    echo "$programs has no program cuda_*" >&2
    exit 2
fi

folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 2
passed=0 failed=0 skipped=0
for name in "$@"; do
    case $name in
    cuda_golden | cuda_load) argument=$vectors ;;
    *) argument= ;;
    esac
    # What is decoded and what is not does not depend on the GPU there.
    case $name in
    cuda_linear | cuda_matmul) table=$tables/few.json ;;
    cuda_many) table=$tables/all.json ;;
    *) table= ;;
    esac
    start=$(date +%s)
    GQUANT_TUNE=$table timeout 600 "$run" "$programs/$name" ${argument:+"$argument"} >"$folder/output" 2>&1
    code=$?
    seconds=$(($(date +%s) - start))
    case $code in
    0)
        passed=$((passed + 1))
        echo "passed   $name (${seconds} s)"
        ;;
    77)
        skipped=$((skipped + 1))
        echo "skipped  $name: $(sed 's/^skipped: //' "$folder/output")"
        ;;
    *)
        failed=$((failed + 1))
        echo "FAILED   $name (status $code, ${seconds} s)"
        head -n 50 "$folder/output"
        ;;
    esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
