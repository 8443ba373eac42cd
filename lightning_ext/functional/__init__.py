"""Pure mathematics: tensors in, tensors out; imports torch only."""
