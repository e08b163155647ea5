#!/bin/sh
# Runs a test with an empty folder to write in, TEST_FOLDER, and fails if it, or the library in it, prints anything.
# usage: run.sh PROGRAM [ARGUMENT]...
TEST_FOLDER=$(mktemp -d "$PWD/folder.XXXXXX") || exit 1
output=$(mktemp -d "$PWD/output.XXXXXX") || exit 1
export TEST_FOLDER
trap 'rm -rf "$TEST_FOLDER" "$output"' EXIT
"$@" >"$output/stdout" 2>"$output/stderr"
code=$?
cat "$output/stdout" "$output/stderr"
# A test that is skipped (77) says why.
if [ $code -eq 0 ] && { [ -s "$output/stdout" ] || [ -s "$output/stderr" ]; }; then
    echo "$1 printed something"
    exit 1
fi
exit $code
