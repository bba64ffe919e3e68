"""What a LoRA layer costs beside its frozen linear layer and beside others' ways to do it, measured."""
