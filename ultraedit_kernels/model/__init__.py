"""What is done with a language model: prompts to tokens, its answers, keys and gradients."""
