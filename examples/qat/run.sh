#!/bin/sh
# The story of README.md in one go: run.sh [FOLDER]. Everything lands in FOLDER (default: qat-run), which must be new.
# To shorten it: NANO_STEPS and STEPS (of the two trainings), ITEMS (of each task), JOBS ("int2" alone). Of a nano of a
# few steps the gate says that it has nothing to lose, and the story ends there.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-qat-run}
began=$(date +%s)
mkdir "$folder"
for job in int2 int4; do
    # the rate grows in a fifteenth of the steps, however few: 20 of 300
    steps=${STEPS:-300}
    sed "s/^  steps: .*/  steps: $steps/; s/^  warmup: .*/  warmup: $((steps / 15))/" "$here/$job.yaml" > "$folder/$job.yaml"
done
cd "$folder"

# A command as it is typed, then its output.
say() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# A gate that says FAIL (3) or INCONCLUSIVE (4) has answered; anything else but PASS is an error and ends the story.
verdict() {
    status=0
    say "$@" || status=$?
    case $status in
        0 | 3 | 4) ;;
        *) exit "$status" ;;
    esac
}

say k2quant nano nano-k2 --tasks nano-tasks ${NANO_STEPS:+--steps "$NANO_STEPS"}
say k2quant eval run nano-k2 --include nano-tasks --tasks nano --batch-size 64 -o answers/base ${ITEMS:+--limit "$ITEMS"}

for job in ${JOBS:-int2 int4}; do
    # what is going to be trained, and what the same format costs without training
    say k2quant qat plan $job.yaml
    say k2quant qat export $job.yaml nano-$job-rounded
    say k2quant eval run nano-$job-rounded --include nano-tasks --tasks nano --batch-size 64 -o answers/$job-rounded ${ITEMS:+--limit "$ITEMS"}
    verdict k2quant eval gate answers/base answers/$job-rounded --margin 2pp -o gate-$job-rounded

    # the training, and what it is worth
    say k2quant qat train $job.yaml
    say k2quant qat export runs/$job nano-$job-qat
    say k2quant eval run nano-$job-qat --include nano-tasks --tasks nano --batch-size 64 -o answers/$job-qat ${ITEMS:+--limit "$ITEMS"}
    verdict k2quant eval gate answers/base answers/$job-qat --margin 2pp -o gate-$job-qat
done

printf '\n%s: done in %d seconds\n' "$folder" $(($(date +%s) - began))
