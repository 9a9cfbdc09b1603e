"""The requests of each API family: their fields, what each must be, and what is known but not served."""
