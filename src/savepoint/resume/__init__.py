"""How a run goes on: what was asked for, where it starts, what is compared, what is put back."""
