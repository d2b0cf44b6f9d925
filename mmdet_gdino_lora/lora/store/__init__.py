"""Files: bases, checkpoints, PEFT folders, merged weights, other releases' formats."""
