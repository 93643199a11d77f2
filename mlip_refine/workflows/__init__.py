"""What a user asks for: finetune, free energies, evaluation."""
