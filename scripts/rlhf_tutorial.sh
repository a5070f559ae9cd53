#!/usr/bin/env bash
# The whole procedure on this machine's CPU: SFT, then a reward model, then PPO, each with a plan
# of its own.
#
#     bash scripts/rlhf_tutorial.sh              # a small model learns to sort digits: minutes
#     bash scripts/rlhf_tutorial.sh smollm2      # SmolLM2-135M learns a bright mood: a model and
#                                                # VADER reward it together; about half an hour
#
# Needs Python 3.10 or newer and pip; no GPU, no model hub. Leaves data, plans, runs and
# curves.svg in runs/tutorial/ (runs/tutorial-smollm2/).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

TASK="${1:-sort}"
WORKERS="${WORKERS:-2}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"

case "$TASK" in
  sort)
    OUT=runs/tutorial MODEL=runs/tutorial/model PACKAGES=()
    SIZES=(prompt_len=8 response_len=8 batch_size=64)
    EVAL_EVERY=10
    SFT=(total_steps=150 actor.lr=3e-3 actor.schedule=cosine)
    REWARD=(total_steps=150 reward.lr=2e-3 reward.schedule=cosine)
    PPO=(total_steps=80 actor.lr=3e-4 critic.lr=1e-3 reward.source=model)
    MEASURED=rew_inf/rewards
    ;;
  smollm2)
    OUT=runs/tutorial-smollm2 MODEL=models/smollm2-135m PACKAGES=(gguf accelerate)
    SIZES=(prompt_len=64 response_len=32 batch_size=16)
    EVAL_EVERY=5
    SFT=(total_steps=10 actor.lr=2e-5)
    REWARD=(total_steps=20 reward.lr=2e-5)
    PPO=(total_steps=20 actor.lr=1e-5 critic.lr=1e-5 reward.source=model+vader)
    MEASURED=rew_fn/rewards
    ;;
  *) fail "no task '$TASK'; use sort or smollm2" ;;
esac

step=0
say() {
  step=$((step + 1))
  printf '\n%d. %s (%d s so far)\n' "$step" "$*" "$SECONDS"
}
newest() { find "$1" -maxdepth 1 -name '*globalstep*' | sort -V | tail -n 1; }

# stage NAME ALGORITHM DATA MODEL CRITIC OPTION...: searches a plan, then runs it.
stage() {
  local name="$1" algorithm="$2" data="$3" model="$4" critic="$5"
  shift 5
  realplan search --algorithm "$algorithm" --model "$model" --critic "$critic" --cluster local \
    --gpus "$WORKERS" --profile "$OUT/profile.json" --time-limit 10 -o "$OUT/$name.json" \
    "${SIZES[@]}" "$@"
  rm -rf "${OUT:?}/$name"
  realexec run "$OUT/$name.json" -o "$OUT/$name" "data.path=$OUT/$data.jsonl" \
    "eval_data.path=$OUT/eval_$data.jsonl" "eval_every=$EVAL_EVERY"
}

say "Install the planner and the runtime"
make_environment tutorial --editable '.[executor]' "${PACKAGES[@]}"

say "Make the data and the model"
if [[ "$TASK" == sort ]]; then
  python scripts/toy_task.py "$OUT" --examples 4000
else
  python scripts/get_smollm2.py "$MODEL"
  python scripts/sentiment_task.py "$OUT"
fi

say "Measure what the model's layers cost on this machine"
realexec profile --model "$MODEL" --device cpu --workers "$WORKERS" -o "$OUT/profile.json"

say "Supervised fine-tuning: half of the answers are as they should be"
stage sft sft sft "$MODEL" "$MODEL" "${SFT[@]}"
actor="$(newest "$OUT/sft/actor")"

say "A reward model from pairs of answers, starting from the fine-tuned model"
stage reward reward pairs "$actor" "$actor" "${REWARD[@]}" pairs.center_coef=0.01
reward="$(newest "$OUT/reward/reward")"

say "PPO: the actor learns what the reward model likes, and stays near what it was"
stage ppo ppo prompts "$actor" "$reward" "${PPO[@]}" ppo.num_mini_batches=2 ppo.num_epochs=2 \
  ppo.normalize_rewards=true ppo.normalize_values=true ppo.kl_coef=0.02 ppo.kl_target=2 \
  samples_every=10

say "The curves"
python scripts/draw_curves.py "$OUT/curves.svg" "$OUT/sft:actor_train/loss" \
  "$OUT/reward:reward_train/accuracy" "$OUT/ppo:$MEASURED"
printf '\nDone in %d s. Curves: %s; answers with their rewards: %s\n' \
  "$SECONDS" "$OUT/curves.svg" "$OUT/ppo/samples.jsonl"
