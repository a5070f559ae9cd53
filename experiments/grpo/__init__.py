"""Group-relative policy optimisation, with its Dr. GRPO and DAPO variants."""
