"""Fine-tuning and pre-training as commands: one fine-tuner, to which a domain adds its own options."""
