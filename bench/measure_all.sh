#!/bin/sh
# Everything in docs/performance.md into a folder: JSON, PNG and the printed tables.
#
#   bench/measure_all.sh [--parts "NAMES"] [--seconds S] [--limit S] [--full] FOLDER
#
#   --parts     some of: step-fp8 vae block-fp8 stream-fp8 step-bf16 op; all of them by default, in this order
#   --seconds   how long each of the two runs of a measurement takes, about (0.5)
#   --limit     seconds for everything (480): a part that is still running then is stopped, and what it has measured is
#               kept and shown; parts that would start in the last 20 seconds are left out
#   --full      also what takes minutes to compile or says little: the compiled VAE, launches one by one, every op
#
# Goes on when a part fails, and leaves with 1 in the end. PYTHON: the interpreter.
usage='usage: bench/measure_all.sh [--parts "NAMES"] [--seconds S] [--limit S] [--full] FOLDER'
python=${PYTHON:-python}
parts="step-fp8 vae block-fp8 stream-fp8 step-bf16 op"
known=$parts
seconds=0.5
limit=480
full=
while [ $# -gt 1 ]; do
    case $1 in
    --parts) parts=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --full) full=yes; shift ;;
    *) echo "$usage" >&2; exit 2 ;;
    esac
done
folder=$1
case $folder in '' | -*) echo "$usage" >&2; exit 2 ;; esac
for part in $parts; do
    case " $known " in *" $part "*) ;; *) echo "there is no part $part; choose from: $known" >&2; exit 2 ;; esac
done
mkdir -p "$folder" || exit 2
end=$(($(date +%s) + limit))
failed=0

measure() { # measure NAME ARGUMENTS...: one command of the benchmarks, within what is left of the limit
    name=$1
    shift
    left=$((end - $(date +%s)))
    if [ "$left" -lt 20 ]; then
        echo "$name is left out: the limit of $limit s is spent" >&2
        failed=1
        return
    fi
    timeout "$left" "$python" -m kinora.bench "$@" -o "$folder/$name.json" >"$folder/$name.txt"
    case $? in
    0) ;;
    124) "$python" -m kinora.bench show "$folder/$name.json" >"$folder/$name.txt"; failed=1 ;;
    *) failed=1 ;;
    esac
    cat "$folder/$name.txt"
}

for part in $parts; do
    case $part in
    step-fp8) measure $part step --precision fp8 --variant kinora,eager,compiled,torchao${full:+,fused} --profile --seconds $seconds ;;
    step-bf16) measure $part step --precision bf16 --variant kinora,eager,compiled,diffusers${full:+,fused} --profile --seconds $seconds ;;
    vae) measure $part vae --precision bf16 --variant kinora,eager${full:+,compiled,fused} --profile --seconds $seconds ;;
    block-fp8) measure $part block --precision fp8 --variant kinora,eager${full:+,fused} --seconds $seconds ;;
    stream-fp8) measure $part stream --precision fp8 --variant kinora${full:+,eager,fused} ;;
    op)
        some="attention_fp8 rope_attention fp8_matmul residual_norm_fp8 gelu_quantize_rows qkv_norm_rope_fp8 store_values_fp8"
        [ -z "$full" ] || some=
        measure $part op $some --variant kinora,eager,library${full:+,compiled} --seconds 0.1
        ;;
    esac
done
exit $failed
