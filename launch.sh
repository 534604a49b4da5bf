#!/usr/bin/env bash
# Named recipes: ./launch.sh help. Runs from any folder and with the bash 3.2 of macOS.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

USAGE="Usage: ./launch.sh [RECIPE] [--gpus N] [--dry-run]

Sets up .venv on first use and runs a recipe:

  default           three students of the bundled CIFAR-10 model at 5 NFE, against Restart and the
                    classic solvers; 8 to 15 minutes on two cores
  full              the same at 3 to 10 NFE, published training lengths, 50,000 images
  cifar10           published AMED settings: train, sample 50,000 images, FID
  ffhq              the same, FFHQ 64x64
  imagenet64        the same, ImageNet 64x64
  lsun_bedroom_ldm  published AMED settings for the latent model of LSUN bedrooms: train, sample
  ms_coco           published AMED settings for Stable Diffusion v1.5: train, sample, CLIP score
  toy               the Restart paper's synthetic experiment: its figure and its inequalities;
                    about five minutes on two cores
  sd_restart        Stable Diffusion v1.5 at guidance 2, 3, 5 and 8: DDIM, DDPM, Heun and Restart at
                    the same evaluations, 5,000 COCO captions each, CLIP scores
  test              ruff, mypy and the tests
  help              this text

  --model_path PATH use these weights instead of the published ones (published recipes only)
  --try             a few trajectories and images only: does everything work here?
                    (published recipes only)
  --gpus N          N processes, one per GPU (on a machine without GPUs: N processes on its CPU);
                    1 if left out, save that default and full use every core of such a machine
  --dry-run         print the commands and touch nothing

PYTHON=/path/to/python3 chooses the Python that .venv is made from (3.10 or newer)."

# ---------------------------------------------------------------- recipes

recipe_default() { # a student of each kind, at budget 5 only
    note "kept short: 1024 trajectories per AMED student, $IMAGES images a row, 5 NFE only; every"
    note "kind of student under every teacher, 50,000 images and 3 to 10 NFE: ./launch.sh full"
    local kept=--trajectories=256 # Heun's serve both students that learn from it
    predictors="" GPUS=${GPUS:-$SMALL_PROCESSES}
    set -- --dtype="$DTYPE" $kept
    keep student_ns cifar10-small 5 --search=8 --refine=20 --batch=32 "$@"
    set -- --batch=16 --total_kimg=1.024 --tick=0.256 "$@"
    keep amed_heun 4 True "$@"
    keep plugin_restart 4 True "$@"
    # in float32 everywhere, for which the rows of all other samplers are bundled
    small_report default 5 float32 --num_images="$IMAGES" --select=32,128 \
        --detector=cifar10-small,cifar10-small-resnet
}

recipe_full() { # 3 to 6 nodes are 3, 5, 7, 9 evaluations with AFS, and one more without
    local nfe
    predictors="" GPUS=${GPUS:-$SMALL_PROCESSES}
    for num_steps in 3 4 5 6; do
        for afs in True False; do
            set -- $num_steps $afs --dtype="$DTYPE" --batch=128 --total_kimg=10
            # the classic teachers at about Restart's evaluations
            keep amed_heun "$@" --M=3
            keep amed_restart "$@"
            keep plugin heun "$@" --M=4
            keep plugin_restart "$@"
            keep plugin ipndm "$@" --M=2
            nfe=$((2 * num_steps - 2))
            if [ $afs = True ]; then nfe=$((nfe - 1)); fi
            keep student_ns cifar10-small $nfe --dtype="$DTYPE" --search=100 --refine=1000 \
                --batch=64 --trajectories=2048
        done
    done
    small_report full 3,4,5,6,7,8,9,10 "$DTYPE" --num_images=50000
}

# AMED's students of the bundled model, each on the grid that its own solver is published with.
# Arguments: NUM_STEPS AFS FLAG...

amed_heun() { student_amed cifar10-small heun "$1" "$2" --schedule_type=logsnr "${@:3}"; }

amed_restart() { # Flow targets need a restart that reaches a noise level which an interval starts
    # from: of four log-SNR nodes that is 0.068, just above 0.06; no interval of the polynomial grid
    # starts between 0.06 and 0.3.
    student_amed cifar10-small restart "$1" "$2" --M=1 --schedule_type=logsnr \
        --restart_target=flow --restart_info='{"0": [3, 2, 0.06, 0.3]}' "${@:3}"
}

plugin() { # TEACHER NUM_STEPS AFS FLAG...
    student_plugin cifar10-small "$1" "$2" "$3" --schedule_type=polynomial --schedule_rho=7 "${@:4}"
}

plugin_restart() { plugin restart "$1" "$2" --M=2 --restart_target=trajectory "${@:3}"; }

small_report() { # NAME BUDGETS DTYPE FLAG...: the comparison of the students in $predictors, and
    # how far every row is from the exact solution of the ODE; both in one page
    local folder="samples/report-$1"
    set -- --dataset_name=cifar10-small --predictors="$predictors" --budgets="$2" \
        --dtype="$3" --outdir="$folder" "${@:4}"
    run compare.py "$@"
    run solver_error.py "${@:1:5}" --seeds=0-15
    note "the report: $folder/report.html; its table: $folder/table.md"
}

keep() { # COMMAND...: run it and append the run's folder to $predictors
    "$@"
    predictors="${predictors:+$predictors,}$folder"
}

student_amed() { # DATASET TEACHER NUM_STEPS AFS FLAG...: AMED-Solver as published
    train --dataset_name="$1" --sampler_stu=amed --sampler_tea="$2" --num_steps="$3" \
        --afs="$4" --scale_dir=0.01 --scale_time=0 "${@:5}"
}

student_plugin() { # DATASET TEACHER NUM_STEPS AFS FLAG...: the AMED plugin on iPNDM as published
    train --dataset_name="$1" --sampler_stu=ipndm --sampler_tea="$2" --num_steps="$3" \
        --afs="$4" --scale_dir=0.01 --scale_time=0.2 --max_order=4 "${@:5}"
}

student_ns() { # DATASET NFE FLAG...: a whole solver as a table
    train --dataset_name="$1" --sampler_stu=ns --nfe="$2" "${@:3}"
}

# Published recipes. Batch and length of the training, and the images to make:
BATCH="" KIMG="" LAST=""

length() { # BATCH KIMG LAST_SEED: as published, or next to nothing
    BATCH=$1 KIMG=$2 LAST=$3
    if [ "$TRY" = 1 ]; then BATCH=4 KIMG=0.008 LAST=7; fi
}

recipe_cifar10() { published cifar10 cifar10-32x32 50000; }
recipe_ffhq() { published ffhq ffhq-64x64 70000; }
recipe_imagenet64() { published imagenet64 imagenet-64x64 1281167; }

published() { # DATASET REFERENCE IMAGES: both students, 50,000 images each, FID
    local url="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/$2.npz"
    length 128 10 49999
    student_amed "$1" heun 4 True --M=1 --schedule_type=time_uniform --schedule_rho=1 \
        --batch=$BATCH --total_kimg=$KIMG
    run -c "$FETCH" "$url" data/fid-refs
    run fid.py ref --detector=inception --data="data/fid-refs/$2.npz" --num_images="$3" \
        --dest="data/fid-refs/$2-inception.npz"
    evaluate "$2"
    student_plugin "$1" ipndm 4 True --M=2 --schedule_type=polynomial --schedule_rho=7 \
        --batch=$BATCH --total_kimg=$KIMG
    evaluate "$2"
}

evaluate() { # REFERENCE: images of the predictor in $folder, and their FID
    local images="samples/$(basename "$folder")"
    run sample.py --predictor_path="$folder" --seeds=0-$LAST --batch=256 --outdir="$images"
    run fid.py calc --detector=inception --images="$images" --ref="data/fid-refs/$1-inception.npz"
}

recipe_lsun_bedroom_ldm() {
    length 128 10 49999
    train --dataset_name=lsun_bedroom_ldm --batch=$BATCH --total_kimg=$KIMG \
        --sampler_stu=ipndm --sampler_tea=ipndm --num_steps=4 --M=2 --afs=True \
        --scale_dir=0.01 --scale_time=0.2 --schedule_type=discrete --schedule_rho=1 \
        --max_order=4 --guidance_type=uncond
    statistics 64
}

recipe_ms_coco() {
    local prompts=$CAPTIONS
    length 32 5 29999
    captions
    train --dataset_name=ms_coco --batch=$BATCH --total_kimg=$KIMG \
        --sampler_stu=dpmpp --sampler_tea=dpmpp --num_steps=6 --M=2 --afs=False \
        --scale_dir=0.01 --scale_time=0 --schedule_type=discrete --schedule_rho=1 \
        --max_order=2 --predict_x0=True --lower_order_final=True \
        --guidance_type=cfg --guidance_rate=7.5 --prompt_path="$prompts"
    statistics 8 --prompt_path="$prompts"
    scores "samples/$(basename "$folder")"
}

captions() { # fetch $CAPTIONS once
    run -c "$FETCH" "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1/$(basename $CAPTIONS)" data
}

recipe_sd_restart() { # a row for each sampler and guidance rate; a guided call is 2 evaluations
    # DDIM is Euler's method on the model's own grid; intervals as in restart/tables.json.
    local name=sd_restart number=5000 nfe=132 info rate walk
    local low='{\"0\":[10,2,0.1,3]}' high='{\"0\":[10,2,0.1,2]}' # below guidance 5, and from there
    if [ "$TRY" = 1 ]; then
        name=sd_restart-try number=2 nfe=12
        low='{\"0\":[3,1,0.1,3]}' high='{\"0\":[3,1,0.1,2]}'
    fi
    captions
    call "$VENV_PYTHON" -m tools.draw_prompts "$CAPTIONS" "data/coco-$number.csv" --number=$number
    set --
    for rate in 2 3 5 8; do
        walk="--schedule_type=discrete --nfe=$nfe --guidance_rate=$rate"
        if [ "$rate" -lt 5 ]; then info=$low; else info=$high; fi
        set -- "$@" "--row=DDIM w=$rate: euler $walk" "--row=DDPM w=$rate: ddpm $walk" \
            "--row=Heun w=$rate: heun $walk" \
            "--row=Restart w=$rate: restart $walk --main_solver=euler --restart_info=$info"
    done
    run visualize.py --dataset_name=ms_coco --prompt_path="data/coco-$number.csv" \
        --seeds=0-$((number - 1)) --batch=8 --columns=4 --outdir="samples/$name" "$@"
    for rate in 2 3 5 8; do
        scores "samples/$name/"{ddim,ddpm,heun,restart}"-w-$rate"
    done
}

scores() { # FOLDER...: how well images fit their prompts, and their looks
    local images
    if [ "$TRY" = 1 ]; then return; fi # its networks are larger than what is tried
    for images in "$@"; do
        run clip_score.py calc --metrics=clip,aesthetic --images="$images" --json="$images-scores.json"
    done
}

statistics() { # BATCH FLAG...: images of the predictor in $folder, and what an FID needs of them
    local images="samples/$(basename "$folder")"
    run sample.py --predictor_path="$folder" --seeds=0-$LAST --batch="$1" --outdir="$images" \
        "${@:2}"
    run fid.py ref --detector=inception --data="$images" --dest="$images-inception.npz"
}

recipe_toy() { call "$VENV_PYTHON" -m tools.restart_toy --outdir=exps/toy; }

recipe_test() {
    local workers=$CORES
    if [ "$workers" -gt 8 ]; then workers=8; fi
    call "$VENV_PYTHON" -m ruff check .
    call "$VENV_PYTHON" -m ruff format --check .
    call "$VENV_PYTHON" -m mypy
    OMP_NUM_THREADS=1 call "$VENV_PYTHON" -m pytest -q -n "$workers" --dist worksteal
}

# ---------------------------------------------------------------- machinery

RECIPES="default full cifar10 ffhq imagenet64 lsun_bedroom_ldm ms_coco sd_restart toy test help"
CAPTIONS=data/MS-COCO_val2014_30k_captions.csv
VENV_PYTHON=.venv/bin/python
IMAGES=1500 # a row of the default report: enough to tell most rows apart
# The bundled network is twice as fast in bfloat16 where the processor has it; the change of an
# image is far below what a solver of few steps gets wrong.
DTYPE=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then DTYPE=bfloat16; fi
CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# A process per core makes more of a CPU than threads do with a network this small.
SMALL_PROCESSES=1
if ! command -v nvidia-smi >/dev/null; then SMALL_PROCESSES=$((CORES < 8 ? CORES : 8)); fi
# Python that fetches a file once: arguments URL and FOLDER.
FETCH='import sys
from runtime.errors import UserError
from runtime.files import download
try:
    download(*sys.argv[1:3])
except UserError as error:
    sys.exit(f"error: {error}")'

fail() { # CODE SENTENCE
    echo "error: $2" >&2
    exit "$1"
}

note() { echo "# $1" >&"$NOTES"; }

show() { # the command as one could type it
    local word line=""
    for word in "$@"; do
        case $word in
            "$FETCH") word="'<fetch>'" ;;
            *[!A-Za-z0-9_./=:,@%+-]* | "") word="'$word'" ;;
        esac
        line="$line $word"
    done
    echo "${line# }"
}

call() { # show the command, then run it unless this is a dry run
    if [ "$DRY_RUN" = 1 ]; then
        show "$@"
    else
        echo "+ $(show "$@")" >&2
        "$@"
    fi
}

run() { # SCRIPT FLAG..., or -m MODULE FLAG...: in one process, or in one per GPU
    case "$1 $MODEL_PATH" in
        "train.py "?* | "sample.py "?* | "visualize.py "?*) set -- "$@" "--model_path=$MODEL_PATH" ;;
    esac
    if [ "${GPUS:-1}" -gt 1 ] && [ "$1" != -c ]; then
        local threads=${OMP_NUM_THREADS:-$((CORES > GPUS ? CORES / GPUS : 1))}
        OMP_NUM_THREADS=$threads call "$VENV_PYTHON" -m commands.torchrun \
            --nproc_per_node="$GPUS" "$@"
    else
        call "$VENV_PYTHON" "$@"
    fi
}

train() { # FLAG...: train, or go on with an equal run; leaves the run's folder in $folder
    if [ "$DRY_RUN" = 1 ]; then
        run train.py --resume=auto "$@"
        folder="exps/<run>"
        return
    fi
    folder=$(run train.py --resume=auto "$@" |
        awk '{ print | "cat 1>&2"; fflush(); last = $0 } END { print last }')
}

setup() { # EXTRA ("", dev or diffusion): make .venv once; fast when nothing has changed
    local stamp key python=${PYTHON:-python3}
    stamp=".venv/installed${1:+-$1}"
    key=$(cat pyproject.toml constraints.txt | cksum)
    if [ -x "$VENV_PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        return
    fi
    if ! "$VENV_PYTHON" -c "" 2>/dev/null; then
        command -v "$python" >/dev/null || fail 1 \
            "$python was not found: install Python 3.10 or newer, or set PYTHON to its path"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail 1 \
            "$python is $("$python" -V 2>&1), but 3.10 or newer is needed: set PYTHON to its path"
        call "$python" -m venv --clear .venv
    fi
    call "$VENV_PYTHON" -m pip install --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
    if [ "$DRY_RUN" = 0 ]; then
        echo "$key" >"$stamp"
        # what an extra brings serves those without it; dev brings all
        if [ -n "$1" ]; then echo "$key" >.venv/installed; fi
        if [ "$1" = dev ]; then echo "$key" >.venv/installed-diffusion; fi
    fi
}

# ---------------------------------------------------------------- command line

RECIPE="" GPUS="" DRY_RUN=0 NOTES=2 TRY=0 MODEL_PATH=""
while [ $# -gt 0 ]; do
    case $1 in
        --gpus) GPUS=${2:-none} && shift ;;
        --gpus=*) GPUS=${1#--gpus=} && GPUS=${GPUS:-none} ;;
        --model_path) MODEL_PATH=${2:-} && shift ;;
        --model_path=*) MODEL_PATH=${1#--model_path=} ;;
        --try) TRY=1 ;;
        -n | --dry-run) DRY_RUN=1 NOTES=1 ;;
        -h | --help) RECIPE=help ;;
        -*) fail 2 "unknown option '$1': there are --gpus N, --model_path PATH, --try, --dry-run" ;;
        *)
            [ -z "$RECIPE" ] || fail 2 "one recipe at a time, but there are '$RECIPE' and '$1'"
            RECIPE=$1
            ;;
    esac
    [ $# -eq 0 ] || shift
done
RECIPE=${RECIPE:-default}
case $GPUS in
    *[!0-9]* | 0*) fail 2 "--gpus '$GPUS' is no number of processes: give 1 or more" ;;
esac
case " $RECIPES " in
    *" $RECIPE "*) ;;
    *) fail 2 "unknown recipe '$RECIPE': choose one of $RECIPES" ;;
esac
case $MODEL_PATH in
    "" | /* | hub:*) ;;
    *) MODEL_PATH=$CALLER/$MODEL_PATH ;;
esac
case "$RECIPE $TRY$MODEL_PATH" in
    "default 0" | "full 0" | "toy 0" | "test 0" | help*) ;;
    "default "* | "full "* | "toy "* | "test "*)
        fail 2 "'$RECIPE' takes no --try or --model_path: they belong to published recipes" ;;
esac
if [ "$RECIPE" = help ]; then
    echo "$USAGE"
    exit 0
fi

export PYTHONUNBUFFERED=1
case $RECIPE in
    test) setup dev ;;
    ms_coco | sd_restart) setup diffusion ;;
    *) setup "" ;;
esac
set -m # the recipe gets a process group of its own, which ends with this script
"recipe_$RECIPE" &
stop() { # SIGNAL CODE
    trap "" INT TERM HUP
    kill "-$1" -- -$! 2>/dev/null || true
    wait $! 2>/dev/null || true # bash would name the signal
    exit "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM HUP
wait $!
[ "$DRY_RUN" = 1 ] || note "$RECIPE took $((SECONDS / 60)) min $((SECONDS % 60)) s"
