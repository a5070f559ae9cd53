"""``PROMPTS``: what is asked of chat models, every question in every manner."""

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Is the sky blue?",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "Say hello in Spanish.",
    "Who wrote Hamlet?",
    "Explain gravity in one sentence.",
)
MANNERS = ("", " Answer briefly.", " Answer in one word.", " Explain your answer.")
PROMPTS = tuple(question + manner for manner in MANNERS for question in QUESTIONS)
