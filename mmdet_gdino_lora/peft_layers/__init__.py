"""Everything that depends on the insides of PEFT's layers."""
