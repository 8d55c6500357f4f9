"""AESLSFTTrainer, its config and callbacks; GRPO; nothing is lost to a kill."""
