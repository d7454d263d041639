"""Is it still the same model? A ladder of checks from the fine-tuned model to each variant."""
