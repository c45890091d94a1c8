#!/bin/sh
# Everything in docs/performance.md, into the folder $1: JSON, PNG and the printed tables. Goes on when a part fails, and
# leaves with 1 in the end. PYTHON: the interpreter; KINORA_BENCH_PARTS: some of op, step, vae, block, stream.
folder=${1:?usage: bench/measure_all.sh FOLDER}
python=${PYTHON:-python}
failed=0
mkdir -p "$folder"

measure() { # measure NAME ARGUMENTS...
    name=$1
    shift
    case " ${KINORA_BENCH_PARTS:-op step vae block stream} " in *" $1 "*) ;; *) return ;; esac
    "$python" -m kinora.bench "$@" -o "$folder/$name.json" >"$folder/$name.txt" || failed=1
    cat "$folder/$name.txt"
}

measure op op --profile
measure vae vae --precision bf16 --profile
measure step-bf16 step --precision bf16 --profile
measure step-fp8 step --precision fp8 --profile --variant eager,compiled,fused,kinora
measure block-fp8 block --precision fp8 --profile --variant eager,fused,kinora
measure stream-fp8 stream --precision fp8 --variant eager,fused,kinora
exit $failed
