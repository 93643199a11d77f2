"""`mlip-refine finetune`: correct a potential, and evaluate it afresh."""
