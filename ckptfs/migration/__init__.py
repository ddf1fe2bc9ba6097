"""What should happen, without doing it: states, parameters, addresses, plans. Pure: no I/O and no clock."""
