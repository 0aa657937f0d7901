"""What the deepspeed launcher starts, and the recipes."""
