#!/usr/bin/env bash
# Runs every test of the binaries beside it on this machine's GPU, prints a row each, fails on any difference.
# usage: ./run.sh [--jobs N] [--limit SECONDS] [--sanitizer | --only-sanitizer]
cd "$(dirname "$0")" || exit 2
export BITFAST_FIXTURES="$PWD/fixtures"
jobs=1 tests=1 sanitizer=0 limit=1200
while [ $# != 0 ]; do
    case $1 in
    --jobs) jobs=$2 && shift ;;
    --limit) limit=$2 && shift ;;
    --sanitizer) sanitizer=1 ;;
    --only-sanitizer) sanitizer=1 tests=0 ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
    esac
    shift
done
case $jobs in '' | 0 | *[!0-9]*) echo "--jobs: a number from 1" >&2 && exit 2 ;; esac
case $limit in '' | 0 | *[!0-9]*) echo "--limit: seconds, from 1" >&2 && exit 2 ;; esac
mkdir -p logs
: >logs/counts

# A kernel that hangs must cost its own row only.
limited() {
    timeout --kill-after=10 "$limit" "$@"
}

# Where no card can be used every test would fail, and say so in as many words.
if [ -x bitfast ]; then
    limited ./bitfast selfcheck --device cuda >logs/card.log 2>&1
    case $? in
    2) echo "nothing was run: $(grep '^error:' logs/card.log)" >&2 && exit 2 ;;
    124 | 137) echo "nothing was run: selfcheck did not end within $limit s" >&2 && exit 2 ;;
    esac
fi

# Its name and the command. Prints one row when it has ended, with the end of its log when it failed.
run() {
    local name=$1 log begin=$SECONDS status=0 line p f
    log="logs/${name//[ :]/-}.log"
    shift
    "$@" >"$log" 2>&1 || status=$?
    line=$(grep '^test result:' "$log" | tail -1)
    p=$(sed -n 's/.* \([0-9]*\) passed.*/\1/p' <<<"$line")
    f=$(sed -n 's/.* \([0-9]*\) failed.*/\1/p' <<<"$line")
    p=${p:-0} f=${f:-0}
    case $status in 124 | 137) echo "ended after its limit of $limit s, or killed" >>"$log" ;; esac
    # A crash, or a binary that ran nothing, is a failure.
    if [ "$f" = 0 ] && { [ "$status" != 0 ] || [ "$p" = 0 ]; }; then f=1; fi
    echo "$p $f" >>logs/counts
    line=$(printf '%-72s %2d passed %2d failed %5ds' "$name" "$p" "$f" $((SECONDS - begin)))
    if [ "$f" != 0 ]; then line+=$'\n'$(tail -40 "$log"); fi
    printf '%s\n' "$line"
}

# The same as soon as fewer than $jobs are under way.
start() {
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    run "$@" &
}

# Each test of a binary in a process of its own: a crash ends one, and they spread over the jobs.
start_tests() {
    local binary=$1 names name
    names=$("./$binary" --include-ignored --list 2>/dev/null | sed -n 's/: test$//p')
    # No list: the binary itself says why, in its row.
    if [ -z "$names" ]; then start "$binary" limited "./$binary"; fi
    for name in $names; do
        start "$binary $name" limited "./$binary" --include-ignored --exact "$name" --nocapture
    done
}

# What a user would do: the card answers 32 requests in one batch, this machine's CPU derives every bit again; a changed logprob is noticed.
end_to_end() {
    local i model answers
    limited ./bitfast selfcheck --device cuda || return 1
    for i in $(seq 32); do
        printf '{"prompt_token_ids": [%s], "max_tokens": 32, "temperature": 0.%d, "seed": %d, "logprobs": 3, "ignore_eos": true}\n' \
            "$(seq -s, "$i" $((3 * i + 5)))" $((i % 9)) "$i"
    done >logs/prompts.jsonl
    for model in fixtures/models/llama-untied fixtures/models/qwen3-untied; do
        answers=logs/$(basename "$model").jsonl
        rm -f "$answers"
        limited ./bitfast run -q -m "$model" --skip-tokenizer-init --device cuda --kv-cache-memory 1GiB --prompts logs/prompts.jsonl --output "$answers" || return 1
        limited ./bitfast verify -q -m "$model" "$answers" || return 1
        sed '9s/"logprob":-[0-9.]*/"logprob":-1.5/' "$answers" >logs/changed.jsonl
        limited ./bitfast verify -q -m "$model" logs/changed.jsonl
        [ $? = 1 ] || { echo "the change was not noticed"; return 1; }
    done
    echo "test result: ok. 5 passed; 0 failed"
}

# The small tests of a binary under a tool.
sanitized() {
    if [ "$1" = racecheck ]; then local -x BITFAST_RACECHECK=1; fi
    limited compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "./$2" --include-ignored --test-threads=1 small
}

reports_the_ring() {
    limited compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 5 ./twin_attention --include-ignored --test-threads=1 small
    [ $? = 9 ] || { echo "no report"; return 1; }
}

if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; fi
if [ "$tests" = 1 ]; then
    # The longest first.
    for binary in law_* twin_* golden_* unconstrained selfcheck; do
        if [ -x "$binary" ]; then start_tests "$binary"; fi
    done
    if [ -x bitfast ]; then start end-to-end end_to_end; fi
    wait
fi
if [ "$sanitizer" = 1 ]; then
    for tool in memcheck racecheck; do
        for binary in twin_*; do
            ./"$binary" --list --ignored small | grep -q ': test' || continue
            start "$binary $tool" sanitized "$tool" "$binary"
        done
    done
    # racecheck does not see that __syncwarp orders a warp's reads of a ring slot before the one lane that hands it back: without the macro of
    # its runs it reports all other lanes (LOG.md, "racecheck of every twin"). So it does look at the ring.
    if [ -x twin_attention ]; then start "twin_attention racecheck, control" reports_the_ring; fi
    wait
fi
passed=0 failed=0
while read -r p f; do passed=$((passed + p)) failed=$((failed + f)); done <logs/counts
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
