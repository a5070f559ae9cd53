#!/usr/bin/env bash
# The whole loop with a real language model on this machine's CPU: measure, plan, run, use.
#
#     bash scripts/demo.sh
#
# Needs Python 3.10 or newer, pip and about 10 GB of disk; no GPU, no model hub. PPO teaches
# SmolLM2-135M-Instruct to answer plain prompts in a brighter mood, with the VADER sentiment
# lexicon as the reward, on two workers. Prints six numbered steps, each with its seconds, and
# leaves everything it makes in models/ and runs/demo/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

# The experiment: set as environment variables, e.g. STEPS=20 BATCH_SIZE=32 bash scripts/demo.sh
WORKERS="${WORKERS:-2}"
BATCH_SIZE="${BATCH_SIZE:-16}"     # sequences per step
MINI_BATCHES="${MINI_BATCHES:-2}"  # optimizer steps per batch
PROMPT_LEN="${PROMPT_LEN:-64}"     # tokens; longer prompts are refused
PROMPT_MEAN="${PROMPT_MEAN:-40}"   # tokens of its prompts on average, with their chat template
RESPONSE_LEN="${RESPONSE_LEN:-32}" # tokens
STEPS="${STEPS:-3}"

MODEL=models/smollm2-135m
DATA=experiments/data/prompts.jsonl
OUT=runs/demo

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"

step=0
step_start_s=0

# done_step: the seconds of the step that ends. say TEXT: opens the next numbered step.
done_step() { printf '   (%d s)\n' "$((SECONDS - step_start_s))"; }
say() {
  if [[ "$step" -gt 0 ]]; then done_step; fi
  step=$((step + 1))
  step_start_s="$SECONDS"
  printf '\n%d. %s\n' "$step" "$*"
}

say "Install the planner and the runtime"
make_environment demo --editable '.[executor]' gguf accelerate

say "Unpack the model"
python scripts/get_smollm2.py "$MODEL"
mkdir -p "$OUT"

say "Measure what its layers cost on this machine"
realexec profile --model "$MODEL" --device cpu --workers "$WORKERS" -o "$OUT/profile.json"

workload=(
  "batch_size=$BATCH_SIZE"
  "prompt_len=$PROMPT_LEN"
  "data.prompt_mean=$PROMPT_MEAN"
  "response_len=$RESPONSE_LEN"
  "ppo.num_mini_batches=$MINI_BATCHES"
  "reward.source=vader"
)

say "Search for the fastest plan on $WORKERS workers"
realplan search --model "$MODEL" --critic "$MODEL" --cluster local --gpus "$WORKERS" \
  --profile "$OUT/profile.json" -o "$OUT/plan.json" "${workload[@]}"

say "Run $STEPS steps of PPO as planned"
rm -rf "${OUT:?}/ppo"
realexec run "$OUT/plan.json" -o "$OUT/ppo" \
  "actor.path=$MODEL" "ref.path=$MODEL" "critic.path=$MODEL" \
  "data.path=$DATA" "total_steps=$STEPS"

say "Open the trained actor with transformers"
python - "$OUT/ppo/actor" <<'PYTHON'
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = max(Path(sys.argv[1]).glob("*globalstep*"), key=lambda path: path.stat().st_mtime)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = "Write one sentence about a rainy Monday."
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
answer = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0]
print(folder)
print(prompt)
print("->", tokenizer.decode(answer[inputs["input_ids"].shape[1]:], skip_special_tokens=True))
PYTHON
done_step

printf '\nDone in %d s. The plan: %s; metrics, trace and models: %s\n' \
  "$SECONDS" "$OUT/plan.json" "$OUT/ppo"
