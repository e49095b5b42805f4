#!/usr/bin/env bash
# Runs every test binary beside it on this machine's GPU, prints a table, fails on any difference.
# usage: ./run.sh [--sanitizer | --only-sanitizer]
cd "$(dirname "$0")" || exit 2
export BITFAST_FIXTURES="$PWD/fixtures"
mkdir -p logs
passed=0 failed=0

# name, log, exit status, seconds
row() {
    local line p f
    line=$(grep '^test result:' "$2" | tail -1)
    p=$(sed -n 's/.* \([0-9]*\) passed.*/\1/p' <<<"$line")
    f=$(sed -n 's/.* \([0-9]*\) failed.*/\1/p' <<<"$line")
    p=${p:-0} f=${f:-0}
    # A crash, or a binary that ran nothing, is a failure.
    if [ "$f" = 0 ] && { [ "$3" != 0 ] || [ "$p" = 0 ]; }; then f=1; fi
    passed=$((passed + p)) failed=$((failed + f))
    printf '%-28s %4d passed %4d failed %6ds\n' "$1" "$p" "$f" "$4"
    if [ "$f" != 0 ]; then tail -40 "$2"; fi
}

run() {
    local name=$1 begin=$SECONDS status=0
    shift
    "$@" >"logs/$name.log" 2>&1 || status=$?
    row "$name" "logs/$name.log" "$status" $((SECONDS - begin))
}

# What a user would do: the card answers 32 requests in one batch, this machine's CPU derives every bit again; a changed logprob is noticed.
end_to_end() {
    local i model answers
    ./bitfast selfcheck --device cuda || return 1
    for i in $(seq 32); do
        printf '{"prompt_token_ids": [%s], "max_tokens": 32, "temperature": 0.%d, "seed": %d, "logprobs": 3, "ignore_eos": true}\n' \
            "$(seq -s, "$i" $((3 * i + 5)))" $((i % 9)) "$i"
    done >logs/prompts.jsonl
    for model in fixtures/models/llama-untied fixtures/models/qwen3-untied; do
        answers=logs/$(basename "$model").jsonl
        rm -f "$answers"
        ./bitfast run -q -m "$model" --skip-tokenizer-init --device cuda --kv-cache-memory 1GiB --prompts logs/prompts.jsonl --output "$answers" || return 1
        ./bitfast verify -q -m "$model" "$answers" || return 1
        sed '9s/"logprob":-[0-9.]*/"logprob":-1.5/' "$answers" >logs/changed.jsonl
        ./bitfast verify -q -m "$model" logs/changed.jsonl
        [ $? = 1 ] || { echo "the change was not noticed"; return 1; }
    done
    echo "test result: ok. 5 passed; 0 failed"
}

if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; fi
for binary in selfcheck twin_* unconstrained golden_* law_*; do
    if [ "${1:-}" != --only-sanitizer ] && [ -x "$binary" ]; then run "$binary" "./$binary" --include-ignored --test-threads=1 --nocapture; fi
done
if [ "${1:-}" != --only-sanitizer ] && [ -x bitfast ]; then run end-to-end end_to_end; fi
case ${1:-} in --sanitizer | --only-sanitizer)
    for tool in memcheck racecheck; do
        for binary in twin_*; do
            # racecheck does not see that __syncwarp orders a warp's reads of a ring slot before the one lane that hands it back, and reports
            # all other lanes (LOG.md, "compute-sanitizer").
            [ "$tool-$binary" = racecheck-twin_attention ] && continue
            ./"$binary" --list --ignored small | grep -q ': test' || continue
            run "$binary-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
                "./$binary" --include-ignored --test-threads=1 small
        done
    done
    ;;
esac
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
